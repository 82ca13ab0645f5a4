"""Make tables of a sweep over capacities: speed-ups over a baseline, hits, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pandas as pd

from djinn_lib.analysis.plots.style import order_systems, split_unavailable
from djinn_lib.analysis.results import SERVED, labelled, measures
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, or_reason, sweep
from djinn_lib.metrics import (
    HIT_MS,
    by_request,
    later_touches,
    mean_without_decode_ms,
    paired,
    ratio_interval,
    served,
)
from djinn_lib.simulator.optimal import optimal_bytes

_GIB = 2**30


def speedup_table(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return the ratio of median total latencies, baseline over system.

    `low` and `high` are the 95% interval. There is one row for each capacity label and system.
    Requests are paired, and `n` counts those that both served. Column `without_decoding` is the
    ratio of the mean latencies without the decode. If the rows have a column `machine`, each system
    is compared with the baseline of its own machine, and with no other.
    """
    placed = served(rows.assign(machine=rows.get("machine", 0)))
    cells = dict(iter(placed.groupby(["capacity_label", "system", "machine"])))
    labels = rows.groupby("capacity_label")["capacity_bytes"].max().sort_values().index
    machines = sorted({machine for _, _, machine in cells})
    found = []
    for system, label, machine in product(order_systems(rows["system"]), labels, machines):
        slow, fast = (cells.get((label, name, machine)) for name in (baseline, system))
        if system == baseline or slow is None or fast is None:
            continue
        pairs = paired(by_request(slow), by_request(fast))
        medians = ratio_interval(pairs["top"], pairs["bottom"], "p50")
        means = mean_without_decode_ms(slow) / mean_without_decode_ms(fast)
        found.append((system, label, *medians, means, len(pairs)))
    columns = ["system", "capacity_label", "speedup", "low", "high", "without_decoding", "n"]
    return pd.DataFrame(found, columns=columns)


def hit_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the percentage of all requests that hit, for each capacity label and system.

    A `hit` loads no byte. `fast` is the paper's measure: a switch of less than 10 ms. A failed
    request is neither.
    """
    rows = rows[~rows["only_beside"]] if "only_beside" in rows else rows
    marked = rows.assign(
        hit=100.0 * (rows["ok"] & (rows["loaded_bytes"] == 0)),
        fast=100.0 * (rows["ok"] & (rows["switch_ms"] < HIT_MS)),
    )
    return marked.groupby(["system", "capacity_label"])[["hit", "fast"]].mean().reset_index()


@or_reason
def sweep_table(run: Run, baseline: str = "pytorch_pinned", trace: str = "paper") -> pd.DataFrame:
    """Return one row for each capacity and system: speed-up, hits and bytes.

    `could load nothing` is the share of requests for a model that was requested before. No system
    that starts cold can have more hits.

    Raises:
        RecordError: there are no rows of that trace.
    """
    rows, _ = split_unavailable(sweep(run, trace, baseline))
    if rows.empty:
        raise NotMeasured("no system of the sweep can run on this machine")
    gains = speedup_table(rows, baseline)
    rows = rows[~rows["only_beside"]]
    table = pd.concat(dict(_at_each_capacity(run, rows, trace)), names=["capacity (GiB)", "system"])
    sizes = rows.groupby("capacity_label")["capacity_bytes"].max().map(_in_gib)
    gains = gains.assign(capacity=gains["capacity_label"].map(sizes))
    gains = gains.set_index(["capacity", "system"])[["speedup", "low", "high"]]
    table[["speed-up of the P50 (x)", "low (x)", "high (x)"]] = gains.reindex(table.index)
    columns = [*SERVED, "P50 (ms)", "speed-up of the P50 (x)", "low (x)", "high (x)",
               "without decoding (ms)", "loaded nothing (%)", "could load nothing (%)",
               "bytes / optimum (x)", "machine"]  # fmt: skip
    return labelled(table[columns])


def _at_each_capacity(
    run: Run, rows: pd.DataFrame, trace: str
) -> Iterator[tuple[str, pd.DataFrame]]:
    for _, here in rows.sort_values("capacity_bytes").groupby("capacity_label", sort=False):
        n_bytes, table = int(here["capacity_bytes"].max()), measures(run, here)
        least = [optimal_bytes(run.traces[trace], run.device_sizes.get(name) or run.sizes, n_bytes)
                 for name in table.index]  # fmt: skip
        table["bytes / optimum (x)"] = table["loaded (GiB)"] * _GIB / least
        again = later_touches(here).groupby("system").size()
        table["could load nothing (%)"] = 100 * again / (table["requests"] * table["repeats"])
        yield _in_gib(n_bytes), table


def _in_gib(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.4g}"
