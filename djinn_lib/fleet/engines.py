"""The client side of a vLLM engine process: it submits requests and returns futures."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import cached_property
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from djinn_lib.engine.models.tokenizer import Tokenizer
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.fleet import children
from djinn_lib.fleet.options import engine_tokenizer
from djinn_lib.fleet.protocol import BrokerGone, error_class

Result = dict[str, Any]  # see `vllm_engine`
OnPart = Callable[[list[int], str], None]


class EngineDied(DjinnError, RuntimeError):
    """An engine did not start, or ended while requests were waiting."""


class PendingResult(Future[Any]):
    """Future of a request or a call; cancelling it cancels the request.

    Attributes:
        submitted_s: time of submission, by the monotonic clock.
    """

    def __init__(
        self,
        withdraw: Callable[[], None],
        on_part: OnPart | None = None,
        convert: Callable[[Any, float], Any] = lambda value, submitted_s: value,
    ) -> None:
        super().__init__()
        self.submitted_s = time.perf_counter()
        self.on_part = on_part
        self._withdraw, self._convert = withdraw, convert
        self.is_dropped = False

    def answer(self, value: Any) -> None:
        """Set the result that the engine returned."""
        try:
            self.set_result(self._convert(value, self.submitted_s))
        except Exception as error:
            self.set_exception(error)

    def drop(self) -> None:
        """Let the listener cancel the request at its next part.

        This takes no lock: the garbage collector may call it in any thread and between any two
        steps.
        """
        self.is_dropped = True

    def cancel(self) -> bool:
        """Cancel the request, even if it is being served; return False if it is done."""
        cancelled = super().cancel()
        if cancelled:
            self._withdraw()
        return cancelled


class EngineClient:
    """Starts a vLLM engine in its own process and sends it requests; thread-safe.

    Args:
        name: name of the model, for messages.
        python: Python of an environment with vLLM.
        options: options of `vllm.LLM`.
        log: file for the engine's output.
        environment: variables for the engine.
        start_timeout_s: maximum time to start.

    Raises:
        DjinnError: it did not start: the worker's own error, or `EngineDied` with the last lines
            of its log.
    """

    def __init__(
        self,
        name: str,
        python: str | Path,
        options: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        self.name, self.options, self.log = name, dict(options), log
        self._numbers = itertools.count()
        self._pending: dict[str, PendingResult] = {}
        # Of sending, which may wait for the engine: so the listener must not need it, or a full
        # pipe in each direction would stop both sides.
        self._lock = threading.RLock()  # again within itself, if it is collected there
        self._ended: str | None = None  # why it ended
        with ExitStack() as undo:
            self._pipe, theirs = Pipe()
            undo.callback(self._pipe.close)
            with theirs:
                self._process = children.start(
                    python, "djinn_lib.fleet.vllm_engine", [str(theirs.fileno())], log,
                    environment, [theirs.fileno()],
                )  # fmt: skip
            undo.callback(children.end, self._process)
            self.facts = self._started(self.options, start_timeout_s)
            undo.pop_all()
        self._listener = threading.Thread(
            target=self._listen, args=(self._pipe,), name=f"djinn-engine-{name}", daemon=True
        )
        self._listener.start()

    def _started(self, options: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            self._pipe.send(options)
            if not self._pipe.poll(timeout_s):
                raise self._not_started(f"it said nothing within {timeout_s:.0f} s")
            kind, *values = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.wait()
            raise self._not_started(f"exit status {self._process.returncode}") from error
        if kind != "ready":
            raise self._not_started(*values)
        return values[0]

    def _not_started(self, why: str, kind: str = "") -> DjinnError:
        """Return the error of an engine that did not start; our own errors need no log."""
        if ours := error_class(kind):
            return ours(f"the engine of {self.name!r} did not start: {why}")
        return EngineDied(
            f"the engine of {self.name!r} did not start ({kind or 'no error'}: {why}): correct its "
            f"options. The end of its log:\n{children.last_lines(self.log)}"
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the model, read when it is first needed; None if it has none.

        The engine has its own. This one formats conversations in the process of the caller.

        Raises:
            CheckpointError: its files are broken, or cannot be fetched.
        """
        return engine_tokenizer(self.options) if self.facts["has_tokenizer"] else None

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether requests can be sent to it."""
        return self._ended is None

    @property
    def n_pending(self) -> int:
        """Number of unanswered requests and calls."""
        return len(self._pending)

    def submit(
        self,
        prompt: str | Sequence[int],
        parameters: Mapping[str, Any],
        on_part: OnPart | None = None,
        convert: Callable[[Any, float], Any] = lambda value, submitted_s: value,
    ) -> PendingResult:
        """Submit a request and return at once; vLLM batches it with others.

        Args:
            prompt: text, or token ids.
            parameters: for `vllm.SamplingParams`.
            on_part: called by another thread with new token ids and their text after each step.
            convert: makes the result from the engine's result and the time of this call.

        Raises:
            EngineDied: the engine has ended.
        """
        ids = prompt if isinstance(prompt, str) else list(prompt)
        pending = PendingResult(lambda: self._withdraw(pending), on_part, convert)
        return self._ask(pending, "add", ids, dict(parameters), on_part is not None)

    def call(self, method: str, *arguments: Any, timeout_s: float | None = 600.0) -> Any:
        """Call a method of the worker, between two steps, and return its result.

        Raises:
            EngineDied: the engine has ended.
        """
        pending = PendingResult(lambda: None)
        return self._ask(pending, "call", method, arguments).result(timeout_s)

    def _ask(self, pending: PendingResult, kind: str, *rest: Any) -> PendingResult:
        number = str(next(self._numbers))
        with self._lock:
            if self._ended is not None:
                raise self._failed()
            self._pending[number] = pending
            try:
                self._pipe.send((kind, number, *rest))
            except OSError as error:  # the listener will find the reason
                del self._pending[number]
                raise self._failed() from error
        return pending

    def _withdraw(self, cancelled: PendingResult) -> None:
        with self._lock, suppress(OSError):  # the engine has ended, and so has the request
            for number, pending in list(self._pending.items()):
                if pending is cancelled and self._pending.pop(number, None):
                    self._pipe.send(("cancel", number))

    # -- the listener ---------------------------------------------------------------------------

    def _listen(self, pipe: Connection) -> None:
        try:
            while True:
                kind, *rest = pipe.recv()
                if kind == "broken":
                    self._ended = rest[0]
                    break
                self._hear(kind, *rest)
        except (EOFError, OSError):
            pass
        self._process.wait()
        with self._lock:
            self._ended = self._ended or f"exit status {self._process.returncode}"
            left = list(self._pending.values())
            self._pending.clear()
        for pending in left:
            if pending.set_running_or_notify_cancel():
                pending.set_exception(self._failed())

    def _hear(self, kind: str, number: str, *values: Any) -> None:
        take = self._pending.get if kind == "part" else self._pending.pop
        pending = take(number, None)
        if pending is None:  # it was cancelled
            return
        if kind == "part":
            if pending.is_dropped:
                pending.is_dropped, pending.on_part = False, None
                # Not here, because it sends, and the engine may wait until this thread has read.
                threading.Thread(target=pending.cancel, name="djinn-drop", daemon=True).start()
            elif pending.on_part:
                pending.on_part(*values)
        elif pending.set_running_or_notify_cancel():
            if kind == "refused":
                pending.set_exception(
                    ConfigError(f"the engine of {self.name!r} refused the request: {values[0]}")
                )
            else:
                pending.answer(values[0])

    def _failed(self) -> EngineDied:
        log = children.last_lines(self.log, 4)
        what_to_do = "remove the model and add it again"
        if BrokerGone.said in log:
            what_to_do = BrokerGone.said
        return EngineDied(
            f"the engine of {self.name!r} ended ({self._ended or 'its process is gone'}): "
            f"{what_to_do}. The end of its log:\n{log}"
        )

    def ask_to_end(self) -> None:
        """Ask the engine to end, without waiting, so several can end at the same time."""
        with self._lock:
            if self._ended is None:
                self._ended = "it was closed"
                with suppress(OSError):  # it is ending
                    self._pipe.send(("end",))

    def close(self) -> None:
        """End the engine; unfinished requests fail. A second call does nothing."""
        self.ask_to_end()
        children.end(self._process, asked=True)
        if self._listener is not threading.current_thread():  # a callback of a request closes it
            self._listener.join()
        self._pipe.close()
