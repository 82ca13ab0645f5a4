"""Draw the headline comparisons on every machine that ran both systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    footnote,
    legend_above,
    nothing_to_draw,
    number_range,
    styled,
    system_look,
)
from djinn_lib.analysis.run import SHARED
from djinn_lib.analysis.selection import MAIN_TRACE, PINNED

_APART, _ALL_APART = 0.13, 0.6  # of the distance between two capacities, as in `sensitivity`
_TRACES = {MAIN_TRACE: "paper's", "zipf": "Zipfian"}


class _Panel(NamedTuple):
    slow: str
    fast: str
    statistic: str  # as `machine_ratio_table` names it
    title: str


_PANELS = (
    _Panel(PINNED, "djinn_eager", "P50", "median, both decode eagerly"),
    _Panel("vllm_sleep", "djinn", "mean", "mean"),
    _Panel("vllm_sleep_readonly", "djinn", "mean", "mean"),
)


@styled
def machine_ratios(ratios: pd.DataFrame, paper: Mapping[str, Any] | None = None) -> Figure:
    """Draw how many times as high as Djinn's the latencies of three systems are.

    A marker is a machine that ran both systems, a hollow one a machine that was shared. Where a
    machine ran both on the longer trace, that is drawn beside the capacities.

    Args:
        ratios: from `comparisons.machine_ratio_table`. If it has a reason instead, the figure says
            the reason.
        paper: the paper's numbers: a band shows its speed-ups over PyTorch pinned.
    """
    if "machine" not in ratios:
        return nothing_to_draw(f"No ratios: {ratios.iloc[0, 0]}.")
    table = ratios.reset_index()
    parts = [_of(table, panel) for panel in _PANELS]
    every = pd.concat(parts)
    if every.empty:
        return nothing_to_draw("No machine ran two of the systems that this figure compares.")
    places = sorted(set(zip(every["trace"] != MAIN_TRACE, every["capacity"], strict=True)),
                    key=lambda place: (place[0], float(place[1])))  # fmt: skip
    figure, grid = plt.subplots(1, len(_PANELS), figsize=(DOUBLE_COLUMN_IN, 2.9), sharey=True,
                                layout="constrained")  # fmt: skip
    for axes, panel, part in zip(grid, _PANELS, parts, strict=True):
        _draw(axes, panel, part, places)
    highest = max(1.0, float(every["high"].max()))
    if paper:
        highest = max(highest, _mark(grid[0], paper))
    grid[0].set(ylabel="times Djinn's latency", ylim=(0, highest * 1.05))
    grid[0].yaxis.set_major_locator(MultipleLocator(1.0))
    labels = {"a machine that ran both": False, "one that was shared": True}
    handles = [Line2D([], [], label=label, **_marker("0.3", hollow))
               for label, hollow in labels.items()]  # fmt: skip
    legend_above(figure, handles, 2)
    n = " and ".join(f"{number_range(part['n'])} requests of the {_TRACES[str(trace)]} trace"
                     for trace, part in every.groupby("trace"))  # fmt: skip
    footnote(figure, [f"n = {n}, paired by request. Bars: 95% intervals over them.",
                      "How far the machines differ shows in the markers."])  # fmt: skip
    return figure


def _of(table: pd.DataFrame, panel: _Panel) -> pd.DataFrame:
    """Return a panel's ratios as `value`, `low` and `high`."""
    slow, fast = system_look(panel.slow).label, system_look(panel.fast).label
    part = table[(table["latency of"] == slow) & (table["over that of"] == fast)]
    part = part[part["trace"].isin(list(_TRACES))]
    names = {"": "value", " low": "low", " high": "high"}
    return part.rename(columns={f"{panel.statistic}{at} (x)": name for at, name in names.items()})


def _draw(
    axes: Axes, panel: _Panel, part: pd.DataFrame, places: Sequence[tuple[bool, str]]
) -> None:
    """Draw the machines of each trace and capacity side by side, in the order of their runs."""
    look = system_look(panel.slow)
    for number, (longer, capacity) in enumerate(places):
        here = part[(part["capacity"] == capacity) & ((part["trace"] != MAIN_TRACE) == longer)]
        apart = min(_APART, _ALL_APART / max(1, len(here)))
        x = number + apart * (np.arange(len(here)) - (len(here) - 1) / 2)
        for at, (_, row) in zip(x, here.iterrows(), strict=True):
            sides = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            marker = _marker(look.color, str(row["machine"]).endswith(SHARED))
            axes.errorbar(at, row["value"], sides, capsize=2.0, elinewidth=1.0, **marker)
    axes.axhline(1.0, color="0.3", linewidth=1.0, linestyle=":")
    axes.set_xticks(range(len(places)), [f"{capacity}\nZipf" if longer else capacity
                                         for longer, capacity in places])  # fmt: skip
    axes.set_xlim(-0.55, len(places) - 0.45)
    axes.set(xlabel="capacity (GiB)", title=f"{look.label}\n{panel.title}")
    axes.grid(axis="y")


def _marker(color: str, hollow: bool = False) -> dict[str, Any]:
    face = {"markerfacecolor": "white", "markeredgewidth": 1.2} if hollow else {}
    return {"color": color, "marker": "o", "markersize": 4.5, "linestyle": "", **face}


def _mark(axes: Axes, paper: Mapping[str, Any]) -> float:
    """Draw the band of the paper's speed-ups; return its upper end."""
    low, high = paper["sensitivity"]["speedup"]
    axes.axhspan(low, high, color="0.55", alpha=0.6, linewidth=1.0)
    axes.annotate(f"paper {low:g} to {high:g}x", (1, low), (-3, -3),
                  xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  va="top", fontsize=SMALL_PT, color="0.3")  # fmt: skip
    return float(high)
