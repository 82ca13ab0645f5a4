"""Metrics of claims on several cells at once: all capacities of a sweep, all rates of arrivals.

They are judged on a GPU only. Importing this module registers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.claim_metrics import Measurement, estimate, metric
from djinn_lib.analysis.claim_times import median_ratio
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, select, side_by_side, swept
from djinn_lib.metrics import block_length, bootstrap_interval, by_request


@metric(timed=True)
def speedup_over_capacities(run: Run, system: str, baseline: str) -> Measurement:
    """Middle of the ratios of medians at all capacities; every interval must be as expected."""
    ratios = _speedups(run, system, baseline)
    values, judged = [r.value for r in ratios], [r.judged for r in ratios]
    span = min(low for low, _ in judged), max(high for _, high in judged)
    return Measurement(float(np.median(values)), ratios[0].n, _least_and_most(values), span=span)


@metric(timed=True)
def speedup_spread(run: Run, system: str, baseline: str) -> Measurement:
    """The greatest ratio of medians over all capacities, divided by the least.

    Its interval draws the same requests at every capacity.
    """
    values = [ratio.value for ratio in _speedups(run, system, baseline)]
    labels, columns = swept(select(run, system, capacity_label=None)), []
    for label in labels:
        both = side_by_side(run, [baseline, system], capacity_label=label)
        columns += [by_request(both[name]).droplevel("capacity_label")
                    for name in (baseline, system)]  # fmt: skip
    together = pd.concat(columns, axis=1, join="inner")

    def spread(*samples: np.ndarray, axis: int) -> Any:
        medians = [np.median(sample, axis=axis) for sample in samples]
        ratios = np.array([a / b for a, b in zip(medians[::2], medians[1::2], strict=True)])
        return ratios.max(axis=0) / ratios.min(axis=0)

    found = bootstrap_interval(spread, *(column for _, column in together.items()))
    return estimate(found, len(together), _least_and_most(values))


def _speedups(run: Run, system: str, baseline: str) -> list[Measurement]:
    """Ratios of medians, one a capacity."""
    rows = select(run, system, capacity_label=None)
    return [median_ratio(run, baseline, to=system, capacity_label=label) for label in swept(rows)]


def _least_and_most(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} capacities"


@metric(timed=True)
def highest_rate(
    run: Run, system: str, target_ms: float, share: float = 0.9, traces: str = "load", **where: Any
) -> Measurement:
    """Highest arrival rate (requests per second) at which a share of requests meets a target.

    The share must also meet it at all lower measured rates. Names of these traces begin with
    `traces`. Failed requests miss the target. A rate at which the system did not run ends the
    search, because a system that misses a lower rate is not asked for more.
    """
    found: dict[float, metrics.Interval] = {}
    n = 0
    for name, trace in run.traces.items():
        if name.startswith(f"{traces}_"):
            with suppress(NotMeasured):
                rows = select(run, system, trace=name, mode="concurrent", **where)
                in_time = (rows["ok"] & (rows["total_ms"] <= target_ms)).groupby(rows["request"])
                n, rate = in_time.ngroups, float(trace.params["rate_per_s"])
                found[rate] = bootstrap_interval(np.mean, in_time.mean(), block=block_length(n))
    if not found:
        raise NotMeasured(f"{system} got no requests at given rates in this run")
    shares = pd.DataFrame(found, index=["value", "low", "high"]).sort_index(axis=1)
    remark = ", ".join(f"{met:.0%} at {rate:g}/s" for rate, met in shares.loc["value"].items())
    n_met = (~(shares < share)).cumprod(axis=1).sum(axis=1)  # rates before the first that misses it
    value, low, high = ([0.0, *shares][n] for n in n_met)
    return Measurement(value, n, remark, span=(low, high))
