"""Tables of what compressed masters save and cost, from `benchmarks/masters.py` and a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import served
from djinn_lib.errors import RecordError
from djinn_lib.metrics import by_request, difference_of_means, measures

PLAIN, COMPRESSED = "djinn", "djinn_compressed"


def masters_table(folder: Path) -> pd.DataFrame:
    """Return what each form of masters costs, from the files ``masters-*.json`` of a folder.

    Raises:
        RecordError: there are none.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("masters-*.json"))]
    if not results:
        raise RecordError(f"expected masters-*.json in {folder}: run benchmarks/masters.py")
    rows = pd.DataFrame(row for result in results for row in result["rows"])
    slower = rows["ms_per_token_beside"] / rows["ms_per_token"] - 1
    return pd.DataFrame({
        "weights": rows["dtype"],
        "model": rows["model"],
        "masters": rows["form"],
        "stored bytes (x)": rows["share"],
        "full miss (ms)": rows["load_ms"],
        "of its plain bytes' time on the link (x)": rows["by_link"],
        "first token of a hit (ms)": rows["ttft_ms"],
        "per token (ms)": rows["ms_per_token"],
        "per token beside a load (ms)": rows["ms_per_token_beside"],
        "slower beside a load (%)": 100 * slower,
        "added at (GB/s)": rows["plain_bytes"] / rows["add_s"] / 1e9,
    }).set_index(["weights", "model", "masters"])  # fmt: skip


def compressed_trace_table(run: Run) -> pd.DataFrame:
    """Return a trace's times with plain and with compressed masters, at each capacity.

    The last columns are how much lower the mean is with compressed ones, paired by request.

    Raises:
        NotMeasured: a form was not run.
    """
    labels = sorted(run.rows["capacity_label"].unique())
    lines = [line for label in labels for line in _forms(run, str(label))]
    return pd.DataFrame(lines).set_index(["capacity (GiB)", "masters"])


def _forms(run: Run, label: str) -> Iterator[dict[str, Any]]:
    rows = {form: served(run, form, capacity_label=label) for form in (PLAIN, COMPRESSED)}
    saved = difference_of_means(*(by_request(of) for of in rows.values()))
    for form, of in rows.items():
        line = measures(of)
        yield {
            "capacity (GiB)": f"{of['capacity_bytes'].iloc[0] / 2**30:.4g}",
            "masters": "plain" if form == PLAIN else "compressed",
            **{name: line[name] for name in ("requests", "repeats", "P50 (ms)", "mean (ms)")},
            "mean switch (ms)": of["switch_ms"].mean(),
            "loaded (GiB)": of["loaded_bytes"].sum() / of["repeat"].nunique() / 2**30,
            **dict(zip(("mean saved (ms)", "low (ms)", "high (ms)"),
                       saved if form == COMPRESSED else (None,) * 3, strict=True)),
        }  # fmt: skip
