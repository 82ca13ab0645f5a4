"""Draw latencies, and the share of requests done in time, against the arrival rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from djinn_lib.analysis.arriving import load_table
from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    describe_rows,
    label_ms,
    legend_above,
    nothing_to_draw,
    order_systems,
    split_unavailable,
    styled,
    system_look,
    unavailable_notes,
)

STATISTICS: dict[str, Any] = {"p50": "-", "p99": ":"}


@styled
def load(rows: pd.DataFrame, rates: Mapping[str, float], target_ms: float = 2000.0) -> Figure:
    """Draw time to first token, total time and share in time against the arrival rate.

    The rows, which may be none, are of traces whose requests were sent when they arrived; `rates`
    has the rate of each of these traces per second. A request is in time `target_ms` after its
    arrival.
    """
    rows, unavailable = split_unavailable(rows)
    if not (systems := order_systems(rows["system"])):
        sentence = "This run has no requests that arrive at given rates."
        return nothing_to_draw(" ".join([sentence, *unavailable_notes(unavailable)]))
    figure, panels = plt.subplots(1, 3, figsize=(DOUBLE_COLUMN_IN, 2.5), layout="constrained")
    table = load_table(rows, rates, target_ms)
    for axes, column, label in zip(
        panels, ("ttft", "total", "in_time"),
        ("to the first token (ms)", "to the last token (ms)", f"done within {target_ms / 1e3:g} s"),
        strict=True,
    ):  # fmt: skip
        _draw_panel(axes, table, systems, column)
        axes.set(xlabel="arrivals a second", ylabel=label)
        axes.set_xscale("log")
        ticks = sorted(table["rate"].unique())
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        axes.grid(which="major")
    panels[2].yaxis.set_major_formatter(PercentFormatter())
    panels[2].set_ylim(-4, 104)
    panels[2].axhline(90, color="0.4", linestyle=(0, (1, 1.5)), linewidth=1.0)
    legend_above(figure, _legend(systems), 4)
    notes = ["Dotted at the right: 90%. Failed requests are late."]
    if (table["n"] < 100).any():
        notes.append("P99: the slowest request, where there are fewer than 100.")
    describe_rows(figure, rows, unavailable, *notes)
    return figure


def _draw_panel(axes: Axes, table: pd.DataFrame, systems: Sequence[str], column: str) -> None:
    for system in systems:
        part, look = table[table["system"] == system], system_look(system)
        common: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 3.5}
        if column == "in_time":
            axes.plot(part["rate"], part[column], linestyle=look.linestyle, **common)
            continue
        for statistic, line in STATISTICS.items():
            axes.plot(part["rate"], part[f"{column}_{statistic}"], linestyle=line, **common)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a panel may span one decade
        axes.yaxis.set_minor_locator(NullLocator())
        label_ms(axes.yaxis)


def _legend(systems: Sequence[str]) -> list[Line2D]:
    looks = [system_look(system) for system in systems]
    own = [Line2D([], [], color=look.color, marker=look.marker, markersize=3.5, label=look.label)
           for look in looks]  # fmt: skip
    return own + [Line2D([], [], color="0.3", linestyle=line, label=name.upper())
                  for name, line in STATISTICS.items()]  # fmt: skip
