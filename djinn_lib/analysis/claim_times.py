"""Metrics of claims on the times of one cell: latencies, their ratios, the cost of a switch.

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
from djinn_lib.analysis.claim_metrics import Measurement, count, estimate, metric, n_requests
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
    block_length,
    bootstrap_interval,
    by_request,
    p99_is_max,
    ratio_interval,
)


def _is_largest(statistic: str, n: int) -> bool:
    return statistic == "max" or (statistic == "p99" and p99_is_max(n))


def _block(rows: pd.DataFrame, n: int) -> int:
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
    found = bootstrap_interval(STATISTICS[statistic], total_ms, block=_block(rows, len(total_ms)))
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
    run: Run, system: str, to: str, one_pace: bool = False, **where: Any
) -> Measurement:
    """Median total latency of `system` divided by that of `to`; `one_pace`: see `at_one_pace`."""
    return statistic_ratio(run, system, to, "p50", one_pace, **where)


@metric(timed=True)
def statistic_ratio(
    run: Run,
    system: str | list[str],
    to: str,
    statistic: str,
    one_pace: bool = False,
    **where: Any,
) -> Measurement:
    """A statistic of the total latency of `system` divided by that of `to`, paired by request.

    If several systems are given, the best one that ran on one machine with `to` is used, and the
    remark names those that could not be compared. With `one_pace` see `at_one_pace`.
    """
    both_of = _comparable(run, system, to, **where)
    if one_pace:
        both_of = {name: at_one_pace(run, both) for name, both in both_of.items()}
    best = min((paired_ratio(run, name, both, to, statistic) for name, both in both_of.items()),
               key=lambda ratio: ratio.value)  # fmt: skip
    if isinstance(system, str):  # there is no choice to tell of
        return replace(best, remark=best.remark.partition(", ")[2])
    return replace(best, remark=best.remark + _left_out(system, both_of, to))


def _left_out(systems: str | Sequence[str], compared: Iterable[str], to: str) -> str:
    """Return a phrase that names the systems that no machine ran with `to`, if there are any."""
    names = [] if isinstance(systems, str) else [*systems]
    missing = [name for name in names if name not in compared]
    return f"; not compared, as no machine ran it with {to}: {', '.join(missing)}" * bool(missing)


def at_one_pace(
    run: Run, both: Mapping[str, pd.DataFrame], pace: metrics.Pace = "mean"
) -> dict[str, pd.DataFrame]:
    """Return rows of two eager systems as if they had decoded equally fast (`metrics.at_one_pace`).

    Eager steps follow the pace of the host, which differs between two cells of one machine by more
    than such systems do. What is left of their difference comes before decoding. The faster the
    common pace, the larger is its share of the totals.

    Raises:
        NotMeasured: one of them does not decode by transformers' own steps.
    """
    if others := sorted(run.other_steps & set(both)):
        raise NotMeasured(f"not decoded by transformers' own steps: {', '.join(others)}")
    return dict(zip(both, metrics.at_one_pace(*both.values(), pace=pace), strict=True))


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
    ratio = ratio_interval(top, bottom, statistic, _block(both[name], len(pairs)))
    return estimate(ratio, len(pairs), remark)


def _only(rows: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the paired requests."""
    return rows[pd.MultiIndex.from_frame(rows[metrics.REQUEST]).isin(pairs.index)]


def _comparable(
    run: Run, system: str | Sequence[str], to: str, **where: Any
) -> dict[str, dict[str, pd.DataFrame]]:
    """Return rows of each system and of `to`, both from one machine, by the system's name.

    Raises:
        NotMeasured: there are none; with the first reason.
    """
    served(run, to, **where)  # says why there is none, if so
    found, reasons = {}, []
    for name in [system] if isinstance(system, str) else system:
        try:
            served(run, name, **where)
            found[name] = side_by_side(run, [name, to], **where)
        except NotMeasured as reason:
            reasons.append(reason)
    if not found:
        raise reasons[0]
    return found


@metric(timed=True)
def switch_cost_ratio(run: Run, system: str | list[str], to: str, **where: Any) -> Measurement:
    """Mean cost of a later switch in `system` divided by that in `to`, paired by request.

    See `metrics.later_switches`. Of several systems, the one with the lowest ratio is used: each is
    compared with `to` on a machine and on requests of its own.
    """
    found, both_of = [], _comparable(run, system, to, **where)
    for name, both in both_of.items():
        later = (metrics.later_switches(both[label]) for label in (name, to))
        pairs = metrics.paired(*(by_request(rows, "switch_ms") for rows in later))
        if pairs.empty:
            continue
        means = f"{name}: {pairs['top'].mean():,.1f} ms, {to}: {pairs['bottom'].mean():,.2f} ms"
        remark = ", ".join(filter(None, [means, ran_on(run, *both.values())]))
        block = _block(both[name], len(pairs))
        ratio = ratio_interval(pairs["top"], pairs["bottom"], "mean", block)
        found.append(estimate(ratio, len(pairs), remark))
    if not found:
        raise NotMeasured("no request of this run changes back to a model that was used before")
    best = min(found, key=lambda ratio: ratio.value)
    return replace(best, remark=best.remark + _left_out(system, both_of, to))


@metric(timed=True)
def exposed_switch_ms(run: Run, system: str, **where: Any) -> Measurement:
    """Mean exposed time of switches, without the first request for each model of a repeat."""
    rows = metrics.later_touches(select(run, system, **where))
    costs = by_request(rows, "switch_ms")
    if costs.empty:
        raise NotMeasured(f"no model is asked for twice, or {system} served no such request")
    found = bootstrap_interval(np.mean, costs, block=_block(rows, len(costs)))
    return estimate(found, len(costs))


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
    both_of = _comparable(run, names, system, **where)
    ratios = [paired_ratio(run, name, both, system, "max") for name, both in both_of.items()]
    found = min(ratios, key=lambda ratio: ratio.value)
    remark = f"{found.remark}, the nearest of {len(ratios)} baselines, each on its machine"
    remark += _left_out(names, both_of, system)
    # In the worst repeat of any baseline, which need not be that of the nearest one.
    span = (1 / found.judged[1], 1 / min(ratio.judged[0] for ratio in ratios))
    return Measurement(1 / found.value, found.n, remark, span=span)


@metric(timed=True)
def switch_share(
    run: Run, system: str, low_ms: float, high_ms: float = np.inf, **where: Any
) -> Measurement:
    """Share of the requests that were served with a switch from `low_ms` to below `high_ms`.

    The share is one of all requests that were sent, as in the tables.
    """
    rows = select(run, system, **where)
    return count(rows["ok"] & rows["switch_ms"].between(low_ms, high_ms, inclusive="left"), rows)


@metric(timed=True)
def switch_distance(
    run: Run, system: str, classes: Sequence[tuple[float, float, float]], **where: Any
) -> Measurement:
    """Total variation distance of switch times from a given distribution, 0 to 1.

    Each of `classes` has a low and a high bound (ms) and a share. All other costs are one more
    class, and so are failed requests, whose cost is unknown.
    """
    rows = select(run, system, **where)
    said = [share for _, _, share in classes]
    shares = pd.DataFrame(
        {number: rows["ok"] & rows["switch_ms"].between(low, high, inclusive="left")
         for number, (low, high, _) in enumerate(classes)}
    )  # fmt: skip
    each = shares.groupby(rows["repeat"]).mean()
    apart = [_distance([*share], said) for share in each.itertuples(index=False)]
    found = shares.mean().tolist()
    told = ", ".join(f"{share:.0%}" for share in [*found, 1 - sum(found)])
    remark = f"{told} (the last: in none of them)"
    span = (min(apart), max(apart))
    return Measurement(_distance(found, said), n_requests(rows), remark, span=span)


def _distance(found: Sequence[float], said: Sequence[float]) -> float:
    """Total variation distance of two distributions, whose last class is what is missing from 1."""
    pairs = zip([*found, 1 - sum(found)], [*said, 1 - sum(said)], strict=True)
    return float(sum(abs(a - b) for a, b in pairs) / 2)


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
