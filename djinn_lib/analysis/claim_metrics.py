"""Metrics of claims: each is a small function from a run to a value.

This module has the register of all metrics, and the metrics of counts, bytes and shares, which are
valid on any machine, as are those of `claim_tokens`. `claim_times`, `claim_switches` and
`claim_series` have those of times. A metric that cannot be measured raises `NotMeasured` with the
reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import MAIN_TRACE, WARM, NotMeasured, select, served, swept
from djinn_lib.engine.memory.ring import Eviction
from djinn_lib.metrics import Interval, by_request, paired
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.simulator.simulate import simulate

KEYS = ["trace", "request"]


@dataclass(frozen=True)
class Measurement:
    """A measured value, its number of requests without repeats, and its uncertainty.

    Attributes:
        remark: more numbers, as text.
        interval: 95% interval, if the value is a statistic of a sample of requests.
        span: without an interval, the least and the greatest value, over the repeats of a count or
            a maximum, or over several capacities.
    """

    value: float
    n: int
    remark: str = ""
    interval: tuple[float, float] | None = None
    span: tuple[float, float] | None = None

    @property
    def judged(self) -> tuple[float, float]:
        """The range that a verdict looks at."""
        return self.interval or self.span or (self.value, self.value)


Metric = Callable[..., Measurement]
METRICS: dict[str, Metric] = {}
TIMED: set[str] = set()  # metrics that rest on clocks, which a shared CPU does not keep


def metric(timed: bool = False) -> Callable[[Metric], Metric]:
    """Register a metric under its function's name."""

    def register(function: Metric) -> Metric:
        METRICS[function.__name__] = function
        if timed:
            TIMED.add(function.__name__)
        return function

    return register


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Make sure that a metric takes these arguments.

    Raises:
        TypeError: an argument is missing or unknown; the message names it.
    """
    bound = inspect.signature(METRICS[name]).bind(None, **arguments).arguments
    inspect.signature(select).bind(None, None, **bound.get("where", {}))
    if (statistic := bound.get("statistic", "p50")) not in metrics.STATISTICS:
        raise TypeError(f"expected a statistic out of {[*metrics.STATISTICS]}, got {statistic!r}")
    if (pace := bound.get("pace")) not in (None, *metrics.PACES):
        raise TypeError(f"expected a pace out of {[*metrics.PACES]}, got {pace!r}")


def estimate(found: Interval, n: int, remark: str = "") -> Measurement:
    """Return a statistic with its 95% interval.

    A single request has none, so it may be anything: no verdict rests on it.

    Raises:
        NotMeasured: the statistic is no number.
    """
    value, low, high = found
    if np.isnan(value):
        raise NotMeasured(f"no number can be given from {n} requests")
    if np.isnan(low):
        return Measurement(value, n, remark, span=(-np.inf, np.inf))
    return Measurement(value, n, remark, (low, high))


def count(hits: pd.Series, rows: pd.DataFrame, remark: str = "") -> Measurement:
    """Return a share of the requests of a trace, from a mark for each row that counts.

    All requests were sent, so it is a count without an interval. If repeats differ, it has a span.
    """
    low, high = hits.groupby(rows["repeat"]).mean().agg(["min", "max"]).tolist()
    if low != high:
        remark = "; ".join(filter(None, [remark, f"{low:.0%} to {high:.0%} in the repeats"]))
    return Measurement(float(hits.mean()), n_requests(rows), remark, span=(low, high))


def n_requests(rows: pd.DataFrame) -> int:
    """Return the number of requests, counted for each trace, without repeats."""
    return len(rows[KEYS].drop_duplicates())


def _bytes_per_repeat(rows: pd.DataFrame) -> float:
    return float(rows["loaded_bytes"].sum() / rows["repeat"].nunique())


@metric()
def zero_load_share(run: Run, system: str, **where: Any) -> Measurement:
    """Share of the requests that were served without loading a byte, of all that were sent."""
    rows = select(run, system, **where)
    hits, repeats = rows["ok"] & (rows["loaded_bytes"] == 0), rows["repeat"].nunique()
    return count(hits, rows, f"{hits.sum() / repeats:.3g} of {len(rows) / repeats:.3g} requests")


@metric()
def failure_share(run: Run, system: str, **where: Any) -> Measurement:
    """Share of the attempted requests that failed."""
    rows = select(run, system, **where)
    return count(~rows["ok"], rows, f"{(~rows['ok']).sum()} of {len(rows)} attempts failed")


@metric()
def completion_share(run: Run, system: str | None, **where: Any) -> Measurement:
    """Share of the attempted requests that were served."""
    rows = select(run, system, **where)
    return count(rows["ok"], rows, f"{rows['ok'].sum()} of {len(rows)} attempts")


@metric()
def total_gib(run: Run) -> Measurement:
    """GiB of the weights of all models."""
    if not run.has_clocks:
        raise NotMeasured("small models stand for the paper's on this machine")
    return Measurement(sum(run.sizes.values()) / 2**30, len(run.sizes))


@metric()
def model_gib(run: Run, model: str) -> Measurement:
    """GiB of the weights of one model."""
    if model not in run.sizes:
        raise NotMeasured(f"other models stand for {model} on this machine")
    return Measurement(run.sizes[model] / 2**30, 1)


@metric()
def capacity_share(run: Run, capacity_label: str) -> Measurement:
    """Capacity of the ring as a share of all weights."""
    rows = select(run, None, capacity_label=capacity_label)
    share = float(rows["capacity_bytes"].iloc[0] / sum(run.sizes.values()))
    return Measurement(share, len(run.sizes))


@metric()
def popularity_ratio(run: Run, trace: str) -> Measurement:
    """Probability of the most popular model divided by that of the second."""
    chosen = run.traces.get(trace)
    if chosen is None or "probabilities" not in chosen.params:
        raise NotMeasured(f"no trace {trace!r} with known probabilities in this run")
    first, second, *_ = sorted(chosen.params["probabilities"], reverse=True)
    drawn = f"drawn with {chosen.params['probabilities']}"
    return Measurement(first / second, len(chosen), drawn)


@metric()
def bytes_to_optimum(
    run: Run, system: str, capacity_label: str, trace: str = MAIN_TRACE
) -> Measurement:
    """Bytes loaded divided by the minimum that any schedule must load at that capacity.

    Neither includes lookup tables that stay in host memory.
    """
    rows = served(run, system, trace=trace, capacity_label=capacity_label)
    if trace not in run.traces:
        raise NotMeasured(f"no trace {trace!r} in this run")
    if len(rows) < len(run.traces[trace]) * rows["repeat"].nunique():
        raise NotMeasured(f"{system} did not serve all of {trace!r}, which the optimum does")
    sizes = run.device_sizes.get(system) or run.sizes
    least = optimal_bytes(run.traces[trace], sizes, int(rows["capacity_bytes"].iloc[0]))
    return Measurement(_bytes_per_repeat(rows) / least, n_requests(rows))


@metric()
def worst_bytes_to_optimum(run: Run, system: str, trace: str = MAIN_TRACE) -> Measurement:
    """`bytes_to_optimum` at the capacity where it is greatest."""
    rows = select(run, system, trace=trace, capacity_label=None)
    found = {label: bytes_to_optimum(run, system, label, trace).value for label in swept(rows)}
    worst = max(found.values())
    remark = ", ".join(f"{ratio:.3g} at {label}" for label, ratio in sorted(found.items()))
    return Measurement(worst, n_requests(rows), remark)


@metric()
def computed_hit_share(
    run: Run, capacity_label: str, eviction: Eviction, start: str = "cold"
) -> Measurement:
    """Share of the main trace's requests that load nothing: simulated, not measured.

    With `start` "warm", each model was requested once before, in their order.
    """
    rows, trace = select(run, None, capacity_label=capacity_label), run.traces[MAIN_TRACE]
    before = list(run.sizes) if start == WARM else []
    models = [*before, *(request.model for request in trace.requests)]
    capacity_bytes = int(rows["capacity_bytes"].iloc[0])
    page_bytes = min(1 << 20, max(1, capacity_bytes // 256))  # tiny models have tiny rings
    how = {"eviction": eviction, "page_bytes": page_bytes}
    simulated = simulate(models, run.sizes, capacity_bytes, **how)
    hits = simulated["loaded_bytes"].iloc[len(before) :] == 0
    remark = f"{hits.sum()} of {len(hits)} requests, computed by the simulator, not measured"
    return Measurement(float(hits.mean()), len(hits), remark)


@metric()
def bytes_ratio(run: Run, system: str, to: str, **where: Any) -> Measurement:
    """Bytes loaded by `system` divided by those loaded by `to`, for the requests both served."""
    pairs = paired(*(by_request(served(run, name, **where), "loaded_bytes")
                     for name in (system, to)))  # fmt: skip
    loaded = pairs.sum()
    if not loaded["bottom"]:
        raise NotMeasured(f"{to} loaded no bytes in this run")
    return Measurement(float(loaded["top"] / loaded["bottom"]), len(pairs))


@metric()
def writeback_bytes(run: Run, system: str) -> Measurement:
    """Bytes copied to the host by evictions, in all cells of a system: every trace, mode, start."""
    rows = served(run, system, trace=None, capacity_label=None, mode=None, start=None)
    return Measurement(float(rows["writeback_bytes"].sum()), n_requests(rows))
