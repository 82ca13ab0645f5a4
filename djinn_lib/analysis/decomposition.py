"""Where a request's time goes in each system, beside what physics allows and what the paper says.

A switch is split by what its bytes need at the measured rates of the link; what is left of it is
the system's own doing: allocating, starting an engine, reading files. It is negative where copying
hides behind computing. The ceiling is a request of nothing but physics: its bytes at the link's
rate, then its tokens at the rate of device memory: each token of batch 1 reads all weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from djinn_lib.analysis.plots.style import order_systems, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.metrics import prefill_ms, served

COLUMNS = {
    "total_ms": "total",
    "copy_ms": "copy at the link's rate",
    "writeback_ms": "write-back at its rate",
    "rest_ms": "rest of the switch",
    "prefill_ms": "prefill",
    "decode_ms": "decode",
    "ceiling_ms": "ceiling",
    "reached": "share of the ceiling reached (%)",
    "paper_mean_ms": "paper: mean",
    "paper_p50_ms": "paper: P50",
}


def decomposition(
    run: Run,
    paper: Mapping[str, Any],
    trace: str = "paper",
    capacity_label: str = "25",
) -> pd.DataFrame:
    """Return a row a system: means over its served requests, in milliseconds.

    Columns are the keys of `COLUMNS`, and `n`. `total_ms` is the sum of copy, write-back, rest,
    prefill and decode. `reached` is the ceiling over the total, in percent. Where the rate of
    device memory was not measured (no GPU) `ceiling_ms` is without decoding, and `reached` NaN.
    The paper's numbers are NaN where it gives none.

    Args:
        run: with rows of that trace and capacity.
        paper: published numbers.
        trace: a trace's name.
        capacity_label: of the profile.

    Raises:
        RecordError: there are no such rows.
    """
    rows = served(run.cells(trace, capacity_label))
    systems = order_systems(rows["system"])
    table = {
        name: _means(rows[rows["system"] == name], _rates(run, trace, capacity_label, name), run)
        | _published(paper, name)
        for name in systems
    }
    return pd.DataFrame(table, index=["n", *COLUMNS]).T.rename_axis("system")


def decomposition_table(parts: pd.DataFrame) -> pd.DataFrame:
    """The decomposition for people: systems and columns by their names, rounded."""
    table = parts.rename(index=lambda name: system_look(str(name)).label, columns=COLUMNS)
    return table.astype({"n": int}).round(1)


def _rates(run: Run, trace: str, capacity_label: str, system: str) -> Mapping[str, Any]:
    """The measured rates of the machine that ran a cell."""
    manifest = run.manifests.get(f"{trace}-{capacity_label}-{system}")
    return manifest["machine"] if manifest else run.machine


def _means(rows: pd.DataFrame, rates: Mapping[str, Any], run: Run) -> dict[str, float]:
    link = float(rates["link_rate_bytes_per_s"])
    back = float(rates.get("d2h_rate_bytes_per_s") or link)
    memory = rates.get("hbm_read_rate_bytes_per_s")
    copy_ms = (rows["loaded_bytes"] / link * 1e3).mean()
    writeback_ms = (rows["writeback_bytes"] / back * 1e3).mean()
    total_ms = rows["total_ms"].mean()
    n_read = rows["model"].map(run.needed_sizes) * (rows["n_tokens"] - 1)
    decode_floor_ms = (n_read / float(memory) * 1e3).mean() if memory else 0.0
    ceiling_ms = copy_ms + decode_floor_ms
    return {
        "n": len(rows),
        "total_ms": total_ms,
        "copy_ms": copy_ms,
        "writeback_ms": writeback_ms,
        "rest_ms": rows["switch_ms"].mean() - copy_ms - writeback_ms,
        "prefill_ms": prefill_ms(rows).mean(),
        "decode_ms": rows["decode_ms"].mean(),
        "ceiling_ms": ceiling_ms,
        "reached": 100.0 * ceiling_ms / total_ms if memory else float("nan"),
    }


def _published(paper: Mapping[str, Any], system: str) -> dict[str, float]:
    found = paper.get("systems", {}).get(system, {})
    return {
        f"paper_{name}_ms": float(found.get(f"{name}_total_ms", "nan")) for name in ("mean", "p50")
    }
