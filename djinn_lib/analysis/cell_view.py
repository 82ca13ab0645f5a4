"""Show one cell in notebook 02: a summary, its requests, and the content of the ring.

For a system that cannot run on this machine, it shows only one sentence.
"""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from djinn_lib.analysis.plots.style import split_unavailable, system_look
from djinn_lib.analysis.plots.timeline import residency_over_time
from djinn_lib.analysis.tables import shown
from djinn_lib.metrics import measures

_MIB = 1 << 20
_MOVED = {"loaded": "loaded", "evicted": "evicted", "writeback": "written back"}


def summary(rows: pd.DataFrame) -> Styler | Markdown:
    """Return the measures of one cell, one on each line; or why it could not run."""
    if why := _unavailable(rows):
        return Markdown(why)
    found = measures(rows)
    if errors := rows.loc[~rows["ok"], "error"].tolist():
        found["first error"] = errors[0]
    return shown(pd.DataFrame({"value": pd.Series(found, dtype=object)}))


def requests(rows: pd.DataFrame) -> Styler | None:
    """Return a line for each request of the first repeat; None if the cell could not run."""
    return None if _unavailable(rows) else shown(request_table(rows))


def held(rows: pd.DataFrame, system: str) -> Figure | None:
    """Draw the bytes of each model after each request; None if the cell could not run."""
    return None if _unavailable(rows) else residency_over_time(rows, system)


def request_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each request of the first repeat: weights in MiB, times in ms, failures.

    The column of failures exists only if a request failed.
    """
    first = rows[rows["repeat"] == rows["repeat"].min()].sort_values("request")
    table = first[["request", "model"]].copy()
    table["found (MiB)"] = first["resident_before_bytes"] / _MIB
    for column, name in _MOVED.items():
        table[f"{name} (MiB)"] = first[f"{column}_bytes"] / _MIB
    for column, name in (("queue", "queue"), ("switch", "switch"), ("ttft", "first token"),
                         ("decode", "decode"), ("total", "total")):  # fmt: skip
        table[f"{name} (ms)"] = first[f"{column}_ms"]
    if not first["ok"].all():
        table["failed because"] = first["error"]
    return table.set_index("request")


def _unavailable(rows: pd.DataFrame) -> str:
    """Return why the system of a cell cannot run on this machine; "" if it can."""
    rest, reasons = split_unavailable(rows)
    if not reasons or len(rest):
        return ""
    ((system, reason),) = reasons.items()
    return f"**{system_look(system).label}** cannot run on this machine: {reason.rstrip('.')}."
