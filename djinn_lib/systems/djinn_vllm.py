"""Provide the system `djinn_vllm`: vLLM's engines on one ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from djinn_lib.engine.serving.generation import Generation
from djinn_lib.errors import DjinnError
from djinn_lib.fleet import environment
from djinn_lib.fleet.fleet import Fleet
from djinn_lib.systems.base import Served, SystemUnderTest, columns_as_dict, served_later
from djinn_lib.systems.vllm_recreate import MAX_MODEL_LEN

_OF_RING = ("page", "policy", "eviction", "quantum_s", "max_wait_s")


class DjinnVllm(SystemUnderTest):
    """Run one vLLM engine for each model, with all weights on one ring.

    Options:
        page: size of a page, e.g. "1MiB".
        policy, eviction: which model loses pages, and how many (defaults "lru" and "pages").
        quantum_s, max_wait_s: minimum duration of a lease, and maximum wait for one.
        enforce_eager: use no CUDA graphs (default False, but True on the CPU).
        max_model_len: tokens of prompt and answer together (default 512).
        kv_cache_memory_bytes: size of each engine's KV cache.
    """

    batches = True
    option_names = frozenset({*_OF_RING, "enforce_eager", "max_model_len", "kv_cache_memory_bytes"})

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Return the reason if vLLM is not installed here."""
        return environment.unavailable()

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Create the ring and start every engine."""
        of_ring: Any = {name: self.options[name] for name in _OF_RING if name in self.options}
        self.fleet = Fleet(self.capacity_bytes, self.device, progress=progress, **of_ring)
        of_engines: Any = {k: v for k, v in self.options.items() if k not in _OF_RING}

        def add(name: str) -> None:
            files = self.models[name]
            options = {
                "load_format": "safetensors",
                "skip_tokenizer_init": True,
                "dtype": files.dtype,
                "enable_prefix_caching": False,
                "max_model_len": MAX_MODEL_LEN,
                **of_engines,
            }
            self.fleet.add(name, files.folder, **options)

        with ThreadPoolExecutor(len(self.models) if self.device.type == "cuda" else 2) as threads:
            list(threads.map(add, self.models))

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Serve one request."""
        self.known(model)
        begin_s = self.clock_s()
        g = self.fleet.generate(model, list(prompt_ids), max_new_tokens, ignore_eos=True)
        return self._served(g, (self.clock_s() - begin_s) * 1e3, g.ttft_ms)

    def submit(
        self, worker: Executor, model: str, prompt_ids: Sequence[int], max_new_tokens: int
    ) -> Future[Served]:
        """Send a request to its engine immediately; vLLM batches it."""
        self.known(model)
        asked = self.fleet.submit(model, list(prompt_ids), max_new_tokens, ignore_eos=True)
        return served_later(asked, self._served)

    def _served(self, g: Generation, total_ms: float, ttft_ms: float) -> Served:
        served = Served.generated(g, total_ms, ttft_ms, self.fleet.status().resident_bytes())
        return replace(served, switch_ms=min(g.switch_ms, ttft_ms))

    def device_bytes(self) -> dict[str, int]:
        """Return the bytes of each model's weights, in whole pages."""
        return columns_as_dict(self.fleet.residency(), "bytes")

    def reset(self) -> None:
        """Evict all pages."""
        for name in self.models:
            self.fleet.evict(name)

    def close(self) -> None:
        """Check that the ring's broker is still running, then end everything."""
        fleet = getattr(self, "fleet", None)
        if fleet and not fleet.closed:
            try:
                fleet.status()
            except DjinnError:
                fleet.close()
                raise
            fleet.close()
