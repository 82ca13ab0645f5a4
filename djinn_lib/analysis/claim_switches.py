"""Metrics of claims on the cost of a switch from one model to another.

They are judged on a GPU only. Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.claim_metrics import Measurement, count, estimate, metric, n_requests
from djinn_lib.analysis.claim_times import block_of, comparable, left_out
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, ran_on, select
from djinn_lib.metrics import bootstrap_interval, by_request, ratio_interval


@metric(timed=True)
def switch_cost_ratio(run: Run, system: str | list[str], to: str, **where: Any) -> Measurement:
    """Mean cost of a later switch in `system` divided by that in `to`, paired by request.

    See `metrics.later_switches`. Of several systems, the one with the lowest ratio is used: each is
    compared with `to` on a machine and on requests of its own.
    """
    found, both_of = [], comparable(run, system, to, **where)
    for name, both in both_of.items():
        later = (metrics.later_switches(both[label]) for label in (name, to))
        pairs = metrics.paired(*(by_request(rows, "switch_ms") for rows in later))
        if pairs.empty:
            continue
        means = f"{name}: {pairs['top'].mean():,.1f} ms, {to}: {pairs['bottom'].mean():,.2f} ms"
        remark = ", ".join(filter(None, [means, ran_on(run, *both.values())]))
        block = block_of(both[name], len(pairs))
        ratio = ratio_interval(pairs["top"], pairs["bottom"], "mean", block)
        found.append(estimate(ratio, len(pairs), remark))
    if not found:
        raise NotMeasured("no request of this run changes back to a model that was used before")
    best = min(found, key=lambda ratio: ratio.value)
    return replace(best, remark=best.remark + left_out(system, both_of, to))


@metric(timed=True)
def exposed_switch_ms(run: Run, system: str, **where: Any) -> Measurement:
    """Mean exposed time of switches, without the first request for each model of a repeat."""
    rows = metrics.later_touches(select(run, system, **where))
    costs = by_request(rows, "switch_ms")
    if costs.empty:
        raise NotMeasured(f"no model is asked for twice, or {system} served no such request")
    found = bootstrap_interval(np.mean, costs, block=block_of(rows, len(costs)))
    return estimate(found, len(costs))


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
