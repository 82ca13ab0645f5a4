"""Metrics of claims that rest on clocks: latencies, their ratios, the cost of a switch.

They are judged on a GPU only. Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.claim_metrics import Measurement, exact, metric, share_of
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import (
    MAIN_CAPACITY,
    MAIN_TRACE,
    NotMeasured,
    ran_on,
    select,
    served,
    side_by_side,
    swept,
)
from djinn_lib.metrics import bootstrap_interval, p99_is_max, ratio_interval


def _is_largest(statistic: str, n: int) -> bool:
    return statistic == "max" or (statistic == "p99" and p99_is_max(n))


@metric(timed=True)
def latency(run: Run, system: str, statistic: str, **where: Any) -> Measurement:
    """A statistic of the total latency, in milliseconds."""
    total_ms = served(run, system, **where)["total_ms"]
    largest = _is_largest(statistic, len(total_ms))
    interval = bootstrap_interval(total_ms, metrics.STATISTICS["max" if largest else statistic])
    remark = "the maximum: too few requests for a P99" if largest and statistic == "p99" else ""
    return Measurement(*interval, len(total_ms), remark)


@metric(timed=True)
def median_ratio(run: Run, system: str, to: str, **where: Any) -> Measurement:
    """Median total latency of `system` divided by that of `to`."""
    return statistic_ratio(run, system, to, "p50", **where)


@metric(timed=True)
def statistic_ratio(
    run: Run, system: str | list[str], to: str, statistic: str, **where: Any
) -> Measurement:
    """A statistic of the total latency of `system` divided by that of `to`.

    Of several systems the one that does best is taken. Maxima have no interval.
    """
    name = _fastest(run, system, statistic, **where)
    served(run, to, **where)  # says why there is none, if so
    both = side_by_side(run, [name, to], **where)
    top, bottom = (metrics.served(both[label])["total_ms"] for label in (name, to))
    against = "" if isinstance(system, str) else f"against {name}"
    remark = ", ".join(filter(None, [against, ran_on(run, *both.values())]))
    n = len(top) + len(bottom)
    if any(_is_largest(statistic, len(times)) for times in (top, bottom)):
        values = [metrics.latency(times)[statistic] for times in (top, bottom)]
        return exact(values[0] / values[1], n, remark)
    return Measurement(*ratio_interval(top, bottom, statistic), n, remark)


def _fastest(run: Run, systems: str | Sequence[str], statistic: str, **where: Any) -> str:
    """Return the system whose statistic is least.

    Raises:
        NotMeasured: none of them served a request.
    """
    found: dict[str, float] = {}
    reasons = []
    for name in [systems] if isinstance(systems, str) else systems:
        try:
            found[name] = metrics.latency(served(run, name, **where)["total_ms"])[statistic]
        except NotMeasured as reason:
            reasons.append(reason)
    if not found:
        raise reasons[0]
    return min(found, key=lambda name: found[name])


@metric(timed=True)
def switch_cost_ratio(run: Run, system: str | list[str], to: str, **where: Any) -> Measurement:
    """Mean cost of a change of the model in `system` divided by that in `to`.

    Only requests count whose model differs from the one before, and not those that ask for a model
    the first time in a repeat, which must load it in every system. Of several systems the one whose
    switches cost least is taken.
    """
    names = [system] if isinstance(system, str) else system
    costs = {name: _switch_costs(run, name, **where) for name in [*names, to]}
    bottom = costs.pop(to)
    known = {name: cost for name, cost in costs.items() if len(cost)}
    if not known or bottom.empty:
        served(run, to if known else names[0], **where)  # says why there is none
        raise NotMeasured("no request of this run changes back to a model that was used before")
    best = min(known, key=lambda name: known[name].mean())
    both = side_by_side(run, [best, to], **where)
    top, bottom = (_later_costs(both[label]) for label in (best, to))
    remark = f"{best}: {top.mean():,.1f} ms, {to}: {bottom.mean():,.2f} ms"
    remark = ", ".join(filter(None, [remark, ran_on(run, *both.values())]))
    return Measurement(*ratio_interval(top, bottom, "mean"), len(top) + len(bottom), remark)


def _switch_costs(run: Run, system: str, **where: Any) -> pd.Series:
    """Milliseconds of each later switch of a system; empty where it was not run."""
    try:
        return _later_costs(select(run, system, **where))
    except NotMeasured:
        return pd.Series(dtype=float)


def _later_costs(rows: pd.DataFrame) -> pd.Series:
    return metrics.served(metrics.later_switches(rows))["switch_ms"]


@metric(timed=True)
def exposed_switch_ms(run: Run, system: str, **where: Any) -> Measurement:
    """Mean time that switches cost requests, the first for each model of a repeat left out."""
    costs = metrics.served(metrics.later_touches(select(run, system, **where)))["switch_ms"]
    if costs.empty:
        raise NotMeasured(f"no model is asked for twice, or {system} served no such request")
    return Measurement(*bootstrap_interval(costs, np.mean), len(costs))


@metric(timed=True)
def maximum_to_least(
    run: Run, system: str, trace: str = MAIN_TRACE, capacity_label: str = MAIN_CAPACITY
) -> Measurement:
    """Slowest request of a system divided by the least of the slowest ones of all baselines.

    Below 1 it is faster than every baseline's. Baselines are all systems but Djinn and its
    ablations.
    """
    where = {"trace": trace, "capacity_label": capacity_label}
    slowest = float(served(run, system, **where)["total_ms"].max())
    rows = select(run, None, **where)
    others = metrics.served(rows[~rows["system"].str.startswith("djinn")])
    if others.empty:
        raise NotMeasured("no baseline served a request in this run")
    maxima = others.groupby("system")["total_ms"].max()
    remark = f"{slowest:,.0f} ms; the least of {len(maxima)} baselines: {maxima.idxmin()}"
    return exact(slowest / float(maxima.min()), len(rows), f"{remark}, {maxima.min():,.0f} ms")


@metric(timed=True)
def switch_share(
    run: Run, system: str, low_ms: float, high_ms: float = np.inf, **where: Any
) -> Measurement:
    """Share of the served requests whose switch cost from `low_ms` to below `high_ms`."""
    return share_of(
        served(run, system, **where)["switch_ms"].between(low_ms, high_ms, inclusive="left")
    )


@metric(timed=True)
def speedup_over_capacities(run: Run, system: str, baseline: str) -> Measurement:
    """Ratio of medians at each capacity: its middle, with its least and greatest as interval."""
    ratios, n, remark = _speedups(run, system, baseline)
    return Measurement(float(np.median(ratios)), min(ratios), max(ratios), n, remark)


@metric(timed=True)
def speedup_spread(run: Run, system: str, baseline: str) -> Measurement:
    """The greatest ratio of medians over all capacities, divided by the least."""
    ratios, n, remark = _speedups(run, system, baseline)
    return Measurement(max(ratios) / min(ratios), np.nan, np.nan, n, remark)


def _speedups(run: Run, system: str, baseline: str) -> tuple[list[float], int, str]:
    """Ratios of medians, one a capacity, how many requests they rest on, and a remark."""
    rows = select(run, system, capacity_label=None)
    ratios = [median_ratio(run, baseline, to=system, capacity_label=label).value
              for label in swept(rows)]  # fmt: skip
    remark = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} capacities"
    return ratios, len(rows), remark


@metric(timed=True)
def runtime_s(run: Run, system: str, **where: Any) -> Measurement:
    """Seconds to serve the whole trace once, without set-up."""
    rows = served(run, system, **where)
    seconds = rows.groupby("repeat")["total_ms"].sum() / 1e3
    return Measurement(*bootstrap_interval(seconds, np.mean), len(rows))
