"""`vllm_sleep`: one vLLM engine a model, put to sleep and woken as requests demand.

What vLLM itself offers for switching models: `sleep(level=1)` moves an engine's weights to host
memory and drops its KV cache, `wake_up()` brings the weights back. CUDA graphs stay valid.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from djinn_lib.engine.models.checkpoint import folder_config
from djinn_lib.errors import CapacityError, DjinnError
from djinn_lib.systems.base import ModelFiles, Served, SystemUnderTest
from djinn_lib.systems.engine_process import EngineProcess
from djinn_lib.systems.vllm_recreate import (
    build_engine,
    check_request,
    generate_stepwise,
    set_environment,
)

ENGINE = "djinn_lib.systems.vllm_sleep:SleepingEngine"
# For 4,000 tokens of a model without grouped heads. vLLM would take all that it may, and spend time
# on giving it back and taking it again at every switch.
KV_CACHE_BYTES = 2 << 30


class SleepingEngine:
    """What runs in an engine's process."""

    def __init__(self, files: ModelFiles, options: dict[str, Any]) -> None:
        set_environment()
        import vllm

        self.vllm = vllm
        self.llm = build_engine(vllm, files, options, enable_sleep_mode=True)

    def sleep(self) -> None:
        """Move the weights to host memory."""
        self.llm.sleep(level=1)

    def wake_up(self) -> None:
        """Bring the weights back."""
        self.llm.wake_up()

    def generate(self, prompt_ids: Sequence[int], n: int) -> tuple[tuple[int, ...], float, float]:
        """Return the ids, and the clock (s) at the first and at the last of them.

        Linux has one monotonic clock for all processes, so the caller can go on from it.
        """
        return generate_stepwise(self.vllm, self.llm, prompt_ids, n)

    def close(self) -> None:
        """Shut the engine down."""
        self.llm.llm_engine.engine_core.shutdown()


class VllmSleep(SystemUnderTest):
    """Engines stay awake while their weights fit the capacity together; LRU sleeps first.

    Options:
        naive: let every other engine sleep at each change of the model (default False).
        enforce_eager: no CUDA graphs (default False: vLLM at its best).
        max_model_len, gpu_memory_utilization: of each engine (defaults 512 and 0.3). As many
            engines are started at once as their shares of the GPU allow.
        kv_cache_memory_bytes: of each engine (default 2 GiB).
    """

    option_names = frozenset(
        {"naive", "enforce_eager", "max_model_len", "gpu_memory_utilization",
         "kv_cache_memory_bytes"}
    )  # fmt: skip
    reads_files_while_serving = True  # an engine that died is started anew

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Sleep mode needs CUDA's virtual memory."""
        if device != "cuda":
            return "vLLM's sleep mode needs a CUDA device; vLLM for the CPU has none"
        return None if find_spec("vllm") else "vLLM is not installed: pip install vllm==0.24.0"

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Start the engines, and let each sleep as soon as it runs."""
        self.engines: dict[str, EngineProcess] = {}
        self.awake: OrderedDict[str, None] = OrderedDict()
        self.vocab_sizes: dict[str, int] = {}
        self.engine_options = {
            "enforce_eager": False,
            "gpu_memory_utilization": 0.3,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **{name: value for name, value in self.options.items() if name != "naive"},
        }
        for name, files in self.models.items():
            if files.n_bytes > self.capacity_bytes:
                raise CapacityError(
                    f"expected models of at most {self.capacity_bytes} bytes, got {name!r} with "
                    f"{files.n_bytes}: raise the capacity"
                )
            self.vocab_sizes[name] = folder_config(files.folder).get_text_config().vocab_size

        def start_one(name: str) -> None:
            progress(f"starting vLLM's engine of {name}")
            self._start_asleep(name)

        n_at_once = int(0.95 / float(self.engine_options["gpu_memory_utilization"]))
        with ThreadPoolExecutor(max(1, n_at_once)) as threads:
            list(threads.map(start_one, self.models))

    def _start_asleep(self, name: str) -> None:
        """Start the engine of a model, unless it runs, and let it sleep."""
        if name not in self.engines:
            self.engines[name] = EngineProcess(ENGINE, self.models[name], self.engine_options)
            self._call(name, "sleep")

    def _call(self, name: str, method: str, *arguments: Any) -> Any:
        """Call an engine; one that fails is ended, and starts anew when it is asked for again."""
        try:
            return self.engines[name].call(method, *arguments)
        except (DjinnError, TimeoutError):  # whether it still holds memory, nobody knows
            self.awake.pop(name, None)
            self.engines.pop(name).close()
            raise

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Wake the model's engine, letting others sleep where the capacity demands it."""
        files = self.known(model)
        ids = check_request(prompt_ids, self.vocab_sizes[model], max_new_tokens, self.options)
        begin_s = time.perf_counter()
        was_awake = model in self.awake
        evicted_bytes = 0 if was_awake else self._make_room(files)
        if not was_awake:
            self._start_asleep(model)
            self._call(model, "wake_up")
        self.awake[model] = None
        self.awake.move_to_end(model)
        switched_s = time.perf_counter()
        token_ids, first_s, last_s = self._call(model, "generate", ids, max_new_tokens)
        return Served(
            token_ids,
            switch_ms=(switched_s - begin_s) * 1e3,
            ttft_ms=(first_s - begin_s) * 1e3,
            decode_ms=(last_s - first_s) * 1e3,
            total_ms=(time.perf_counter() - begin_s) * 1e3,
            loaded_bytes=0 if was_awake else files.n_bytes,
            evicted_bytes=evicted_bytes,
            writeback_bytes=evicted_bytes,  # level 1 copies the weights to the host
            resident_before_bytes=files.n_bytes if was_awake else 0,
            resident_bytes={
                name: f.n_bytes if name in self.awake else 0 for name, f in self.models.items()
            },
        )

    def _make_room(self, files: ModelFiles) -> int:
        """Let engines sleep, least recently used first, until the model fits; returns bytes."""
        evicted_bytes = 0
        while self.awake and (self.options.get("naive") or not self._fits(files)):
            victim = next(iter(self.awake))
            self._call(victim, "sleep")
            del self.awake[victim]
            evicted_bytes += self.models[victim].n_bytes
        return evicted_bytes

    def _fits(self, files: ModelFiles) -> bool:
        awake_bytes = sum(self.models[name].n_bytes for name in self.awake)
        return awake_bytes + files.n_bytes <= self.capacity_bytes

    def reset(self) -> None:
        """Let every engine sleep; one that cannot is ended, which takes its weights off as well."""
        for name in list(self.awake):
            with suppress(DjinnError, TimeoutError):
                self._call(name, "sleep")
            self.awake.pop(name, None)

    def close(self) -> None:
        """End all engines."""
        engines = list(getattr(self, "engines", {}).values())
        for engine in engines:
            engine.ask_to_end()
        for engine in engines:
            engine.close()
        self.engines = {}
