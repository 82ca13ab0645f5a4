"""Provide the system `vllm_sleep`: vLLM engines that sleep and wake.

This is vLLM's own way to switch models. `sleep(level=1)` moves an engine's weights to host memory
and drops its KV cache; `wake_up()` moves the weights back. CUDA graphs stay valid.

If a request's engine is awake, the request is sent to it immediately, and vLLM batches it. For
other requests, engines finish, sleep and wake in the order of `SleepOrder`.
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

from djinn_lib.engine.models.checkpoint import folder_config
from djinn_lib.errors import DjinnError
from djinn_lib.fleet import environment
from djinn_lib.fleet.engines import EngineClient, Result
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest
from djinn_lib.systems.sleep_order import Run, Sleep, SleepOrder, Wake
from djinn_lib.systems.vllm_recreate import check_request, engine_options

# Room for 4,000 tokens of a model without grouped heads. By default vLLM allocates all memory that
# it may, and would spend time on freeing and allocating it at every switch.
KV_CACHE_BYTES = 2 << 30


@dataclass(slots=True)
class _Request:
    """A pending request; times are in seconds, and `begin_s` is the start of its service."""

    prompt_ids: list[int]
    n_new: int
    result: Future[Served] = field(default_factory=Future)
    begin_s: float | None = None
    ready_s: float = 0.0
    loaded_bytes: int = 0
    evicted_bytes: int = 0


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
    """

    batches = True
    option_names = frozenset(
        {"naive", "max_wait_s", "enforce_eager", "max_model_len", "gpu_memory_utilization",
         "kv_cache_memory_bytes"}
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
        # For a model whose memory is being freed: the start, and the bytes put to sleep so far.
        self._room: dict[str, tuple[float, int]] = {}
        self._woken_bytes: dict[str, int] = {}  # loaded by a wake, not yet counted for a request
        self._is_closed = False
        self.engine_options = {
            "enforce_eager": False,
            "gpu_memory_utilization": 0.3,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **{k: v for k, v in self.options.items() if k not in ("naive", "max_wait_s")},
        }
        self.order = SleepOrder(
            {name: files.n_bytes for name, files in self.models.items()},
            self.capacity_bytes,
            bool(self.options.get("naive")),
            float(str(self.options.get("max_wait_s", 1.0))),
        )
        self.vocab_sizes = {
            name: folder_config(files.folder).get_text_config().vocab_size
            for name, files in self.models.items()
        }
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

    # -- engines: start, sleep, wake, end --------------------------------------------------------

    def _prepare(self) -> None:
        """Create what all engines share; here nothing."""

    def _start_engine(self, files: ModelFiles) -> EngineClient:
        return EngineClient(
            files.name,
            environment.vllm_python(),
            {**engine_options(files, self.engine_options), "enable_sleep_mode": True},
            self._logs / f"{files.name}-{time.monotonic_ns()}.log",
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
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

    # -- requests ---------------------------------------------------------------------------------

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
                    deadline_s = self.order.deadline_s()
                    self._changed.wait(
                        None if deadline_s is None or deadline_s <= now_s else deadline_s - now_s
                    )
                else:
                    return
            self._carry_out(decision)

    def _carry_out(self, decision: Run | Sleep | Wake) -> None:
        if isinstance(decision, Run):
            for i, waiting in enumerate(decision.requests):
                self._hand_over(decision.model, waiting.key, is_first=i == 0)
            return
        wanted = decision.room_for if isinstance(decision, Sleep) else decision.model
        self._room.setdefault(wanted, (time.perf_counter(), 0))
        try:
            if isinstance(decision, Sleep):
                begin_s, n_bytes = self._room[wanted]
                self._room[wanted] = begin_s, n_bytes + self.models[decision.model].n_bytes
                with suppress(DjinnError, TimeoutError):  # a failed engine has been ended
                    self._call(decision.model, self._sleep)
            else:
                self._start_asleep(wanted)
                self._call(wanted, self._wake)
                self._woken_bytes[wanted] = self.models[wanted].n_bytes
        except Exception as error:
            self._fail(wanted, error)

    def _hand_over(self, model: str, request: _Request, is_first: bool) -> None:
        """Send a request to its engine; the first one after a wake has the bytes of the wake."""
        request.ready_s = time.perf_counter()
        request.begin_s, evicted_bytes = self._room.get(model, (request.ready_s, 0))
        if is_first:
            request.loaded_bytes = self._woken_bytes.pop(model, 0)
            request.evicted_bytes = evicted_bytes
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
            self._woken_bytes.pop(model, None)
        self._lose(model)
        for one in [*([request] if request else []), *left]:
            one.result.set_exception(error)
        with self._changed:
            self._changed.notify_all()

    def _served(self, model: str, request: _Request, result: Result) -> Served:
        begin_s = request.begin_s or request.ready_s
        return Served(
            tuple(result["token_ids"]),
            switch_ms=(request.ready_s - begin_s) * 1e3,
            ttft_ms=(result["first_s"] - begin_s) * 1e3,
            decode_ms=(result["last_s"] - result["first_s"]) * 1e3,
            total_ms=(time.perf_counter() - begin_s) * 1e3,
            loaded_bytes=request.loaded_bytes,
            evicted_bytes=request.evicted_bytes,
            writeback_bytes=request.evicted_bytes if self.writes_back else 0,
            resident_before_bytes=0 if request.loaded_bytes else self.models[model].n_bytes,
            resident_bytes={
                name: files.n_bytes if name in self.order.awake else 0
                for name, files in self.models.items()
            },
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
