"""Draw how speed-up and hits depend on the capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    byte_scale,
    connected,
    describe_rows,
    legend_above,
    number_range,
    order_systems,
    require_one_cell_each,
    split_unavailable,
    styled,
    system_look,
)
from djinn_lib.analysis.sweeps import hit_table, speedup_table
from djinn_lib.errors import RecordError
from djinn_lib.metrics import HIT_MS, attempted

# Of the distance between two capacities: between neighbouring series, and all of them.
_APART, _ALL_APART = 0.1, 0.5
_PAPER: dict[str, Any] = {"color": "0.3", "linestyle": "", "marker": "D", "markersize": 4.5,
                          "markerfacecolor": "none"}  # fmt: skip


@styled
def sensitivity(
    rows: pd.DataFrame,
    baseline: str = "pytorch_pinned",
    paper: Mapping[str, Any] | None = None,
    warm: pd.DataFrame | None = None,
) -> Figure:
    """Draw speed-up over a baseline and both kinds of hits against the capacity.

    Times of different machines are not compared, so lines of times only connect neighbours that one
    machine measured. Lines of bytes connect all capacities, because bytes do not depend on the
    machine.

    Args:
        rows: of one trace from a cold start, as from `selection.sweep`. The column `machine`, if
            there is one, says where each row was measured.
        baseline: the system to compare with.
        paper: the paper's numbers: a band shows the range of speed-ups, and diamonds the hits.
        warm: rows of the same trace from the paper's start, which is warm: hollow markers show
            their hits.

    Raises:
        RecordError: there are no rows, they mix traces, or the baseline is not among them.
    """
    require_one_cell_each(rows, "a sensitivity to the capacity", ("trace", "mode"))
    if baseline not in set(rows["system"]):
        raise RecordError(
            f"there are no rows of the baseline {baseline!r}, only of "
            f"{order_systems(rows['system'])}: run its cells, or choose another baseline"
        )
    rows, unavailable = split_unavailable(rows)
    started = _comparable(rows.iloc[:0] if warm is None else warm, rows)
    capacities = rows.groupby("capacity_label")["capacity_bytes"].max().sort_values()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(DOUBLE_COLUMN_IN, 3.0), width_ratios=(0.9, 1.35, 1.2), layout="constrained"
    )
    systems, labels = order_systems(rows["system"]), list(capacities.index)
    speedups = _with_machines(speedup_table(rows, baseline), rows)
    places = _places(len(systems))
    for system, part in speedups.assign(value=speedups["speedup"]).groupby("system"):
        _draw(left, part, str(system), labels, places[systems.index(str(system))])
    left.axhline(1.0, color=system_look(baseline).color, linewidth=1.0, linestyle=":")
    left.set(ylabel=f"times lower than {system_look(baseline).label}", title="Median latency")
    # Logarithmic, because systems near the baseline matter as much as those far from it.
    left.set_yscale("log")
    ends = [*speedups["low"], *speedups["high"], 1.0]
    left.set_ylim(float(np.nanmin(ends)) / 1.2, float(np.nanmax(ends)) * 1.2)
    if paper:
        _mark_speedups(left, paper)
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    hits, from_warm = _with_machines(hit_table(rows), rows), hit_table(started)
    hits_of_paper = _published_hits(paper, labels) if paper else {}
    for axes, column, title in (
        (middle, "hit", "Requests that loaded nothing"),
        (right, "fast", f"Switches below {HIT_MS:.0f} ms"),
    ):
        shown = hits.assign(machine=0) if column == "hit" else hits  # bytes are not times
        _draw_hits(axes, shown, from_warm, column, hits_of_paper if column == "hit" else {}, labels)
        axes.set(ylabel="share of requests", ylim=(-4, 108), title=title)
        axes.yaxis.set_major_formatter(PercentFormatter())
        axes.set_yticks(range(0, 101, 20))
    for axes in (left, middle, right):
        _label_capacities(axes, capacities)
    handles = _legend(systems, baseline, order_systems(started["system"]), with_paper=bool(paper))
    legend_above(figure, handles, min(3, len(handles)))
    every = pd.concat([rows, started.assign(system=started["system"] + " from the paper's start")])
    describe_rows(figure, every, unavailable, *_notes(rows, speedups))
    return figure


def _comparable(warm: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the attempted warm rows of the figure's mode and capacities.

    Raises:
        RecordError: they are of other traces.
    """
    warm = attempted(warm)
    warm = warm[
        warm["mode"].isin(rows["mode"]) & warm["capacity_label"].isin(rows["capacity_label"])
    ]
    if len(warm):
        require_one_cell_each(pd.concat([rows, warm]), "a sensitivity to the capacity", ("trace",))
    return warm


def _with_machines(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column `machine`: where the rows of each system and capacity were measured.

    Rows of the baseline that are only there for others (`selection.sweep`) do not count.
    """
    if "machine" not in rows:
        return table.assign(machine=0)
    rows = rows[~rows["only_beside"]] if "only_beside" in rows else rows
    cell = ["system", "capacity_label"]
    return table.join(rows.groupby(cell)["machine"].first(), on=cell)


def _notes(rows: pd.DataFrame, speedups: pd.DataFrame) -> list[str]:
    """Return notes on how many requests speed-ups rest on, and on what lines connect."""
    n = [f"Left: n = {number_range(speedups['n'])}, paired by request."] if len(speedups) else []
    if "machine" not in rows or rows["machine"].nunique() < 2:
        return n
    return [*n, "Left: no point where no machine ran both systems. Left and right: lines connect "
            "neighbours that one machine measured."]  # fmt: skip


def _draw(
    axes: Axes, points: pd.DataFrame, system: str, labels: Sequence[str], place: float
) -> None:
    """Draw the column `value` of a system, with intervals if there are `low` and `high`."""
    look = system_look(system)
    points = points.set_index("capacity_label").reindex(list(labels))
    points["x"] = np.arange(len(labels)) + place
    for part in connected(points):
        sides = None
        if "low" in part:
            sides = [part["value"] - part["low"], part["high"] - part["value"]]
        axes.errorbar(part["x"], part["value"], sides, color=look.color, linestyle=look.linestyle,
                      marker=look.marker, markersize=4.0, capsize=2.5, elinewidth=1.0)  # fmt: skip


def _draw_hits(
    axes: Axes,
    hits: pd.DataFrame,
    warm: pd.DataFrame,
    column: str,
    published: Mapping[str, float],
    labels: Sequence[str],
) -> None:
    """Draw one kind of hits: systems first, then those from a warm start, then the paper's."""
    systems, started = order_systems(hits["system"]), order_systems(warm["system"])
    places = iter(_places(len(systems) + len(started) + bool(published)))
    for system in systems:
        part = hits[hits["system"] == system]
        _draw(axes, part.assign(value=part[column]), system, labels, next(places))
    for system in started:
        part, place = warm[warm["system"] == system], next(places)
        x = [labels.index(label) + place for label in part["capacity_label"]]
        axes.plot(x, part[column], **_warm(system), zorder=5)
    if published:
        place = next(places)
        x = [labels.index(label) + place for label in published]
        axes.plot(x, [*published.values()], **_PAPER, zorder=5)


def _warm(system: str) -> dict[str, Any]:
    """Return the marker of a system from the paper's start: its own, but hollow."""
    look = system_look(system)
    return {"color": look.color, "linestyle": "", "marker": look.marker, "markersize": 4.2,
            "markerfacecolor": "white", "markeredgewidth": 1.2}  # fmt: skip


def _places(n: int) -> list[float]:
    """Return an offset for each of n series, so that equal values do not hide each other."""
    return [min(_APART, _ALL_APART / n) * (number - (n - 1) / 2) for number in range(n)]


def _label_capacities(axes: Axes, capacities: pd.Series) -> None:
    scale, unit = byte_scale(float(capacities.max()))
    digits = 0 if scale < 1024**3 else 1
    here = [f"{size / scale:.{digits}f} {unit}" for size in capacities]
    in_gib = {str(label): size / 2**30 for label, size in capacities.items()}
    if all(label == f"{gib:g}" for label, gib in in_gib.items()):  # the same as the paper's
        axes.set_xticks(range(len(here)), [str(label) for label in capacities.index])
        axes.set_xlabel("capacity (GiB)")
    else:
        texts = [f"{label}\n{size}" for label, size in zip(capacities.index, here, strict=True)]
        axes.set_xticks(range(len(here)), texts)
        axes.set_xlabel("capacity: paper (GiB), here")
    axes.set_xlim(-0.52, len(here) - 0.48)
    axes.grid(axis="y")


def _legend(
    systems: Sequence[str], baseline: str, warm: Sequence[str], with_paper: bool
) -> list[Line2D]:
    handles = []
    for look, system in zip(map(system_look, systems), systems, strict=True):
        label = look.label + (" (baseline)" if system == baseline else "")
        style = look.line | {"label": label, "marker": look.marker, "markersize": 4.5}
        handles.append(Line2D([], [], **style))
    for system in warm:
        label = f"{system_look(system).label}, from the paper's start"
        handles.append(Line2D([], [], label=label, **_warm(system)))
    return [*handles, Line2D([], [], label="paper", **_PAPER)] if with_paper else handles


def _mark_speedups(axes: Axes, paper: Mapping[str, Any]) -> None:
    low, high = paper["sensitivity"]["speedup"]
    axes.axhspan(low, high, color="0.55", alpha=0.6, linewidth=1.0)  # visible at any scale
    below, above = axes.get_ylim()
    axes.set_ylim(min(below, low / 1.2), max(above, high * 1.4))  # room for the text above
    axes.annotate(
        f"paper {low:g} to {high:g}x", (1, high), (-3, 2), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=SMALL_PT, color="0.3",
    )  # fmt: skip


def _published_hits(paper: Mapping[str, Any], labels: Sequence[str]) -> dict[str, float]:
    """Return the paper's hits in percent: at its main capacity and at both ends of its sweep."""
    constrained, abundant = (100 * share for share in paper["sensitivity"]["hit_share"])
    points = {"20": constrained, "25": constrained, "40": abundant}
    return {label: share for label, share in points.items() if label in labels}
