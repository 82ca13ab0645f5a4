"""Claims on times: latencies, their ratios, the cost of a switch. Judged on a GPU only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.evidence import (
    MAIN_CAPACITY,
    MAIN_TRACE,
    Evidence,
    Measurement,
    NotMeasured,
    exact,
    measured,
    metric,
    ran_on,
    select,
    served,
    side_by_side,
    swept,
)
from djinn_lib.metrics import bootstrap_interval, p99_is_max, ratio_interval, share_interval


@metric(timed=True)
def median_ratio(evidence: Evidence, system: str, to: str, **where: Any) -> Measurement:
    """Median total latency of `system` divided by that of `to`."""
    return statistic_ratio(evidence, system, to, "p50", **where)


@metric(timed=True)
def latency(evidence: Evidence, system: str, statistic: str, **where: Any) -> Measurement:
    """A statistic of the total latency, in milliseconds."""
    rows = served(evidence, system, **where)
    remark = "the maximum: too few requests for a P99" if (
        statistic == "p99" and p99_is_max(len(rows))
    ) else ""  # fmt: skip
    reduce = metrics.STATISTICS["max" if _is_largest(statistic, len(rows)) else statistic]
    interval = bootstrap_interval(rows["total_ms"], reduce)
    return measured(interval, len(rows), remark)


def _is_largest(statistic: str, n: int) -> bool:
    return statistic == "max" or (statistic == "p99" and p99_is_max(n))


def _fastest(
    evidence: Evidence, systems: str | Sequence[str], statistic: str, **where: Any
) -> pd.DataFrame:
    """Return the served rows of one system: of several, the one whose statistic is least.

    Raises:
        NotMeasured: none of them served a request.
    """
    names = [systems] if isinstance(systems, str) else list(systems)
    found: list[pd.DataFrame] = []
    reasons: list[str] = []
    for name in names:
        try:
            found.append(served(evidence, name, **where))
        except NotMeasured as reason:
            reasons.append(str(reason))
    if not found:
        raise NotMeasured(reasons[0])
    return min(found, key=lambda rows: metrics.latency(rows["total_ms"])[statistic])


@metric(timed=True)
def statistic_ratio(
    evidence: Evidence, system: str | list[str], to: str, statistic: str, **where: Any
) -> Measurement:
    """A statistic of the total latency of `system` divided by that of `to`.

    Of several systems the one that does best is taken. Maxima have no interval.
    """
    name = str(_fastest(evidence, system, statistic, **where)["system"].iloc[0])
    served(evidence, to, **where)  # says why there is none, if so
    both = side_by_side(evidence, [name, to], **where)
    top, bottom = (metrics.served(both[label]) for label in (name, to))
    values = [metrics.latency(rows["total_ms"])[statistic] for rows in (top, bottom)]
    against = "" if isinstance(system, str) else f"against {name}"
    remark = ", ".join(filter(None, [against, ran_on(evidence, top, bottom)]))
    n = len(top) + len(bottom)
    if any(_is_largest(statistic, len(rows)) for rows in (top, bottom)):
        return exact(values[0] / values[1], n, remark)
    interval = ratio_interval(top["total_ms"], bottom["total_ms"], statistic)
    return measured(interval, n, remark)


@metric(timed=True)
def switch_cost_ratio(
    evidence: Evidence, system: str | list[str], to: str, **where: Any
) -> Measurement:
    """Mean cost of a change of the model in `system` divided by that in `to`.

    Only requests count whose model differs from the one before, and not those that ask for a model
    the first time in a repeat, which must load it in every system. Of several systems the one whose
    switches cost least is taken.
    """
    names = [system] if isinstance(system, str) else system
    costs = {name: _switch_costs(evidence, name, **where) for name in [*names, to]}
    bottom = costs.pop(to)
    known = {name: cost for name, cost in costs.items() if len(cost)}
    if not known or not len(bottom):
        served(evidence, to if known else names[0], **where)  # says why there is none
        raise NotMeasured("no request of this run changes back to a model that was used before")
    best = min(known, key=lambda name: known[name].mean())
    both = side_by_side(evidence, [best, to], **where)
    top, bottom = (_later_costs(both[label]) for label in (best, to))
    remark = f"{best}: {top.mean():,.1f} ms, {to}: {bottom.mean():,.2f} ms"
    remark = ", ".join(filter(None, [remark, ran_on(evidence, *both.values())]))
    return measured(ratio_interval(top, bottom, "mean"), len(top) + len(bottom), remark)


@metric(timed=True)
def exposed_switch_ms(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Mean time that switches cost requests, the first for each model of a repeat left out."""
    rows = metrics.later_touches(select(evidence, system, **where))
    costs = rows.loc[rows["ok"], "switch_ms"]
    if costs.empty:
        raise NotMeasured(f"no model is asked for twice, or {system} served no such request")
    return measured(metrics.bootstrap_interval(costs, np.mean), len(costs))


def _switch_costs(evidence: Evidence, system: str, **where: Any) -> pd.Series:
    """Milliseconds of each later switch of a system; empty where it was not run."""
    try:
        return _later_costs(select(evidence, system, **where))
    except NotMeasured:
        return pd.Series(dtype=float)


def _later_costs(rows: pd.DataFrame) -> pd.Series:
    later = metrics.later_switches(rows)
    return later.loc[later["ok"], "switch_ms"]


@metric(timed=True)
def maximum_to_least(
    evidence: Evidence,
    system: str,
    trace: str = MAIN_TRACE,
    capacity_label: str = MAIN_CAPACITY,
) -> Measurement:
    """Slowest request of a system divided by the least of the slowest ones of all baselines.

    Below 1 it is faster than every baseline's. Baselines are all systems but Djinn and its
    ablations.
    """
    slowest = float(
        served(evidence, system, trace=trace, capacity_label=capacity_label)["total_ms"].max()
    )
    rows = select(evidence, None, trace=trace, capacity_label=capacity_label)
    others = rows[rows["ok"] & ~rows["system"].str.startswith("djinn")]
    if others.empty:
        raise NotMeasured("no baseline served a request in this run")
    maxima = others.groupby("system")["total_ms"].max()
    remark = f"{slowest:,.0f} ms; the least of {len(maxima)} baselines: {maxima.idxmin()}"
    return exact(slowest / float(maxima.min()), len(rows), f"{remark}, {maxima.min():,.0f} ms")


@metric(timed=True)
def switch_share(
    evidence: Evidence, system: str, low_ms: float, high_ms: float = np.inf, **where: Any
) -> Measurement:
    """Share of the served requests whose switch cost from `low_ms` to below `high_ms`."""
    rows = served(evidence, system, **where)
    inside = (rows["switch_ms"] >= low_ms) & (rows["switch_ms"] < high_ms)
    return measured(share_interval(inside), len(rows))


@metric(timed=True)
def speedup_over_capacities(evidence: Evidence, system: str, baseline: str) -> Measurement:
    """Ratio of medians at each capacity: its middle, with its least and greatest as interval."""
    ratios, n, remark = _speedups(evidence, system, baseline)
    return Measurement(float(np.median(ratios)), min(ratios), max(ratios), n, remark)


@metric(timed=True)
def speedup_spread(evidence: Evidence, system: str, baseline: str) -> Measurement:
    """The greatest ratio of medians over all capacities, divided by the least."""
    ratios, n, remark = _speedups(evidence, system, baseline)
    return Measurement(max(ratios) / min(ratios), math.nan, math.nan, n, remark)


def _speedups(evidence: Evidence, system: str, baseline: str) -> tuple[list[float], int, str]:
    """Ratios of medians, one a capacity, how many requests they rest on, and that in words."""
    rows = select(evidence, system, capacity_label=None)
    ratios = [
        median_ratio(evidence, baseline, to=system, capacity_label=label).value
        for label in swept(rows)
    ]
    remark = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} capacities"
    return ratios, len(rows), remark


@metric(timed=True)
def runtime_s(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Seconds to serve the whole trace once, without set-up."""
    rows = served(evidence, system, **where)
    seconds = rows.groupby("repeat")["total_ms"].sum() / 1e3
    return measured(bootstrap_interval(seconds, np.mean), len(rows))
