"""What claims measure: one small function a metric, from a run's evidence to a value.

A metric that cannot be measured raises `NotMeasured` with the reason; nothing is made up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib.metrics import (
    Interval,
    bootstrap_interval,
    p99_is_max,
    ratio_of_medians,
    share_interval,
)
from djinn_lib.metrics import (
    latency as latency_statistics,
)
from djinn_lib.optimal import optimal_bytes
from djinn_lib.trace import Trace

MAIN_TRACE, MAIN_CAPACITY = "paper", "25"
STATISTICS = ("p50", "p90", "p99", "mean", "max")


@dataclass(frozen=True)
class Evidence:
    """What a run shows.

    Attributes:
        rows: of every cell.
        machine: facts; `device` says whether times can be judged.
        sizes: bytes of each model.
        page_bytes: size of a page of the ring.
        traces: by name.
    """

    rows: pd.DataFrame
    machine: Mapping[str, Any]
    sizes: Mapping[str, int]
    page_bytes: int
    traces: Mapping[str, Trace]


@dataclass(frozen=True)
class Measurement:
    """A value with its 95% interval, and how many requests it rests on."""

    value: float
    low: float
    high: float
    n: int
    remark: str = ""


class NotMeasured(Exception):
    """The run does not say; the message says why."""


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
        TypeError: it does not; the message says which.
    """
    bound = inspect.signature(METRICS[name]).bind(None, **arguments).arguments
    inspect.signature(select).bind(None, None, **bound.get("where", {}))
    if (statistic := bound.get("statistic", "p50")) not in STATISTICS:
        raise TypeError(f"expected a statistic out of {STATISTICS}, got {statistic!r}")


def select(
    evidence: Evidence,
    system: str | None,
    trace: str | None = MAIN_TRACE,
    capacity_label: str | None = MAIN_CAPACITY,
    mode: str = "sequential",
) -> pd.DataFrame:
    """Return the attempted rows of a system; None stands for all.

    Raises:
        NotMeasured: there are none, or the system cannot run on this machine.
    """
    rows = evidence.rows[evidence.rows["mode"] == mode]
    wanted = {"system": system, "trace": trace, "capacity_label": capacity_label}
    for column, value in wanted.items():
        if value is not None:
            rows = rows[rows[column] == value]
    attempted = rows[rows["error_kind"] != "unavailable"]
    if attempted.empty:
        where = ", ".join(f"{k} {v!r}" for k, v in {**wanted, "mode": mode}.items() if v)
        raise NotMeasured(rows["error"].iloc[0] if len(rows) else f"no rows of {where} in this run")
    return attempted


def served(evidence: Evidence, system: str, **where: Any) -> pd.DataFrame:
    """Return the rows of the requests that a system served.

    Raises:
        NotMeasured: it served none.
    """
    rows = select(evidence, system, **where)
    if not rows["ok"].any():
        raise NotMeasured(f"{system} served no request: {rows['error'].iloc[0]}")
    return rows[rows["ok"]]


def _measured(interval: Interval, n: int, remark: str = "") -> Measurement:
    return Measurement(*interval, n=n, remark=remark)


def _exact(value: float, n: int, remark: str = "") -> Measurement:
    return Measurement(value, value, value, n, remark)


def _statistic(name: str, n: int) -> Callable[[np.ndarray], float]:
    if name == "p99" and p99_is_max(n):
        return np.max
    return {
        "p50": np.median,
        "mean": np.mean,
        "max": np.max,
        "p90": lambda v: np.quantile(v, 0.9),
        "p99": lambda v: np.quantile(v, 0.99),
    }[name]


@metric(timed=True)
def median_ratio(evidence: Evidence, system: str, to: str, **where: Any) -> Measurement:
    """Median total latency of `system` divided by that of `to`."""
    top, bottom = served(evidence, system, **where), served(evidence, to, **where)
    return _measured(ratio_of_medians(top["total_ms"], bottom["total_ms"]), len(top) + len(bottom))


@metric(timed=True)
def latency(evidence: Evidence, system: str, statistic: str, **where: Any) -> Measurement:
    """A statistic of the total latency, in milliseconds."""
    rows = served(evidence, system, **where)
    remark = "the maximum: too few requests for a P99" if (
        statistic == "p99" and p99_is_max(len(rows))
    ) else ""  # fmt: skip
    interval = bootstrap_interval(rows["total_ms"], _statistic(statistic, len(rows)))
    return _measured(interval, len(rows), remark)


@metric(timed=True)
def statistic_ratio(
    evidence: Evidence, system: str, to: str, statistic: str, **where: Any
) -> Measurement:
    """A statistic of the total latency of `system` divided by that of `to`."""
    rows = [served(evidence, name, **where) for name in (system, to)]
    values = [latency_statistics(r["total_ms"])[statistic] for r in rows]
    return _exact(values[0] / values[1], sum(map(len, rows)))


@metric(timed=True)
def switch_share(
    evidence: Evidence, system: str, low_ms: float, high_ms: float = np.inf, **where: Any
) -> Measurement:
    """Share of the served requests whose switch cost from `low_ms` to below `high_ms`."""
    rows = served(evidence, system, **where)
    inside = (rows["switch_ms"] >= low_ms) & (rows["switch_ms"] < high_ms)
    return _measured(share_interval(inside), len(rows))


@metric(timed=True)
def speedup_over_capacities(evidence: Evidence, system: str, baseline: str) -> Measurement:
    """Ratio of medians at each capacity: its middle, with its least and greatest as interval."""
    rows = select(evidence, system, capacity_label=None)
    ratios = [
        median_ratio(evidence, baseline, to=system, capacity_label=label).value
        for label in rows["capacity_label"].unique()
    ]
    remark = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} capacities"
    return Measurement(float(np.median(ratios)), min(ratios), max(ratios), len(rows), remark)


@metric(timed=True)
def runtime_s(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Seconds to serve the whole trace once, without set-up."""
    rows = served(evidence, system, **where)
    seconds = rows.groupby("repeat")["total_ms"].sum() / 1e3
    return _measured(bootstrap_interval(seconds, np.mean), len(rows))


@metric()
def zero_load_share(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Share of the served requests for which not one byte was loaded."""
    rows = served(evidence, system, **where)
    hits = rows["loaded_bytes"] == 0
    return _measured(share_interval(hits), len(rows), f"{hits.sum()} of {len(rows)} requests")


@metric()
def failure_share(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Share of the attempted requests that failed."""
    rows = select(evidence, system, **where)
    return _measured(share_interval(~rows["ok"]), len(rows), f"{(~rows['ok']).sum()} failed")


@metric()
def completion_share(evidence: Evidence, system: str | None, **where: Any) -> Measurement:
    """Share of the attempted requests that were served."""
    rows = select(evidence, system, **where)
    remark = f"{rows['ok'].sum()} of {len(rows)} requests"
    return _measured(share_interval(rows["ok"]), len(rows), remark)


@metric()
def total_gib(evidence: Evidence) -> Measurement:
    """GiB of the weights of all models."""
    if evidence.machine.get("device") == "cpu":
        raise NotMeasured("small models stand for the paper's on this machine")
    return _exact(sum(evidence.sizes.values()) / 2**30, len(evidence.sizes))


@metric()
def capacity_share(evidence: Evidence, capacity_label: str) -> Measurement:
    """Capacity of the ring as a share of all weights."""
    rows = select(evidence, None, capacity_label=capacity_label)
    share = rows["capacity_bytes"].iloc[0] / sum(evidence.sizes.values())
    return _exact(float(share), len(evidence.sizes))


@metric()
def popularity_ratio(evidence: Evidence, trace: str) -> Measurement:
    """Probability of the most popular model divided by that of the second, as drawn from."""
    chosen = evidence.traces.get(trace)
    if chosen is None or "probabilities" not in chosen.params:
        raise NotMeasured(f"no trace {trace!r} with known probabilities in this run")
    first, second, *_ = sorted(chosen.params["probabilities"], reverse=True)
    return _exact(first / second, len(chosen), f"drawn with {chosen.params['probabilities']}")


def _bytes_per_repeat(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].sum() / rows["repeat"].nunique())


@metric()
def bytes_to_optimum(
    evidence: Evidence, system: str, capacity_label: str, trace: str = MAIN_TRACE
) -> Measurement:
    """Bytes loaded divided by the least that any schedule must load in that capacity."""
    rows = served(evidence, system, trace=trace, capacity_label=capacity_label)
    if trace not in evidence.traces:
        raise NotMeasured(f"no trace {trace!r} in this run")
    capacity_bytes = int(rows["capacity_bytes"].iloc[0])
    least = optimal_bytes(evidence.traces[trace], evidence.sizes, capacity_bytes)
    return _exact(_bytes_per_repeat(rows, "loaded_bytes") / least, len(rows))


@metric()
def bytes_ratio(evidence: Evidence, system: str, to: str, **where: Any) -> Measurement:
    """Bytes loaded by `system` divided by those loaded by `to`."""
    rows = [served(evidence, name, **where) for name in (system, to)]
    loaded = [_bytes_per_repeat(r, "loaded_bytes") for r in rows]
    if not loaded[1]:
        raise NotMeasured(f"{to} loaded no bytes in this run")
    return _exact(loaded[0] / loaded[1], sum(map(len, rows)))


@metric()
def writeback_bytes(evidence: Evidence, system: str) -> Measurement:
    """Bytes copied to the host by evictions, in all cells of a system."""
    rows = served(evidence, system, trace=None, capacity_label=None)
    return _exact(float(rows["writeback_bytes"].sum()), len(rows))


@metric()
def token_agreement(evidence: Evidence, without: list[str]) -> Measurement:
    """Share of requests for which all systems gave the same tokens."""
    rows = evidence.rows[evidence.rows["ok"] & ~evidence.rows["system"].isin(without)]
    if rows["system"].nunique() < 2:
        raise NotMeasured("fewer than two systems served requests in this run")
    agree = rows.groupby(["trace", "request"])["token_sha"].nunique() == 1
    remark = f"{rows['system'].nunique()} systems, {len(agree)} different requests"
    return _measured(share_interval(agree), len(rows), remark)
