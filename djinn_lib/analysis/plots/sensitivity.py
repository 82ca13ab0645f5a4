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
from matplotlib.ticker import PercentFormatter

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    byte_scale,
    describe_rows,
    legend_above,
    order_systems,
    require_one_cell_each,
    split_unavailable,
    styled,
    system_look,
)
from djinn_lib.analysis.results import hit_table, speedup_table
from djinn_lib.errors import RecordError
from djinn_lib.metrics import HIT_MS

_PAPER: dict[str, Any] = {"color": "0.3", "linestyle": "", "marker": "D", "markersize": 6,
                          "markerfacecolor": "none"}  # fmt: skip


@styled
def sensitivity(
    rows: pd.DataFrame, baseline: str = "pytorch_pinned", paper: Mapping[str, Any] | None = None
) -> Figure:
    """Draw speed-up over a baseline and both kinds of hits against the capacity.

    Of the paper's numbers, if given, a band shows the range of speed-ups, and points the hits.

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
    capacities = rows.groupby("capacity_label")["capacity_bytes"].max().sort_values()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(DOUBLE_COLUMN_IN, 2.7), layout="constrained"
    )
    systems, labels = order_systems(rows["system"]), list(capacities.index)
    speedups, hits = speedup_table(rows, baseline), hit_table(rows)
    spread = speedups.assign(value=speedups["speedup"])
    _draw(left, spread, systems, labels, (speedups["low"], speedups["high"]))
    left.axhline(1.0, color=system_look(baseline).color, linewidth=1.0, linestyle=":")
    left.set(ylabel=f"times lower than {system_look(baseline).label}", title="Median latency")
    left.set_ylim(0, float(np.nanmax([*speedups["high"], 1.0])) * 1.15)
    for axes, column, title in (
        (middle, "hit", "Requests that loaded nothing"),
        (right, "fast", f"Switches below {HIT_MS:.0f} ms"),
    ):
        _draw(axes, hits.assign(value=hits[column]), systems, labels)
        axes.set(ylabel="share of requests", ylim=(-4, 112), title=title)
        axes.yaxis.set_major_formatter(PercentFormatter())
        axes.set_yticks(range(0, 101, 20))
    if paper:
        _mark_published(left, middle, paper, labels)
    for axes in (left, middle, right):
        _label_capacities(axes, capacities)
    handles = _legend(systems, baseline, with_paper=bool(paper))
    legend_above(figure, handles, min(4, len(handles)))
    describe_rows(figure, rows, unavailable)
    return figure


def _draw(
    axes: Axes,
    table: pd.DataFrame,
    systems: Sequence[str],
    labels: Sequence[str],
    interval: tuple[pd.Series, pd.Series] | None = None,
) -> None:
    """Draw a line for each system through column `value`, with intervals if given."""
    if interval:
        table = table.assign(below=table["value"] - interval[0], above=interval[1] - table["value"])
    for system, part in table.groupby("system"):
        look = system_look(str(system))
        part = part.set_index("capacity_label").reindex(list(labels))
        sides = part[["below", "above"]].T.to_numpy() if interval else None
        axes.errorbar(
            np.arange(len(labels)) + _shift(systems.index(str(system)), len(systems)),
            part["value"], sides, color=look.color, linestyle=look.linestyle, marker=look.marker,
            markersize=4.5, capsize=2.5, elinewidth=1.0,
        )  # fmt: skip


def _shift(number: int, n_systems: int) -> float:
    """Return a small offset for a system, so that equal values do not hide each other."""
    return 0.09 * (number - (n_systems - 1) / 2)


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
    axes.set_xlim(-0.45, len(here) - 0.55)
    axes.grid(axis="y")


def _legend(systems: Sequence[str], baseline: str, with_paper: bool) -> list[Line2D]:
    handles = []
    for look, system in zip(map(system_look, systems), systems, strict=True):
        label = look.label + (" (baseline)" if system == baseline else "")
        style = look.line | {"label": label, "marker": look.marker, "markersize": 4.5}
        handles.append(Line2D([], [], **style))
    return [*handles, Line2D([], [], label="paper", **_PAPER)] if with_paper else handles


def _mark_published(
    left: Axes, middle: Axes, paper: Mapping[str, Any], labels: Sequence[str]
) -> None:
    low, high = paper["sensitivity"]["speedup"]
    left.axhspan(low, high, color="0.55", alpha=0.6, linewidth=1.0)  # visible at any scale
    left.set_ylim(0, max(left.get_ylim()[1], high * 1.15))  # room for the text above
    left.annotate(
        f"paper {low:g} to {high:g}x", (1, high), (-3, 2), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=SMALL_PT, color="0.3",
    )  # fmt: skip
    constrained, abundant = (100 * share for share in paper["sensitivity"]["hit_share"])
    # The paper gives the hits at its main capacity and at both ends of its sweep.
    points = {"20": constrained, "25": constrained, "40": abundant}
    known = {label: share for label, share in points.items() if label in labels}
    middle.plot([labels.index(label) for label in known], [*known.values()], **_PAPER, zorder=5)
