"""Metrics of claims on several cells at once: all capacities of a sweep, all rates of arrivals.

They are judged on a GPU only. Importing this module registers them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib.analysis.claim_metrics import Measurement, estimate, metric
from djinn_lib.analysis.claim_times import at_one_pace, median_ratio
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, by_machine, ran_on, select, swept
from djinn_lib.metrics import Pace, block_length, bootstrap_interval, by_request, share_interval


@metric(timed=True)
def speedup_over_capacities(
    run: Run, system: str, baseline: str, pace: Pace | None = None
) -> Measurement:
    """Middle of the ratios of medians at all capacities; every interval must be as expected.

    For `pace` see `claim_times.at_one_pace`.
    """
    labels = swept(select(run, system, capacity_label=None))
    ratios = [median_ratio(run, baseline, system, pace, capacity_label=label)
              for label in labels]  # fmt: skip
    values, judged = [r.value for r in ratios], [r.judged for r in ratios]
    span = min(low for low, _ in judged), max(high for _, high in judged)
    return Measurement(float(np.median(values)), ratios[0].n, _least_and_most(values), span=span)


@metric(timed=True)
def speedup_spread(run: Run, system: str, baseline: str, pace: Pace | None = None) -> Measurement:
    """The greatest ratio of medians over all capacities, divided by the least.

    Its interval draws the same requests at every capacity. Ratios of different machines are not
    compared: it rests on the capacities that one machine ran, the most that any did. If some are
    missing, the true value may be any greater one. For `pace` see `claim_times.at_one_pace`.
    """
    labels = swept(select(run, system, capacity_label=None))
    pairs = _on_one_machine(run, baseline, system, labels)
    cells = [rows for pair in pairs for rows in pair]
    if pace:  # the same at all capacities
        cells = at_one_pace(run, cells, pace)
    columns = [by_request(rows).droplevel("capacity_label") for rows in cells]
    together = pd.concat(columns, axis=1, join="inner")

    def spread(*samples: np.ndarray, axis: int) -> Any:
        medians = [np.median(sample, axis=axis) for sample in samples]
        ratios = np.array([a / b for a, b in zip(medians[::2], medians[1::2], strict=True)])
        return ratios.max(axis=0) / ratios.min(axis=0)

    found = bootstrap_interval(spread, *(column for _, column in together.items()))
    medians = together.median().tolist()
    ratios = [a / b for a, b in zip(medians[::2], medians[1::2], strict=True)]
    remark = ", ".join(filter(None, [_least_and_most(ratios), ran_on(run, *cells)]))
    if len(pairs) == len(labels):
        return estimate(found, len(together), remark)
    remark = f"{remark}, of {len(labels)} that were run; interval from {found[1]:.2f} on"
    return Measurement(found[0], len(together), remark, span=(found[1], np.inf))


def _on_one_machine(
    run: Run, baseline: str, system: str, labels: Sequence[str]
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Return rows of both systems at each capacity that one machine ran: the most that any did."""
    found = {label: [by_machine(run, name, capacity_label=label) for name in (baseline, system)]
             for label in labels}  # fmt: skip
    ran_both = {label: set(top) & set(bottom) for label, (top, bottom) in found.items()}
    at = Counter(chain.from_iterable(ran_both.values()))
    order = {number: (at[number], number not in run.shared_machines, number) for number in at}
    machine = max(order, key=order.__getitem__, default=0)
    if at[machine] < 2:
        raise NotMeasured(f"no machine ran {baseline} and {system} at two capacities")
    return [(top[machine], bottom[machine]) for label, (top, bottom) in found.items()
            if machine in ran_both[label]]  # fmt: skip


def _least_and_most(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} capacities"


@metric(timed=True)
def highest_rate(
    run: Run, system: str, target_ms: float, share: float = 0.9, traces: str = "load", **where: Any
) -> Measurement:
    """Highest arrival rate (requests per second) at which a share of requests meets a target.

    The share must also meet it at all lower rates at which the system ran. Names of these traces
    begin with `traces`. Failed requests miss the target. The span's low end is the highest of these
    rates whose own interval is above the share, its high end the last before an interval below it.
    n is the number of requests at the rate of the value, or at the lowest one if none meets it.
    """
    found: dict[float, tuple[float, ...]] = {}
    for name, trace in run.traces.items():
        if name.startswith(f"{traces}_"):
            with suppress(NotMeasured):
                rows = select(run, system, trace=name, mode="concurrent", **where)
                in_time = rows["ok"] & (rows["total_ms"] <= target_ms)
                hits = in_time.groupby(rows["request"]).mean()
                interval = share_interval(hits, block_length(len(hits)))
                found[float(trace.params["rate_per_s"])] = (*interval, len(hits))
    if not found:
        raise NotMeasured(f"{system} got no requests at given rates in this run")
    rates = pd.DataFrame(found, index=["value", "low", "high", "n"]).T.sort_index()
    remark = ", ".join(f"{met:.0%} at {rate:g}/s" for rate, met in rates["value"].items())
    met = rates[(rates["value"] >= share).cummin()]
    maybe = rates[(rates["high"] >= share).cummin()]
    low, value, high = (float(part.index.max()) if len(part) else 0.0
                        for part in (met[met["low"] >= share], met, maybe))  # fmt: skip
    n = rates["n"][value] if value else rates["n"].iloc[0]
    return Measurement(value, int(n), remark, span=(low, high))
