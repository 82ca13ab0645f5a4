"""Draw the headline comparisons on every machine that ran both systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
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
_COLUMNS = ["trace", "capacity", "machine", "value", "low", "high", "fastest", "n"]
_FASTEST: dict[str, Any] = {"marker": "x", "markersize": 4.5, "linestyle": ""}


class _Panel(NamedTuple):
    slow: str
    title: str
    ratios: pd.DataFrame  # as `value`, `low` and `high`


_N_COLUMNS = 2


@styled
def machine_ratios(
    ratios: pd.DataFrame, alike: pd.DataFrame, paper: Mapping[str, Any] | None = None
) -> Figure:
    """Draw how many times as high as Djinn's the latencies of three systems are.

    A marker is a machine that ran both systems, a hollow one a machine that was shared. Where a
    machine ran both on the longer trace, that is drawn beside the capacities.

    Args:
        ratios: from `comparisons.machine_ratio_table`. If it has a reason instead, the figure says
            the reason.
        alike: from `host_pace.one_pace_table`. If it has a reason instead, its panel is empty.
        paper: the paper's numbers: a band shows its speed-ups over PyTorch pinned.
    """
    if "machine" not in ratios:
        return nothing_to_draw(f"No ratios: {ratios.iloc[0, 0]}.")
    panels = _panels(ratios.reset_index(), alike)
    every = pd.concat([panel.ratios for panel in panels])
    if every.empty:
        return nothing_to_draw("No machine ran two of the systems that this figure compares.")
    figure, grid = plt.subplots(len(panels) // _N_COLUMNS, _N_COLUMNS, sharey=True,
                                figsize=(DOUBLE_COLUMN_IN, 5.0), layout="constrained")  # fmt: skip
    rows = zip(grid, zip(panels[::_N_COLUMNS], panels[1::_N_COLUMNS], strict=True), strict=True)
    for row, of_row in rows:
        places = _places(pd.concat([panel.ratios for panel in of_row]))
        for axes, panel in zip(row, of_row, strict=True):
            _draw(axes, panel, places)
        row[0].set(ylabel="times Djinn's latency")
    highest = max(1.0, float(every["high"].max()))
    if paper:
        highest = max(highest, *(_mark(axes, paper) for axes in grid[0]))
    grid[0, 0].set(ylim=(0, highest * 1.05))
    grid[0, 0].yaxis.set_major_locator(MultipleLocator(1.0))
    labels = {"a machine that ran both": False, "one that was shared": True}
    handles = [Line2D([], [], label=label, **_marker("0.3", hollow))
               for label, hollow in labels.items()]  # fmt: skip
    handles.append(
        Line2D([], [], color="0.3", label="each decode the fastest of its model", **_FASTEST)
    )
    legend_above(figure, handles, 3)
    n = " and ".join(f"{number_range(part['n'])} requests of the {_TRACES[str(trace)]} trace"
                     for trace, part in every.groupby("trace"))  # fmt: skip
    footnote(figure, [f"n = {n}, paired by request. Bars: 95% intervals over them.",
                      "How far the machines differ shows in the markers."])  # fmt: skip
    return figure


def _panels(table: pd.DataFrame, alike: pd.DataFrame) -> list[_Panel]:
    return [
        _Panel(PINNED, "median, both decode eagerly", _of(table, PINNED, "djinn_eager", "P50")),
        _Panel(PINNED, "the same, each decode the mean of both", _at_one_pace(table, alike)),
        *(_Panel(name, "mean", _of(table, name, "djinn", "mean"))
          for name in ("vllm_sleep", "vllm_sleep_readonly")),
    ]  # fmt: skip


def _of(table: pd.DataFrame, slow: str, fast: str, statistic: str) -> pd.DataFrame:
    """Return the ratios of two systems as `value`, `low` and `high`."""
    part = table[(table["latency of"] == system_look(slow).label)
                 & (table["over that of"] == system_look(fast).label)]  # fmt: skip
    names = {"": "value", " low": "low", " high": "high"}
    part = part.rename(columns={f"{statistic}{at} (x)": name for at, name in names.items()})
    part = part.assign(fastest=nan)
    return part.loc[part["trace"].isin(list(_TRACES)), _COLUMNS]


def _at_one_pace(table: pd.DataFrame, alike: pd.DataFrame) -> pd.DataFrame:
    if "n" not in alike:  # but a reason
        return table.iloc[:0].reindex(columns=_COLUMNS)
    names = {"P50, at the mean pace (x)": "value", "low (x)": "low", "high (x)": "high",
             "P50, at the fastest pace (x)": "fastest"}  # fmt: skip
    return alike.reset_index().rename(columns=names).assign(trace=MAIN_TRACE)[_COLUMNS]


def _places(ratios: pd.DataFrame) -> list[tuple[bool, str]]:
    """Return whether a trace is the longer one, and a capacity, in the order of the axis."""
    found = set(zip(ratios["trace"] != MAIN_TRACE, ratios["capacity"], strict=True))
    return sorted(found, key=lambda place: (place[0], float(place[1])))


def _draw(axes: Axes, panel: _Panel, places: Sequence[tuple[bool, str]]) -> None:
    """Draw the machines of each trace and capacity side by side, in the order of their runs."""
    look, part = system_look(panel.slow), panel.ratios
    for number, (longer, capacity) in enumerate(places):
        here = part[(part["capacity"] == capacity) & ((part["trace"] != MAIN_TRACE) == longer)]
        apart = min(_APART, _ALL_APART / max(1, len(here)))
        x = number + apart * (np.arange(len(here)) - (len(here) - 1) / 2)
        for at, (_, row) in zip(x, here.iterrows(), strict=True):
            sides = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            marker = _marker(look.color, str(row["machine"]).endswith(SHARED))
            axes.errorbar(at, row["value"], sides, capsize=2.0, elinewidth=1.0, **marker)
            axes.plot(at, row["fastest"], color=look.color, **_FASTEST)
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
