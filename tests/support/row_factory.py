"""Synthetic rows that look like a run's: small caches are played through the paper's sequence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

MIB = 1 << 20
SEQUENCE = "mllpppllmmlmlplmlmmlpmppmpllll"
NAMES = {"l": "smollm2-135m", "m": "mistral-mini", "p": "phi-mini"}
SIZES = {"smollm2-135m": 516 * MIB, "mistral-mini": 554 * MIB, "phi-mini": 214 * MIB}
TOTAL_BYTES = sum(SIZES.values())
CAPACITIES = {label: round(TOTAL_BYTES * int(label) / 31.3) for label in ("20", "25", "32", "40")}
LINK_BYTES_PER_MS = 4e6

# System: kind of cache, milliseconds that every request costs besides, share of requests to fail
SYSTEMS = {
    "djinn": ("partial", 0.0, 0.0),
    "djinn_partial_no_overlap": ("partial", 12.0, 0.0),
    "djinn_whole_overlap": ("whole", 0.0, 0.0),
    "djinn_whole": ("whole", 15.0, 0.0),
    "pytorch_lru": ("whole", 20.0, 0.0),
    "pytorch_pinned_readonly": ("none", 30.0, 0.0),
    "pytorch_pinned": ("none", 40.0, 0.0),
    "pytorch_pageable": ("none", 180.0, 0.0),
    "serverless_warm": ("none", 900.0, 0.0),
    "serverless_cold": ("none", 1500.0, 0.0),
    "ray_actors": ("whole", 2500.0, 0.0),
    "vllm_recreate": ("none", 6000.0, 0.27),
}
GPU_SYSTEMS = {  # what a run on a GPU has beside them
    "djinn_compiled": ("partial", 1.0, 0.0),
    "djinn_graph": ("partial", 2.0, 0.0),
    "djinn_eager": ("partial", 6.0, 0.0),
    "vllm_sleep": ("whole", 300.0, 0.0),
    "vllm_sleep_naive": ("none", 300.0, 0.0),
}
UNAVAILABLE = {"vllm_sleep": "sleep mode needs CUDA, and this machine has no GPU"}


class Cache:
    """Which bytes of which model are resident; `kind` is "partial", "whole" or "none"."""

    def __init__(self, kind: str, capacity_bytes: int) -> None:
        self.kind, self.capacity_bytes = kind, capacity_bytes
        self.resident: dict[str, int] = {}  # least recently used first

    def use(self, model: str) -> tuple[int, int, int]:
        """Bring a model in; returns bytes loaded, evicted and resident before."""
        before = self.resident.pop(model, 0) if self.kind != "none" else 0
        evicted = 0
        over = sum(self.resident.values()) + SIZES[model] - self.capacity_bytes
        for victim in list(self.resident):
            if over <= 0 and self.kind != "none":
                break
            gone = min(over, self.resident[victim]) if self.kind == "partial" else None
            gone = self.resident[victim] if gone is None else gone
            self.resident[victim] -= gone
            evicted, over = evicted + gone, over - gone
            if not self.resident[victim]:
                del self.resident[victim]
        self.resident[model] = SIZES[model]
        return SIZES[model] - before, evicted, before


def cell_rows(
    system: str,
    capacity_label: str = "25",
    trace: str = "paper",
    repeats: int = 1,
    gpu: bool = False,
) -> pd.DataFrame:
    """Return the rows of one cell; `gpu` says whether the machine has one."""
    return pd.DataFrame(_cell(system, capacity_label, trace, repeats, gpu))


def run_rows(gpu: bool = False) -> pd.DataFrame:
    """Return the rows of a whole run: every system at "25", three systems at every capacity."""
    more = GPU_SYSTEMS if gpu else UNAVAILABLE
    cells = [cell_rows(system, gpu=gpu) for system in [*SYSTEMS, *more]]
    for label in ("20", "32", "40"):
        cells += [cell_rows(s, label) for s in ("djinn", "pytorch_lru", "pytorch_pinned")]
    return pd.concat(cells, ignore_index=True)


def _cell(system: str, label: str, trace: str, repeats: int, gpu: bool) -> Iterator[dict[str, Any]]:
    known = {**SYSTEMS, **GPU_SYSTEMS}
    kind, extra_ms, failing = known.get(system, ("none", 0.0, 0.0))
    rng = np.random.default_rng(len(system) + int(label))
    for repeat in range(repeats):
        cache, at_s = Cache(kind, CAPACITIES[label]), 0.0
        for request, letter in enumerate(SEQUENCE):
            model, noise = NAMES[letter], rng.lognormal(0, 0.06)
            keys = {
                "run_id": f"{trace}-{label}-{system}-test",
                "system": system,
                "mode": "sequential",
                "start": "cold",
                "capacity_bytes": CAPACITIES[label],
                "capacity_label": label,
                "trace": trace,
                "repeat": repeat,
                "request": request,
                "model": model,
                "arrival_s": 2.0 * request,
                "start_s": at_s,
            }
            if system in UNAVAILABLE and not gpu:
                yield {**keys, **_failed("unavailable", UNAVAILABLE[system])}
            elif request < round(failing * len(SEQUENCE)):
                yield {**keys, **_failed("oom", "out of memory")}
            else:
                row = {**keys, **_served(cache, model, extra_ms, noise, system)}
                at_s += row["total_ms"] / 1e3
                yield row


def _served(cache: Cache, model: str, extra_ms: float, noise: float, system: str) -> dict[str, Any]:
    loaded, evicted, before = cache.use(model)
    writeback = loaded if system in ("pytorch_pinned", "pytorch_pageable") else 0
    switch_ms = ((loaded + writeback) / LINK_BYTES_PER_MS + (extra_ms if loaded else 0.4)) * noise
    prefill_ms, decode_ms = SIZES[model] / 8e6 * noise, SIZES[model] / 2.4e6 * noise
    return {
        "queue_ms": 0.0,
        "loaded_bytes": loaded,
        "evicted_bytes": evicted,
        "writeback_bytes": writeback,
        "resident_before_bytes": before,
        "switch_ms": switch_ms,
        "ttft_ms": switch_ms + prefill_ms,
        "decode_ms": decode_ms,
        "total_ms": switch_ms + prefill_ms + decode_ms,
        "n_tokens": 6,
        "token_sha": f"{model:0<16}"[:16],
        "ok": True,
        "error_kind": "",
        "error": "",
        "note": "",
        "resident_bytes": json.dumps({} if cache.kind == "none" else cache.resident),
    }


def _failed(kind: str, error: str) -> dict[str, Any]:
    counts = ("loaded", "evicted", "writeback", "resident_before")
    times = ("queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms")
    return {
        **{f"{name}_bytes": 0 for name in counts},
        **{name: float("nan") for name in times},
        "n_tokens": 0,
        "token_sha": "",
        "ok": False,
        "error_kind": kind,
        "error": error,
        "note": "",
        "resident_bytes": "{}",
    }
