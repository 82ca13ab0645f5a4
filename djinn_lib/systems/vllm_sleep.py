"""Provide the system `vllm_sleep`: vLLM engines that sleep and wake.

This is vLLM's own way to switch models. `sleep(level=1)` moves an engine's weights to host memory
and drops its KV cache; `wake_up()` moves the weights back. CUDA graphs stay valid.

A request whose engine is awake is sent immediately, and vLLM batches it. For other requests,
engines finish, sleep and wake in the order of `SleepOrder`.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from djinn_lib.engine.decode.eager import Tokens
from djinn_lib.errors import DjinnError
from djinn_lib.fleet import environment
from djinn_lib.fleet.engines import EngineClient, Result
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest
from djinn_lib.systems.sleep_order import Run, Sleep, SleepOrder, Wake
from djinn_lib.systems.vllm_recreate import check_request, engine_options, vocab_sizes

# Room for 4,000 tokens of a model without grouped heads. By default vLLM allocates all memory that
# it may, and would spend time on freeing and allocating it at every switch.
KV_CACHE_BYTES = 2 << 30
_OWN = ("naive", "max_wait_s", "core_process")  # options that are not the engines'


@dataclass(slots=True)
class _Request:
    """A pending request; times are in seconds, and `begin_s` is the start of its service."""

    prompt_ids: list[int]
    n_new: int
    result: Future[Served] = field(default_factory=Future)
    begin_s: float = 0.0
    ready_s: float = 0.0
    found: bool = True
    evicted: list[str] = field(default_factory=list)


class VllmSleep(SystemUnderTest):
    """Keep engines awake while their weights fit the capacity; the LRU one sleeps first.

    Options:
        naive: put all other engines to sleep whenever the model changes (default False).
        max_wait_s: how long busy engines accept new requests while an older request waits for
            their memory (default 1).
        enforce_eager: use no CUDA graphs (default False, which is faster).
        max_model_len, gpu_memory_utilization: options of each engine (defaults 512 and 0.3). As
            many engines start at the same time as their shares of the GPU allow.
        kv_cache_memory_bytes: size of each engine's KV cache (default 2 GiB).
        core_process: let each engine's core run in a process of its own, as vLLM does by default
            (default False, which saves messages between processes at every step).
    """

    batches = True
    option_names = frozenset(
        {"naive", "max_wait_s", "enforce_eager", "max_model_len", "gpu_memory_utilization",
         "kv_cache_memory_bytes", "core_process"}
    )  # fmt: skip
    reads_files_while_serving = True  # an engine that died is started again
    writes_back = True  # level 1 copies the weights to the host

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Return the reason if there is no vLLM, or no CUDA device, which sleep mode needs."""
        if device != "cuda":
            return "vLLM's sleep mode needs a CUDA device; vLLM for the CPU has none"
        return environment.unavailable()

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Start the engines, and put each to sleep as soon as it runs."""
        self.engines: dict[str, EngineClient] = {}
        self._lock = threading.RLock()  # guards the engines; several threads start and end them
        self._changed = threading.Condition()  # guards the order and the requests in it
        # For a model whose memory is being freed: the start, and the models put to sleep so far.
        self._room: dict[str, tuple[float, list[str]]] = {}
        self._woken: set[str] = set()  # by a wake that is not yet counted for a request
        self._is_closed = False
        self.engine_options = {
            "enforce_eager": False,
            "gpu_memory_utilization": 0.3,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **{k: v for k, v in self.options.items() if k not in _OWN},
        }
        self.order = self._make_order(self.capacity_bytes)
        self.vocab_sizes = vocab_sizes(self.models)
        self._logs = Path(tempfile.mkdtemp(prefix="djinn-vllm-"))
        self._prepare()

        def start_one(name: str) -> None:
            progress(f"starting vLLM's engine of {name}")
            self._start_asleep(name)

        n_at_once = int(0.95 / float(str(self.engine_options["gpu_memory_utilization"])))
        with ThreadPoolExecutor(max(1, n_at_once)) as threads:
            list(threads.map(start_one, self.models))
        self._dispatcher = threading.Thread(target=self._dispatch, name="djinn-sleep", daemon=True)
        self._dispatcher.start()

    def _make_order(self, capacity_bytes: int) -> SleepOrder:
        return SleepOrder(
            {name: files.n_bytes for name, files in self.models.items()},
            capacity_bytes,
            bool(self.options.get("naive")),
            float(str(self.options.get("max_wait_s", 1.0))),
        )

    def resize(self, capacity_bytes: int) -> None:
        """Go on with another capacity; all engines sleep.

        Raises:
            CapacityError: a model is larger.
        """
        order = self._make_order(capacity_bytes)
        super().resize(capacity_bytes)
        with self._changed:
            self.order = order

    # -- engines: start, sleep, wake, end --------------------------------------------------------

    def _prepare(self) -> None:
        """Create what all engines share; here nothing."""

    def _start_engine(self, files: ModelFiles) -> EngineClient:
        return EngineClient(
            files.name,
            environment.vllm_python(),
            {**engine_options(files, self.engine_options), "enable_sleep_mode": True},
            self._logs / f"{files.name}-{time.monotonic_ns()}.log",
            {
                "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(bool(self.options.get("core_process")))),
                "VLLM_NO_USAGE_STATS": "1",
            },
        )

    def _sleep(self, engine: EngineClient) -> None:
        engine.call("sleep", 1)

    def _wake(self, engine: EngineClient) -> None:
        engine.call("wake_up")

    def _end_engine(self, name: str, engine: EngineClient) -> None:
        engine.close()

    def _start_asleep(self, name: str) -> None:
        """Start the engine of a model, unless it runs, and put it to sleep."""
        with self._lock:
            running = name in self.engines
        if not running:
            engine = self._start_engine(self.models[name])
            with self._lock:
                self.engines[name] = engine
            self._call(name, self._sleep)

    def _call(self, name: str, method: Callable[[EngineClient], None]) -> None:
        """Call an engine; if it fails, end it. The next request for its model starts it again."""
        try:
            method(self.engines[name])
        except (DjinnError, TimeoutError):  # it is unknown whether it still holds memory
            self._lose(name)
            raise

    def _lose(self, name: str) -> None:
        with self._lock:
            engine = self.engines.pop(name, None)
        if engine:
            self._end_engine(name, engine)

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Serve one request; wake its engine, and put others to sleep if there is no room."""
        return self._queue(model, prompt_ids, max_new_tokens).result()

    def submit(
        self, worker: Executor, model: str, prompt_ids: Sequence[int], max_new_tokens: int
    ) -> Future[Served]:
        """Queue a request; an engine that is awake gets it immediately."""
        return self._queue(model, prompt_ids, max_new_tokens)

    def _queue(self, model: str, prompt_ids: Sequence[int], n_new: int) -> Future[Served]:
        self.known(model)
        ids = check_request(prompt_ids, self.vocab_sizes[model], n_new, self.options)
        request = _Request(ids, n_new)
        with self._changed:
            if self._is_closed:
                raise DjinnError("this system was closed: create a new one")
            self.order.arrive(request, model, time.perf_counter())
            self._changed.notify_all()
        return request.result

    def _dispatch(self) -> None:
        """Carry out the decisions of the order, until closed."""
        while True:
            with self._changed:
                while not self._is_closed:
                    now_s = time.perf_counter()
                    if decision := self.order.next(now_s):
                        break
                    left_s = (self.order.deadline_s() or 0.0) - now_s
                    self._changed.wait(left_s if left_s > 0 else None)
                else:
                    return
            self._carry_out(decision)

    def _carry_out(self, decision: Run | Sleep | Wake) -> None:
        if isinstance(decision, Run):
            for i, waiting in enumerate(decision.requests):
                self._hand_over(decision.model, waiting.key, is_first=i == 0)
            return
        wanted = decision.room_for if isinstance(decision, Sleep) else decision.model
        _, asleep = self._room.setdefault(wanted, (time.perf_counter(), []))
        try:
            if isinstance(decision, Sleep):
                asleep.append(decision.model)
                with suppress(DjinnError, TimeoutError):  # a failed engine has been ended
                    self._call(decision.model, self._sleep)
            else:
                self._start_asleep(wanted)
                self._call(wanted, self._wake)
                self._woken.add(wanted)
        except Exception as error:
            self._fail(wanted, error)

    def _hand_over(self, model: str, request: _Request, is_first: bool) -> None:
        """Send a request to its engine; the first one after a wake has the bytes of the wake."""
        request.ready_s = time.perf_counter()
        request.begin_s, evicted = self._room.get(model, (request.ready_s, []))
        if is_first:
            request.found, request.evicted = model not in self._woken, evicted
            self._woken.discard(model)
        parameters = {"max_tokens": request.n_new, "temperature": 0.0, "ignore_eos": True}
        try:
            pending = self.engines[model].submit(request.prompt_ids, parameters)
        except (DjinnError, KeyError) as error:
            self._ended(model, request, error)
            return
        self._room.pop(model, None)
        pending.add_done_callback(lambda done: self._finish(model, request, done))

    def _finish(self, model: str, request: _Request, done: Future[Result]) -> None:
        try:
            served = self._served(model, request, done.result())
        except BaseException as error:
            self._ended(model, request, error)
            return
        self._note_done(model)
        request.result.set_result(served)

    def _note_done(self, model: str) -> None:
        with self._changed:
            self.order.done(model)
            self._changed.notify_all()

    def _ended(self, model: str, request: _Request, error: BaseException) -> None:
        """Fail a request whose engine failed. The next request for the model starts it again."""
        self._note_done(model)
        threading.Thread(target=self._fail, args=(model, error, request), daemon=True).start()

    def _fail(self, model: str, error: BaseException, request: _Request | None = None) -> None:
        """End an engine, and fail the requests that wait for it."""
        with self._changed:
            left = [waiting.key for waiting in self.order.forget(model)]
            self._room.pop(model, None)
            self._woken.discard(model)
        self._lose(model)
        for one in [*([request] if request else []), *left]:
            one.result.set_exception(error)
        with self._changed:
            self._changed.notify_all()

    def _served(self, model: str, request: _Request, result: Result) -> Served:
        first_s, last_s = (result[name] - request.ready_s for name in ("first_s", "last_s"))
        return self.served(
            model,
            Tokens(tuple(result["token_ids"]), first_s, last_s),
            request.ready_s - request.begin_s,
            time.perf_counter() - request.begin_s,
            found=request.found,
            evicted=request.evicted,
            written_back=request.evicted if self.writes_back else (),
            resident=self.order.awake,
        )

    def reset(self) -> None:
        """Put every engine to sleep; end one that fails to, which frees its memory as well."""
        for name in list(self.order.awake):
            with suppress(DjinnError, TimeoutError, KeyError):
                self._call(name, self._sleep)
            self.order.awake.pop(name, None)

    def close(self) -> None:
        """End all engines; waiting requests fail."""
        if not hasattr(self, "_changed"):
            return
        with self._changed:
            self._is_closed = True
            left = self.order.forget_all() if hasattr(self, "order") else []
            self._changed.notify_all()
        for waiting in left:
            waiting.key.result.set_exception(
                DjinnError("the system was closed before the request was served")
            )
        if hasattr(self, "_dispatcher"):
            self._dispatcher.join()
        engines, self.engines = self.engines, {}
        for engine in engines.values():
            engine.ask_to_end()
        for name, engine in engines.items():
            self._end_engine(name, engine)
        if hasattr(self, "_logs"):
            shutil.rmtree(self._logs, ignore_errors=True)
