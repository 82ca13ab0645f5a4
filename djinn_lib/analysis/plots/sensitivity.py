"""The sensitivity of speed-up and hit share to the capacity."""

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
    footnote,
    order_systems,
    require_rows,
    sample_note,
    split_unavailable,
    styled,
    system_look,
    unavailable_notes,
)
from djinn_lib.analysis.results import hit_table, speedup_table
from djinn_lib.errors import RecordError
from djinn_lib.metrics import HIT_MS

_RING: dict[str, Any] = {"markersize": 8.5, "markerfacecolor": "none", "linestyle": ":"}


@styled
def sensitivity(
    rows: pd.DataFrame, baseline: str = "pytorch_pinned", paper: Mapping[str, Any] | None = None
) -> Figure:
    """Draw speed-up over a baseline and share of hits against the capacity.

    The speed-up is drawn twice: that of the median, as the paper does, and that of the mean up to
    decoding, for a median does not change where half of the requests find their weights.

    Args:
        rows: of one trace at several capacities.
        baseline: label of the system that the others are compared with, capacity by capacity.
        paper: published numbers; the paper's ranges are then marked.

    Raises:
        RecordError: there are no rows, they mix traces, or the baseline is not among them.
    """
    _require_sweep(rows, baseline)
    rows, unavailable = split_unavailable(rows)
    capacities = rows.groupby("capacity_label")["capacity_bytes"].max().sort_values()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(DOUBLE_COLUMN_IN, 2.9), layout="constrained"
    )
    speedups = speedup_table(rows, baseline)
    _draw_speedups(left, speedups, list(capacities.index))
    left.axhline(1.0, color=system_look(baseline).color, linewidth=1.0, linestyle=":")
    left.set(ylabel=f"times lower than\n{system_look(baseline).label}", title="Speed-up of latency")
    left.set_ylim(0, float(np.nanmax([*speedups["high"], *speedups["up_to_decoding"], 1.0])) * 1.15)
    _draw_hits(right, hit_table(rows), list(capacities.index))
    right.set(ylabel="requests", ylim=(-4, 112), title="Requests that found their weights")
    right.yaxis.set_major_formatter(PercentFormatter())
    right.set_yticks(range(0, 101, 20))
    handles = _legend(order_systems(rows["system"]), baseline)
    if paper:
        _mark_published(left, right, paper)
    for axes in (left, right):
        _label_capacities(axes, capacities)
    n_columns = max(2, len(handles) - 2)  # systems above, what the marks mean below
    figure.legend(handles=handles, loc="outside upper center", ncols=n_columns)
    footnote(figure, [sample_note(rows), *unavailable_notes(unavailable)])
    return figure


def _require_sweep(rows: pd.DataFrame, baseline: str) -> None:
    require_rows(rows, "the sensitivity to the capacity")
    for column in ("trace", "mode"):
        if len(values := sorted(rows[column].unique())) > 1:
            raise RecordError(
                f"expected rows of one {column} to draw the sensitivity from, got {values}: "
                "filter them"
            )
    if baseline not in set(rows["system"]):
        raise RecordError(
            f"expected rows of the baseline {baseline!r}, got systems "
            f"{order_systems(rows['system'])}: run its cells, or name another baseline"
        )


def _draw_speedups(axes: Axes, table: pd.DataFrame, labels: Sequence[str]) -> None:
    systems = order_systems(table["system"])
    for system, part in table.groupby("system"):
        look, shift = system_look(str(system)), _shift(systems.index(str(system)), len(systems))
        part = part.set_index("capacity_label").reindex(list(labels))
        spread = np.abs(part[["low", "high"]].T.to_numpy() - part["speedup"].to_numpy())
        places = np.arange(len(labels)) + shift
        axes.plot(places, part["up_to_decoding"], color=look.color, marker=look.marker, **_RING)
        axes.errorbar(
            places, part["speedup"], spread, color=look.color,
            linestyle=look.linestyle, marker=look.marker, markersize=5, capsize=2.5,
            elinewidth=1.0,
        )  # fmt: skip


def _draw_hits(axes: Axes, table: pd.DataFrame, labels: Sequence[str]) -> None:
    systems = order_systems(table["system"])
    for system, part in table.groupby("system"):
        look, shift = system_look(str(system)), _shift(systems.index(str(system)), len(systems))
        part, places = (
            part.set_index("capacity_label").reindex(list(labels)),
            np.arange(len(labels)),
        )
        common: dict[str, Any] = {"color": look.color, "marker": look.marker}
        axes.plot(places + shift, part["fast"], **common, **_RING)
        axes.plot(places + shift, part["hit"], markersize=5, linestyle=look.linestyle, **common)


def _shift(number: int, n_systems: int) -> float:
    """Set systems a little apart, so that equal values do not hide each other."""
    return 0.09 * (number - (n_systems - 1) / 2)


def _label_capacities(axes: Axes, capacities: pd.Series) -> None:
    scale, unit = byte_scale(float(capacities.max()))
    digits = 0 if scale < 1024**3 else 1
    texts = [f"{label}\n{size / scale:.{digits}f} {unit}" for label, size in capacities.items()]
    axes.set_xticks(range(len(texts)), texts)
    axes.set_xlim(-0.45, len(texts) - 0.55)
    axes.set_xlabel("capacity: the paper's (GiB), and here")
    axes.grid(axis="y")


def _legend(systems: Sequence[str], baseline: str) -> list[Line2D]:
    handles: list[Line2D] = []
    for system in systems:
        look = system_look(system)
        label = look.label + (" (baseline)" if system == baseline else "")
        line: dict[str, Any] = {
            "color": look.color,
            "linestyle": look.linestyle,
            "marker": look.marker,
        }
        handles.append(Line2D([], [], markersize=5, label=label, **line))
    grey: dict[str, Any] = {"color": "0.3", "marker": "o"}
    filled, ring = "left: median; right: loaded no byte", "left: mean up to decoding"
    ring += f"; right: switch < {HIT_MS:.0f} ms"
    marks = [
        Line2D([], [], markersize=5, label=filled, **grey),
        Line2D([], [], label=ring, **_RING, **grey),
    ]
    return [*handles[:1], marks[0], *handles[1:2], marks[1], *handles[2:]]  # column by column


def _mark_published(left: Axes, right: Axes, paper: Mapping[str, Any]) -> None:
    low, high = paper["sensitivity"]["speedup"]
    left.axhspan(low, high, color="0.55", alpha=0.6, linewidth=1.0)  # visible at any scale
    left.set_ylim(0, max(left.get_ylim()[1], high * 1.15))  # room for the words above
    _write_inside(left, high, f"paper {low:g} to {high:g}x", right=True)
    low, high = (100 * share for share in paper["sensitivity"]["hit_share"])
    right.axhspan(low, high, color="0.55", alpha=0.15, linewidth=0)
    _write_inside(right, high, f"paper {low:.0f}% (constrained) to {high:.0f}% (abundant)")


def _write_inside(axes: Axes, height: float, text: str, right: bool = False) -> None:
    axes.annotate(
        text, (float(right), height), (-3 if right else 3, 2), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right" if right else "left", fontsize=SMALL_PT, color="0.3",
    )  # fmt: skip
