"""Simulate the ring with an analytic clock: any models, traffic and link.

The ring and the policies are the code that serves on a GPU; only time comes from a `CostModel`.
Rows have the schema of measured rows, so every figure and metric works on them.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from djinn_lib.engine.memory.policies import Oracle, Policy, make_policy
from djinn_lib.engine.memory.ring import Eviction, Ring
from djinn_lib.errors import ConfigError
from djinn_lib.rows import COLUMNS, token_sha
from djinn_lib.simulator.cost_model import CostModel
from djinn_lib.simulator.optimal import models_of, pages_of
from djinn_lib.trace import Trace
from djinn_lib.units import parse_bytes

Mode = Literal["sequential", "concurrent"]
PAGE_BYTES = 64 << 20
MAX_FRAMES = 10_000_000
DEPTH = 4  # requests to prefetch for, as `lookahead.DEPTH`
RESIDENCY_UP_TO = 200_000  # requests times models; larger traces omit each model's residency

_FLOATS = ("arrival_s", "start_s", "queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms")
_INTS = ("loaded_bytes", "evicted_bytes", "resident_before_bytes")


def simulate(
    trace: Trace | Sequence[str],
    sizes: Mapping[str, int],
    capacity: int | str,
    policy: str | Policy = "lru",
    bandwidth: float = 54e9,
    *,
    page_bytes: int = PAGE_BYTES,
    eviction: Eviction = "pages",
    costs: CostModel | None = None,
    mode: Mode = "sequential",
    lookahead: bool = False,
    system: str = "djinn",
    capacity_label: str | None = None,
) -> pd.DataFrame:
    """Serve a trace by the ring and return a row per request.

    Args:
        trace: the requests, or only their models, in order.
        sizes: bytes of each model.
        capacity: of the ring, in bytes or as text ("25GiB").
        policy: chooses the pages to evict: a name, "oracle" (knows the whole trace), or a `Policy`.
        bandwidth: bytes per second of the link, if `costs` is not given.
        page_bytes: size of a page and a frame.
        eviction: "pages" or "models", see `Ring`.
        costs: times of link, prefill and decode; default is the link alone.
        mode: "sequential" starts a request when the previous one is done. "concurrent" lets
            requests arrive at the trace's times and wait in a FIFO queue for the one GPU.
        lookahead: in mode "concurrent", prefetch for waiting requests while one computes, as
            `Djinn` does: what the link can load in that time, without evicting the running model or
            models that come sooner. `loaded_bytes` include prefetched bytes, `switch_ms` does not.
        system: label of the rows.
        capacity_label: of the rows; default is the capacity in GiB.

    Returns:
        Rows in the schema of `djinn_lib.rows`. If requests times models exceed `RESIDENCY_UP_TO`,
        they omit the resident bytes of each model.

    Raises:
        TraceError: the trace is empty or requests a model without a size.
        CapacityError: a model alone is larger than the ring.
        ConfigError: a size, rate or option is invalid.
    """
    models, capacity_bytes = models_of(trace), parse_bytes(capacity)
    arrivals_s = [r.arrival_s for r in trace.requests] if isinstance(trace, Trace) else None
    if mode not in ("sequential", "concurrent"):
        raise ConfigError(f"expected mode 'sequential' or 'concurrent', got {mode!r}")
    if costs is None:
        costs = CostModel(link_bytes_per_s=bandwidth)
    chooser = Oracle(models) if policy == "oracle" else make_policy(policy)
    memory = _Memory(sizes, models, capacity_bytes, page_bytes, eviction, chooser)
    if lookahead and mode != "concurrent":
        raise ConfigError(
            "lookahead needs mode 'concurrent', got 'sequential', in which no request waits"
        )
    served = _serve(memory, models, arrivals_s or [0.0] * len(models), costs, mode, lookahead)
    label = capacity_label or f"{capacity_bytes / 2**30:g}"
    return _frame(served, models, trace, costs, mode, system, capacity_bytes, label)


@dataclass(slots=True)
class _Step:
    """The effect of a request on the ring, in bytes."""

    resident_before: int
    loaded: int
    evicted: int
    ahead: int = 0  # loaded bytes that were prefetched before the request's turn


class _Memory:
    """The ring, its policy and the sizes of models."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        models: Sequence[str],
        capacity_bytes: int,
        page_bytes: int,
        eviction: Eviction,
        policy: Policy,
    ) -> None:
        n_pages = pages_of(models, sizes, capacity_bytes, page_bytes)
        n_frames = capacity_bytes // page_bytes
        if n_frames > MAX_FRAMES:
            raise ConfigError(
                f"expected at most {MAX_FRAMES} frames, got {n_frames}: choose larger pages"
            )
        self.sizes = {model: int(sizes[model]) for model in n_pages}
        self.page_bytes, self.policy = page_bytes, policy
        self.ring = Ring(n_frames, eviction)
        self._ahead: dict[str, tuple[int, int]] = {}  # per model: bytes prefetched, and evicted for
        for model, n in n_pages.items():
            self.ring.add(model, n)
            policy.admit(model, n, n_frames)

    def request(self, model: str, now_s: float) -> _Step:
        """Make a model resident, as the pager does."""
        before, n_bytes = self._resident_bytes(model), self.sizes[model]
        ahead, evicted = self._ahead.pop(model, (0, 0))
        if before < n_bytes:
            evicted += self._load(model, self.ring.n_missing(model))
        self.policy.touch(model, now_s)
        return _Step(max(0, before - ahead), n_bytes - before + ahead, evicted, ahead)

    def load_ahead(self, model: str, waiting: Sequence[str], n_bytes: int) -> None:
        """Prefetch up to `n_bytes` of the waiting models while `model` computes."""
        self.ring.lease(model)
        names = list(dict.fromkeys(waiting[:DEPTH]))
        for i, name in enumerate(names):
            spare = frozenset(names[:i])
            n_pages = min(self.ring.n_loadable(name, spare), n_bytes // self.page_bytes)
            if n_pages:
                before = self._resident_bytes(name)
                evicted = self._load(name, n_pages, spare)
                loaded = self._resident_bytes(name) - before
                ahead, for_it = self._ahead.get(name, (0, 0))
                self._ahead[name] = (ahead + loaded, for_it + evicted)
                n_bytes -= loaded
        self.ring.release(model)

    def _load(self, model: str, n_pages: int, spare: frozenset[str] = frozenset()) -> int:
        evicted = 0
        for extent in self.ring.make_room(model, self.policy, n_pages, spare):
            begin = extent.first_page * self.page_bytes
            end = begin + len(extent.frames) * self.page_bytes
            evicted += min(end, self.sizes[extent.model]) - begin
        self.ring.map_missing(model, n_pages)
        return evicted

    def _resident_bytes(self, model: str) -> int:
        return min(self.ring.n_resident(model) * self.page_bytes, self.sizes[model])

    def residency(self) -> dict[str, int]:
        """Return the resident bytes of each model."""
        return {model: self._resident_bytes(model) for model in self.sizes}


class _Served:
    """Columns with a value per row, at 8 bytes a value."""

    def __init__(self, with_residency: bool) -> None:
        self.floats = {name: array("d") for name in _FLOATS}
        self.ints = {name: array("q") for name in _INTS}
        self.residency: list[str] | None = [] if with_residency else None


def _serve(
    memory: _Memory,
    models: Sequence[str],
    arrivals_s: Sequence[float],
    costs: CostModel,
    mode: Mode,
    lookahead: bool,
) -> _Served:
    served = _Served(len(models) * len(memory.sizes) <= RESIDENCY_UP_TO)
    floats, ints = served.floats, served.ints
    prefills_s = {m: costs.prefill_of(m, n) for m, n in memory.sizes.items()}
    decodes_s = {m: costs.decode_of(m, n) for m, n in memory.sizes.items()}
    free_at_s = 0.0
    queue = _Queue(models, arrivals_s) if mode == "concurrent" else None
    for model, arrival_s in zip(models, arrivals_s, strict=True):
        # FIFO: the GPU is free, and the request has arrived.
        start_s = free_at_s if queue is None else max(free_at_s, arrival_s)
        waiting = [] if queue is None else queue.after_next(start_s)
        if queue is not None:
            memory.policy.expect(waiting)
        step = memory.request(model, start_s)
        on_demand = step.loaded - step.ahead
        switch_s = costs.switch_of(on_demand, prefills_s[model])
        first_s = switch_s + prefills_s[model]
        busy_s = first_s + decodes_s[model]
        free_at_s = start_s + busy_s
        if lookahead and waiting:
            idle_s = busy_s - on_demand / costs.link_bytes_per_s  # idle time of the link
            memory.load_ahead(model, waiting, int(idle_s * costs.link_bytes_per_s))
        queued_s = 0.0 if queue is None else start_s - arrival_s
        values = (arrival_s, start_s, queued_s * 1e3, switch_s * 1e3, (queued_s + first_s) * 1e3,
                  decodes_s[model] * 1e3, (queued_s + busy_s) * 1e3)  # fmt: skip
        for column, value in zip(floats.values(), values, strict=True):
            column.append(value)
        ints["loaded_bytes"].append(step.loaded)
        ints["evicted_bytes"].append(step.evicted)
        ints["resident_before_bytes"].append(step.resident_before)
        if served.residency is not None:
            served.residency.append(json.dumps(memory.residency()))
    return served


class _Queue:
    """Waiting requests, at most `REACH` of them; no policy looks further ahead."""

    REACH = 64

    def __init__(self, models: Sequence[str], arrivals_s: Sequence[float]) -> None:
        self._coming: Iterator[tuple[str, float]] = zip(models, arrivals_s, strict=True)
        self._next: tuple[str, float] | None = next(self._coming)
        self._waiting: deque[str] = deque()

    def after_next(self, now_s: float) -> list[str]:
        """Remove the next request, and return the models that wait behind it."""
        while self._next is not None and (self._next[1] <= now_s or not self._waiting):
            self._waiting.append(self._next[0])
            self._next = next(self._coming, None)
            if len(self._waiting) > self.REACH:
                break
        self._waiting.popleft()
        return list(self._waiting)


def _frame(
    served: _Served,
    models: list[str],
    trace: Trace | Sequence[str],
    costs: CostModel,
    mode: Mode,
    system: str,
    capacity_bytes: int,
    capacity_label: str,
) -> pd.DataFrame:
    n = len(models)
    columns: dict[str, Any] = {
        "run_id": f"simulated-{system}",
        "system": system,
        "mode": mode,
        "start": "cold",
        "capacity_bytes": np.full(n, capacity_bytes),
        "capacity_label": capacity_label,
        "trace": trace.kind if isinstance(trace, Trace) else "sequence",
        "repeat": np.zeros(n, np.int64),
        "request": np.arange(n),
        "model": pd.array(models, dtype="str"),
        "writeback_bytes": np.zeros(n, np.int64),
        "n_tokens": np.full(n, costs.n_tokens),
        "token_sha": token_sha(()),  # no tokens are computed
        "ok": np.ones(n, bool),
        "error_kind": "",
        "error": "",
        "note": "simulated",
        "resident_bytes": "{}" if served.residency is None else served.residency,
    }
    columns |= {name: np.frombuffer(values) for name, values in served.floats.items()}
    columns |= {name: np.frombuffer(values, np.int64) for name, values in served.ints.items()}
    return pd.DataFrame({name: columns[name] for name in COLUMNS}, index=pd.RangeIndex(n))
