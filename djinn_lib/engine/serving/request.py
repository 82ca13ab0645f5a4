"""A request that was submitted and is served in its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from djinn_lib.engine.decode.sampling import Sampling
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.engine.serving.transcript import Piece
from djinn_lib.errors import RequestCancelled

T = TypeVar("T")


@dataclass(slots=True)
class GenerationRequest:
    """What is asked of a model: a prompt that has been checked, and how to continue it.

    Attributes:
        begin_s: when it was made, by `time.perf_counter`.
        deliver: called with each piece of the continuation, by the thread that computes.
        cancelled: set to end it after the token that is being computed.
    """

    model: str
    prompt_ids: list[int]
    sampling: Sampling
    begin_s: float
    deliver: Callable[[Piece], None] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def proceed(self) -> None:
        """Go on, or raise `RequestCancelled`."""
        if self.cancelled.is_set():
            raise RequestCancelled(
                f"expected a request for {self.model!r} to be served to its end, got one that was "
                "cancelled: submit it again if it was not meant to be"
            )


def for_each(
    asked: GenerationRequest | list[GenerationRequest], serve: Callable[[GenerationRequest], T]
) -> T | list[T]:
    """Serve a request, or each of a list in its order; returns what `serve` does, or a list."""
    return [serve(request) for request in asked] if isinstance(asked, list) else serve(asked)


class PendingGeneration(Future[Generation]):
    """The `Generation` of a request that waits or is being served.

    `cancel()` takes a request that waits out of the queue and returns True. One that is being
    served ends after the token that is being computed, and gives its lease back; `cancel()` returns
    False, and `result()` raises `RequestCancelled`. Inside a lease the request cannot be waited for
    with `result`, `exception` or asyncio; nor may it be with `concurrent.futures.wait`, which
    cannot be refused and would wait for ever.
    """

    def __init__(
        self,
        request: GenerationRequest,
        withdraw: Callable[[], bool],
        ensure_may_wait: Callable[[str, bool], None],
    ) -> None:
        super().__init__()
        self.request = request
        self._withdraw = withdraw
        self._ensure_may_wait = ensure_may_wait

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the `Generation`, at most `timeout` seconds.

        An interrupt (Ctrl-C) gives the request up, and is raised when nothing of it computes.

        Raises:
            LeaseError: the caller holds a lease, and would wait for itself.
            TimeoutError, CancelledError, RequestCancelled, DjinnError: there is none.
        """
        with self._waiting():
            return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Like `result`, for the error of a request that failed; None if it did not."""
        with self._waiting():
            return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[Generation]], object]) -> None:
        """Call a function with this object when the request is done.

        Raises:
            LeaseError: it is asyncio that wants to know, for a coroutine that would wait for
                itself.
        """
        if not self.done() and getattr(fn, "__module__", None) == "asyncio.futures":
            self._ensure_may_wait(self.request.model, False)
        super().add_done_callback(fn)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Wait in the block, unless for oneself; an interrupt gives the request up."""
        if not self.done():
            self._ensure_may_wait(self.request.model, True)
        try:
            yield
        except TimeoutError:
            raise
        except BaseException:
            if not self.done():
                self.cancel()
                wait([self])
            raise

    def cancel(self) -> bool:
        """Give the request up; returns whether nothing of it was computed."""
        self.request.cancelled.set()
        if self.cancelled():
            return True
        if not (self._withdraw() and super().cancel()):
            return False
        self.set_running_or_notify_cancel()  # before that, `concurrent.futures.wait` waits for it
        return True
