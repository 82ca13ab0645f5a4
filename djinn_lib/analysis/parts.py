"""Make tables of what a latency is made of: parts of a request, of a gain, of the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

import pandas as pd

from djinn_lib.analysis.plots.style import order_systems, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import (
    NotMeasured,
    need_clocks,
    or_reason,
    ran_on,
    served,
    side_by_side,
)
from djinn_lib.metrics import phases_ms, prefill_ms
from djinn_lib.metrics import served as done

Paper = Mapping[str, Any]
_GIB = 2**30


@or_reason
def gain_table(run: Run, slow: str = "pytorch_pinned", fast: str = "djinn") -> pd.DataFrame:
    """Return the mean time that one system saves over another, for each part of a request.

    Both are compared on the newest machine that ran both. Only the switch depends on how weights
    move. The other parts depend on how tokens are computed, which needs no ring.
    """
    need_clocks(run)
    both = side_by_side(run, [slow, fast])
    table = pd.DataFrame({f"{system_look(name).label} (ms)": _parts(done(rows))
                          for name, rows in both.items()})  # fmt: skip
    table["less (ms)"] = table.iloc[:, 0] - table.iloc[:, 1]
    table["share of the gain (%)"] = 100 * table["less (ms)"] / table["less (ms)"]["total"]
    table["times lower (x)"] = table.iloc[:, 0] / table.iloc[:, 1]
    return table.rename_axis(f"part, {place}" if (place := ran_on(run, *both.values())) else "part")


def _parts(rows: pd.DataFrame) -> pd.Series:
    """Mean milliseconds of the parts of a request, and of the whole request."""
    parts = phases_ms(rows).drop(columns="queue")
    return parts.assign(total=parts.sum(axis=1)).mean()


@or_reason
def pinned_table(run: Run, paper: Paper) -> pd.DataFrame:
    """Compare the paper's slowest baseline, PyTorch pinned, with that of this run.

    `implied` is the rate of copies in both directions behind the paper's median, if computing
    took as long there as here. The paper's code does not use pageable memory.
    """
    rows = served(run, "pytorch_pinned")
    need_clocks(run)
    link = float(run.machine["link_rate_bytes_per_s"])
    back = float(run.machine.get("d2h_rate_bytes_per_s") or link)
    parts_s = _parts(rows) / 1e3
    said_s = paper["systems"]["pytorch_pinned"]["p50_total_ms"] / 1e3
    moved = float((rows["loaded_bytes"] + rows["writeback_bytes"]).mean())
    computing_s = parts_s["prefill"] + parts_s["decode"]
    implied = moved / (said_s - computing_s) if said_s > computing_s else nan
    found = {
        "P50 (s)": rows["total_ms"].median() / 1e3,
        "paper: P50 (s)": said_s,
        "largest model over this link (s)": max(run.sizes.values()) / link,
        "mean switch (s)": parts_s["switch"],
        "of it the copy back, at the link's rate (s)": rows["writeback_bytes"].mean() / back,
        "mean prefill and decode (s)": computing_s,
        "moved by a request, there and back (GiB)": moved / _GIB,
        "rate of this link (GB/s)": link / 1e9,
        "implied rate in the paper (GB/s)": implied / 1e9,
        **_pageable(run),
    }
    return pd.DataFrame({"value": found}).rename_axis("PyTorch pinned")


def _pageable(run: Run) -> dict[str, float]:
    try:
        rows = served(run, "pytorch_pageable")
    except NotMeasured:
        return {}
    there_ms = rows["ttft_ms"] - prefill_ms(rows)
    return {
        "from pageable memory: P50 (s)": rows["total_ms"].median() / 1e3,
        "from pageable memory: rate (GB/s)": rows["loaded_bytes"].sum() / there_ms.sum() / 1e6,
        "to pageable memory: mean (s)": (rows["switch_ms"] - there_ms).mean() / 1e3,
    }


def decomposition(
    run: Run, paper: Paper, trace: str = "paper", capacity_label: str = "25"
) -> pd.DataFrame:
    """Return the mean parts of a served request's time, one row for each system.

    A switch is split into the time to copy its bytes at the measured rates of the link, and a rest:
    allocating, starting an engine, reading files. The rest is negative if copying overlaps with
    computing. `total` is the sum of copy, write-back, rest, prefill and decode.

    The ceiling is an ideal request: it moves its bytes at the link's rate, then decodes at the rate
    of device memory, because each token of batch 1 reads all weights. Without a GPU the ceiling has
    no decoding, and the reached share is NaN. Numbers that the paper does not give are NaN too.

    Raises:
        RecordError: there are no rows of that trace and capacity.
    """
    rows = done(run.cells(trace, capacity_label))
    found, names = [], pd.Index(order_systems(rows["system"]), name="system")
    for name in names:
        manifest = run.manifests.get(f"{trace}-{capacity_label}-{name}")
        rates = manifest["machine"] if manifest else run.machine
        found.append(_means(run, rows[rows["system"] == name], rates))
    table = pd.DataFrame(found, names, list(_means(run, rows.iloc[:0], run.machine)))
    said = paper.get("systems", {})
    for label, key in (("mean", "mean_total_ms"), ("P50", "p50_total_ms")):
        table[f"paper: {label} (ms)"] = [float(said.get(n, {}).get(key, nan)) for n in names]
    return table


def parts_table(
    run: Run, paper: Paper, trace: str = "paper", capacity_label: str = "25"
) -> pd.DataFrame:
    """Return the `decomposition` with the systems' labels instead of their ids."""
    parts = decomposition(run, paper, trace, capacity_label)
    return parts.rename(index=lambda name: system_look(name).label)


def _means(run: Run, rows: pd.DataFrame, rates: Mapping[str, Any]) -> dict[str, float]:
    """Means of one system, with the rates of the machine that ran it."""
    link = float(rates["link_rate_bytes_per_s"])
    back = float(rates.get("d2h_rate_bytes_per_s") or link)
    memory = rates.get("hbm_read_rate_bytes_per_s")
    copy_ms = rows["loaded_bytes"].mean() / link * 1e3
    writeback_ms = rows["writeback_bytes"].mean() / back * 1e3
    total_ms = rows["total_ms"].mean()
    read = rows["model"].map(run.needed_sizes).astype(float) * (rows["n_tokens"] - 1)
    ceiling_ms = copy_ms + (read.mean() / float(memory) * 1e3 if memory else 0.0)
    return {
        "n": rows["request"].nunique(),
        "total (ms)": total_ms,
        "copy (ms)": copy_ms,
        "write-back (ms)": writeback_ms,
        "rest of the switch (ms)": rows["switch_ms"].mean() - copy_ms - writeback_ms,
        "prefill (ms)": prefill_ms(rows).mean(),
        "decode (ms)": rows["decode_ms"].mean(),
        "ceiling (ms)": ceiling_ms,
        "ceiling reached (%)": 100.0 * ceiling_ms / total_ms if memory else nan,
    }
