"""Define the cases of `engine.py`: the requests to the engine, and the measurements."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from djinn_lib.engine.djinn import Djinn
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.serving.generation import Generation

MISS_TOKENS = 4  # of a request that measures the first token
MEASURES = ("switch_ms", "stall_ms", "ttft_ms", "decode_ms", "total_ms")


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


class Cases:
    """Send the requests of all cases to one engine.

    Args:
        djinn: engine with all models added.
        prompts: token ids of one prompt for each model; the keys are the models.
        new_tokens: number of new tokens of a hit.
        repeats: number of repeats of each case.
    """

    def __init__(
        self, djinn: Djinn, prompts: dict[str, list[int]], new_tokens: int, repeats: int
    ) -> None:
        self.djinn, self.prompts = djinn, prompts
        self.new_tokens, self.repeats = new_tokens, repeats
        self.tokens: dict[str, tuple[int, ...]] = {}  # from the first way of decoding

    def request(self, model: str, new_tokens: int | None = None) -> Generation:
        """Send one greedy request."""
        n = new_tokens or self.new_tokens
        return self.djinn.generate(model, self.prompts[model], n, ignore_eos=True)

    def empty(self) -> None:
        """Evict all models."""
        for model in self.prompts:
            self.djinn.evict(model)

    def hit(self, model: str, decode: str) -> dict[str, Any]:
        """Measure requests to a resident model."""
        tokens = self.request(model).token_ids  # loads the model and warms up
        row = summary("hit", model, decode, [self.request(model) for _ in range(self.repeats)])
        first = self.tokens.setdefault(model, tokens)
        alike = [a == b for a, b in zip(first, tokens, strict=True)]
        return row | {"tokens_like_first_way": [*alike, False].index(False)}

    def misses(self, model: str, decode: str) -> Iterator[dict[str, Any]]:
        """Measure full misses: with overlap of prefill and copy, without, and the load alone."""
        for overlap in (True, False):
            self.djinn.overlap = overlap
            done = [
                (self.empty(), self.request(model, MISS_TOKENS))[1] for _ in range(self.repeats)
            ]
            yield summary(f"full miss, overlap {'on' if overlap else 'off'}", model, decode, done)
        self.djinn.overlap = True
        loads_ms = [self.load_ms(model) for _ in range(self.repeats)]
        n_bytes = self.djinn.masters.layout(model).paged_bytes
        yield {"case": "load", "model": model, "loaded_bytes": n_bytes} | spread(
            "load_ms", loads_ms
        )

    def pairs(self, decode: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Measure partial misses: each model after each other one, which evicted part of it."""
        for before, after in permutations(self.prompts, 2):
            done = []
            for _ in range(self.repeats):
                self.request(after, MISS_TOKENS), self.request(before, MISS_TOKENS)
                done.append(self.request(after, MISS_TOKENS))
            yield summary(f"after {before}", after, decode[after], done)

    def load_ms(self, model: str) -> float:
        """Return the milliseconds to load all weights, with nothing resident before."""
        self.empty()
        begin_s = time.perf_counter()
        with self.djinn.lease(model):
            self.djinn.wait(model)
            return (time.perf_counter() - begin_s) * 1e3

    def copied_bytes(self) -> dict[str, int]:
        """Count the bytes that the copy engines move in switches between all models.

        The driver's profiler counts them. `requested` is the number that the page tables predict.
        """
        self.empty()
        requested = 0
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for model in [m for pair in permutations(self.prompts, 2) for m in pair]:
                resident_bytes = self.djinn.residency().set_index("model").resident_bytes[model]
                with self.djinn.lease(model):
                    self.djinn.wait(model)
                requested += self.djinn.masters.layout(model).paged_bytes - int(resident_bytes)
            self.empty()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        copies = [e for e in events if e.get("cat") == "gpu_memcpy"]
        return {
            "requested": requested,
            "h2d": sum(e["args"]["bytes"] for e in copies if "HtoD" in e["name"]),
            "d2h": sum(e["args"]["bytes"] for e in copies if "DtoH" in e["name"]),
        }


def page_curve(
    masters: Masters,
    models: Sequence[str],
    capacity_bytes: int,
    pages_bytes: Sequence[int],
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """Measure switches between two models with several page sizes.

    Args:
        masters: master copies of the models.
        models: names of the two models.
        capacity_bytes: capacity of the ring, which must hold each of them.
        pages_bytes: page sizes to measure.
        device: device of the ring.
        repeats: number of repeats of every switch.
    """
    return [
        _page_row(masters, models, capacity_bytes, page_bytes, device, repeats)
        for page_bytes in pages_bytes
    ]


def _page_row(
    masters: Masters,
    models: Sequence[str],
    capacity_bytes: int,
    page_bytes: int,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    pager = Pager(masters, capacity_bytes, page_bytes, device)
    for model in models:
        pager.add(model, masters.layout(model).paged_bytes)

    def switch(model: str) -> tuple[float, float, int]:
        begin_s = time.perf_counter()
        with pager.lease(model) as lease:
            pager.block_until_loaded(model)
            return time.perf_counter() - begin_s, lease.stats.plan_s, lease.stats.loaded_bytes

    full, partial = [], []
    for model in models:
        switch(model)
    for _ in range(repeats):
        partial.extend(switch(model) for model in models)
    for _ in range(repeats):
        for model in models:
            pager.evict(model)
        full.append(switch(models[0]))
    pager.close()
    return {
        "page_bytes": page_bytes,
        "full_loaded_bytes": full[0][2],
        **spread("full_ms", [s * 1e3 for s, _, _ in full]),
        **spread("full_plan_ms", [p * 1e3 for _, p, _ in full]),
        "partial_loaded_bytes": statistics.mean(b for _, _, b in partial),
        **spread("partial_ms", [s * 1e3 for s, _, _ in partial]),
        **spread("partial_plan_ms", [p * 1e3 for _, p, _ in partial]),
    }


def summary(case: str, model: str, decode: str, done: list[Generation]) -> dict[str, Any]:
    """Return medians, minima and maxima of the measures of a case's requests."""
    n_steps = max(1, len(done[0].token_ids) - 1)
    result: dict[str, Any] = {
        "case": case,
        "model": model,
        "decode": decode,
        "n": len(done),
        "new_tokens": len(done[0].token_ids),
        "loaded_bytes": done[-1].loaded_bytes,
        "evicted_bytes": done[-1].evicted_bytes,
    }
    for measure in MEASURES:
        result |= spread(measure, [getattr(g, measure) for g in done])
    return result | spread("ms_per_token", [g.decode_ms / n_steps for g in done])


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Return the median as `name`, with the minimum and the maximum."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
