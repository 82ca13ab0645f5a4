"""Metrics of claims on the times of one cell: latencies, their ratios, runtimes.

They are judged on a GPU only. Importing this module registers them. Two systems are compared on one
machine, request by request; maxima are compared with maxima.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.claim_metrics import Measurement, estimate, metric, n_requests
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import (
    MAIN_CAPACITY,
    MAIN_TRACE,
    NotMeasured,
    ran_on,
    select,
    served,
    side_by_side,
)
from djinn_lib.metrics import (
    STATISTICS,
    Pace,
    block_length,
    bootstrap_interval,
    by_request,
    p99_is_max,
    ratio_interval,
)


def _is_largest(statistic: str, n: int) -> bool:
    return statistic == "max" or (statistic == "p99" and p99_is_max(n))


def block_of(rows: pd.DataFrame, n: int) -> int:
    """Return the block size of the bootstrap: above 1 only for requests that wait for others."""
    return block_length(n) if (rows["mode"] == "concurrent").any() else 1


@metric(timed=True)
def latency(run: Run, system: str, statistic: str, **where: Any) -> Measurement:
    """A statistic of the total latency, in milliseconds."""
    rows = served(run, system, **where)
    total_ms = by_request(rows)
    if _is_largest(statistic, len(total_ms)):
        maxima = _maxima(rows)
        remark = "the maximum: too few requests for a P99" if statistic == "p99" else ""
        span = (min(maxima), max(maxima))
        return Measurement(_largest(rows), len(total_ms), remark, span=span)
    found = bootstrap_interval(STATISTICS[statistic], total_ms, block=block_of(rows, len(total_ms)))
    return estimate(found, len(total_ms))


def _maxima(rows: pd.DataFrame) -> list[float]:
    """Return the slowest request of each repeat; a maximum has no interval."""
    return [float(ms) for ms in metrics.served(rows).groupby("repeat")["total_ms"].max()]


def _largest(rows: pd.DataFrame) -> float:
    """Return the slowest request's latency in milliseconds.

    Where requests wait for each other, another one may be the last in every repeat: then this is
    the mean time until all are done.
    """
    if (rows["mode"] == "concurrent").all():
        return mean(_maxima(rows))
    return float(by_request(rows).max())


@metric(timed=True)
def median_ratio(
    run: Run, system: str, to: str, pace: Pace | None = None, **where: Any
) -> Measurement:
    """Median total latency of `system` divided by that of `to`; for `pace` see `at_one_pace`."""
    return statistic_ratio(run, system, to, "p50", pace, **where)


@metric(timed=True)
def statistic_ratio(
    run: Run,
    system: str | list[str],
    to: str,
    statistic: str,
    pace: Pace | None = None,
    **where: Any,
) -> Measurement:
    """A statistic of the total latency of `system` divided by that of `to`, paired by request.

    If several systems are given, the best one that ran on one machine with `to` is used, and the
    remark names those that could not be compared. For `pace` see `at_one_pace`.
    """
    both_of = comparable(run, system, to, pace, **where)
    best = min((paired_ratio(run, name, both, to, statistic) for name, both in both_of.items()),
               key=lambda ratio: ratio.value)  # fmt: skip
    if isinstance(system, str):  # there is no choice to tell of
        return replace(best, remark=best.remark.partition(", ")[2])
    return replace(best, remark=best.remark + left_out(system, both_of, to))


def left_out(systems: str | Sequence[str], compared: Iterable[str], to: str) -> str:
    """Return a phrase that names the systems that no machine ran with `to`, if there are any."""
    names = [] if isinstance(systems, str) else [*systems]
    missing = [name for name in names if name not in compared]
    return f"; not compared, as no machine ran it with {to}: {', '.join(missing)}" * bool(missing)


def at_one_pace(run: Run, cells: Sequence[pd.DataFrame], pace: Pace) -> list[pd.DataFrame]:
    """Return rows of eager cells as if they had decoded equally fast (`metrics.at_one_pace`).

    Eager steps follow the pace of the host, which differs between two cells of one machine by more
    than such systems do. What is left of their difference is the switch, with its copy back, and
    the prefill, which is eager too. The faster the pace, the larger is its share of the totals.

    Raises:
        NotMeasured: a system does not decode by transformers' own steps, or requests waited for
            each other, so that a decode is part of other requests' totals too.
    """
    rows = pd.concat(cells)
    if others := sorted(run.other_steps & set(rows["system"])):
        raise NotMeasured(f"not decoded by transformers' own steps: {', '.join(others)}")
    if (rows["mode"] == "concurrent").any():
        raise NotMeasured("requests that waited for each other are not compared at one pace")
    return metrics.at_one_pace(cells, pace)


def paired_ratio(
    run: Run, name: str, both: Mapping[str, pd.DataFrame], to: str, statistic: str
) -> Measurement:
    """A statistic of the total latency of `name` divided by that of `to`, from the rows of `both`.

    Raises:
        NotMeasured: no request was served by both.
    """
    top, bottom = (by_request(both[label]) for label in (name, to))
    pairs = metrics.paired(top, bottom)
    if pairs.empty:
        raise NotMeasured(f"no request was served by both {name} and {to}")
    remark = ", ".join(filter(None, [f"against {name}", ran_on(run, *both.values())]))
    if _is_largest(statistic, len(pairs)):
        # A system that failed its slowest request must not look faster for it.
        above, below = (_only(both[label], pairs) for label in (name, to))
        slow, fast = _maxima(above), _maxima(below)
        value = _largest(above) / _largest(below)
        span = (min(slow) / max(fast), max(slow) / min(fast))
        return Measurement(value, len(pairs), remark, span=span)
    ratio = ratio_interval(top, bottom, statistic, block_of(both[name], len(pairs)))
    return estimate(ratio, len(pairs), remark)


def _only(rows: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the paired requests."""
    return rows[pd.MultiIndex.from_frame(rows[metrics.REQUEST]).isin(pairs.index)]


def comparable(
    run: Run, system: str | Sequence[str], to: str, pace: Pace | None = None, **where: Any
) -> dict[str, dict[str, pd.DataFrame]]:
    """Return rows of each system and of `to`, both from one machine, by the system's name.

    For `pace` see `at_one_pace`.

    Raises:
        NotMeasured: there are none; with the first reason.
    """
    served(run, to, **where)  # says why there is none, if so
    found, reasons = {}, []
    for name in [system] if isinstance(system, str) else system:
        try:
            served(run, name, **where)
            both = side_by_side(run, [name, to], **where)
            cells = at_one_pace(run, [*both.values()], pace) if pace else both.values()
            found[name] = dict(zip(both, cells, strict=True))
        except NotMeasured as reason:
            reasons.append(reason)
    if not found:
        raise reasons[0]
    return found


@metric(timed=True)
def maximum_to_least(
    run: Run, system: str, trace: str = MAIN_TRACE, capacity_label: str = MAIN_CAPACITY
) -> Measurement:
    """Slowest request of a system divided by that of the baseline whose slowest is fastest.

    Below 1 it is faster than that of every baseline. Baselines are all systems except Djinn and its
    ablations that ran on one machine with `system`.
    """
    where: dict[str, Any] = {"trace": trace, "capacity_label": capacity_label}
    names = sorted({name for name in metrics.served(select(run, None, **where))["system"]
                    if not name.startswith("djinn")})  # fmt: skip
    if not names:
        raise NotMeasured("no baseline served a request in this run")
    both_of = comparable(run, names, system, **where)
    ratios = [paired_ratio(run, name, both, system, "max") for name, both in both_of.items()]
    found = min(ratios, key=lambda ratio: ratio.value)
    remark = f"{found.remark}, the nearest of {len(ratios)} baselines, each on its machine"
    remark += left_out(names, both_of, system)
    # In the worst repeat of any baseline, which need not be that of the nearest one.
    span = (1 / found.judged[1], 1 / min(ratio.judged[0] for ratio in ratios))
    return Measurement(1 / found.value, found.n, remark, span=span)


@metric(timed=True)
def first_request_share(run: Run, system: str, model: str, **where: Any) -> Measurement:
    """Share of the repeats in which the first request for a model is the slowest of all."""
    rows = served(run, system, **where)
    slowest = rows.loc[rows.groupby("repeat")["total_ms"].idxmax()]
    first = rows[rows["model"] == model]["request"].min()
    if np.isnan(first):
        raise NotMeasured(f"no request for {model} was served in this run")
    named = ", ".join(f"{row.request} ({row.model})" for row in slowest.itertuples())
    remark = f"first request for {model}: {first}; slowest of each repeat: {named}"
    hits = slowest["request"] == first
    span = (float(hits.min()), float(hits.max()))  # every repeat has to agree
    return Measurement(float(hits.mean()), n_requests(rows), remark, span=span)


@metric(timed=True)
def runtime_s(run: Run, system: str | list[str], **where: Any) -> Measurement:
    """Seconds to serve the whole trace once, without set-up; of several systems, together.

    Raises:
        NotMeasured: a request was never served, so the time of the whole trace is unknown.
    """
    names = [system] if isinstance(system, str) else system
    rows = {name: served(run, name, **where) for name in names}
    each = {name: by_request(of) for name, of in rows.items()}
    for name, ms in each.items():
        if missing := n_requests(select(run, name, **where)) - len(ms):
            raise NotMeasured(f"{name} never served {missing} requests: its runtime is unknown")
    times = pd.concat(each, axis=1).sum(axis=1)
    found = bootstrap_interval(lambda ms, axis: np.sum(ms, axis=axis) / 1e3, times)
    return estimate(found, len(times), ran_on(run, *rows.values()) if len(names) > 1 else "")
