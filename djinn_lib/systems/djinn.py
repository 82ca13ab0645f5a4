"""`djinn`: the ring. Lease, load what is missing behind the prefill, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from djinn_lib.engine.djinn import Djinn
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.systems.base import Served, SystemUnderTest, columns_as_dict, served_later


class DjinnRing(SystemUnderTest):
    """Page-granular residency; evicts without writing back.

    Options:
        eviction: "pages" (default) or "models": how much a victim loses.
        overlap: compute while later layers load (default True).
        page: size of a page, e.g. "1MiB".
        policy: who loses pages (default "lru").
        decode: "eager", "graph" or "compiled" (default: the fastest that the device has).
        max_model_len: room for a prompt and its continuation, in tokens.
        order, max_overtaken, lookahead: of requests that wait for others.
        embeddings: "host" (default) or "ring": where lookup tables are.
        host_capacity, swap_dir: keep master copies on disk behind as much host memory.
        masters: "plain" (default), "compressed" or "auto": whether master copies are compressed.
    """

    option_names = frozenset(
        {"eviction", "overlap", "page", "policy", "decode", "max_model_len", "order",
         "max_overtaken", "lookahead", "embeddings", "host_capacity", "swap_dir", "masters"}
    )  # fmt: skip

    def start(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Create the frames and read every model into its master copy in the host."""
        options: Any = {**self.options, "progress": progress}
        self.djinn = Djinn(self.capacity_bytes, self.device, **options)
        for name, files in self.models.items():
            progress(f"reading {name} into host memory")
            self.djinn.add(name, files.folder, dtype=files.dtype)

    def serve(self, model: str, prompt_ids: Sequence[int], max_new_tokens: int) -> Served:
        """Serve one request through a lease."""
        begin_s = self.clock_s()
        g = self.djinn.generate(model, prompt_ids, max_new_tokens, ignore_eos=True)
        return self._served(g, (self.clock_s() - begin_s) * 1e3, g.ttft_ms - g.queue_ms)

    def submit(
        self, worker: Executor, model: str, prompt_ids: Sequence[int], max_new_tokens: int
    ) -> Future[Served]:
        """Queue a request in `Djinn`, which chooses the order and loads ahead."""
        pending = self.djinn.submit(model, prompt_ids, max_new_tokens, ignore_eos=True)
        return served_later(pending, self._served)

    def _served(self, g: Generation, total_ms: float, ttft_ms: float) -> Served:
        resident_bytes = columns_as_dict(self.djinn.residency(), "resident_bytes")
        return Served.generated(g, total_ms, ttft_ms, resident_bytes)

    def device_bytes(self) -> dict[str, int]:
        """All weights, but for lookup tables that stay in the host."""
        return columns_as_dict(self.djinn.residency(), "bytes")

    def decoding(self) -> dict[str, dict[str, Any]]:
        """How the engine decodes with each model."""
        distances = self.djinn.logits_distances
        return {name: {"mode": mode, "logits_distance": distances[name]}
                for name, mode in self.djinn.decode_modes.items()}  # fmt: skip

    def reset(self) -> None:
        """Evict everything, and forget what the policy learnt."""
        self.djinn.reset()

    def close(self) -> None:
        """Audit the ring, then release everything."""
        if hasattr(self, "djinn"):
            try:
                if not self.djinn.closed:
                    self.djinn.check()
            finally:
                self.djinn.close()
