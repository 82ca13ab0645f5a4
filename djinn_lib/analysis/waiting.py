"""What switches still cost when requests wait for each other, as a table."""

from __future__ import annotations

import pandas as pd

from djinn_lib.analysis.batching import split_unbatched
from djinn_lib.analysis.plots.style import order_systems, split_unavailable, system_look
from djinn_lib.analysis.result_tables import Table, served_text, summaries
from djinn_lib.analysis.run import Run
from djinn_lib.metrics import attempted, later_touches, sequential
from djinn_lib.units import three_digits

_GIB = 2**30


def waiting_table(run: Run, trace: str = "paper", capacity_label: str = "25") -> Table:
    """One line a system whose requests were sent as they arrived: what switches still cost.

    Switches are counted after the first touch of each model; above them, for comparison, those of
    Djinn one after the other. Systems that could have batched are named in a note instead.
    """
    fair, left_out = split_unbatched(run.concurrent_cells(trace, capacity_label))
    rows, unavailable = split_unavailable(fair)
    alone = sequential(attempted(run.rows))
    alone = alone[(alone["trace"] == trace) & (alone["capacity_label"] == capacity_label)]
    alone = alone[alone["system"] == "djinn"]
    lines = [_waiting_line("Djinn, one after the other", alone)] if len(alone) else []
    lines += [
        _waiting_line(system_look(system).label, rows[rows["system"] == system])
        for system in order_systems(rows["system"])
    ]
    head = ["requests", "served", "mean switch, ms", "longest switch, ms", "GiB loaded",
            "all done after, s"]  # fmt: skip
    notes = tuple(
        f"Not run: {system_look(name).label} ({why})." for name, why in unavailable.items()
    )
    return Table(head, lines, (*notes, *left_out))


def _waiting_line(name: str, rows: pd.DataFrame) -> list[str]:
    (cell,) = summaries(rows).values()
    exposed_ms = later_touches(rows).query("ok")["switch_ms"]
    took_ms = rows["total_ms"] - rows["queue_ms"]
    each = pd.DataFrame({"begin": rows["start_s"], "end": rows["start_s"] + took_ms / 1e3})
    each = each.groupby(rows["repeat"]).agg({"begin": "min", "end": "max"})
    return [
        name,
        served_text(cell),
        three_digits(exposed_ms.mean()),
        three_digits(exposed_ms.max()),
        three_digits(cell["loaded_bytes"] / _GIB),
        three_digits((each["end"] - each["begin"]).mean()),
    ]
