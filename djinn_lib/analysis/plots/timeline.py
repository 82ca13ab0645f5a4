"""Draw the course of a trace, or of a fleet: requests, and the contents of the ring over time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from djinn_lib.analysis.plots.style import (
    COLUMN_IN,
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    byte_scale,
    footnote,
    is_light,
    model_colors,
    nothing_to_draw,
    order_systems,
    require_one_cell_each,
    styled,
    system_look,
)
from djinn_lib.errors import RecordError
from djinn_lib.units import format_bytes

if TYPE_CHECKING:
    from djinn_lib.trace import Trace

_HIT, _PARTIAL, _MISS = "●", "◐", "○"
_MAX_GLYPHS = 60  # with more requests there is no room for a glyph each


@styled
def residency_over_time(rows: pd.DataFrame, system: str = "djinn") -> Figure:
    """Draw what is resident after each request of a system's first repeat.

    Three strips share the axis of requests: the resident bytes of each model, hatched if it is
    incomplete; the requested model, and whether all, a part or nothing of it was resident; and the
    loaded bytes. If the system does not report residency or was not run, the figure says so.

    Raises:
        RecordError: there are no rows, or they mix traces or capacities.
    """
    require_one_cell_each(rows, "the residency over time")
    known = order_systems(rows["system"])
    rows = rows[rows["system"] == system]
    if rows.empty:
        return nothing_to_draw(f"No rows of {system!r} here, only of: {', '.join(known)}.")
    rows = rows[rows["repeat"] == rows["repeat"].min()].sort_values("request")
    resident = resident_bytes(rows)
    if resident.empty:
        return nothing_to_draw(f"{system_look(system).label} does not report residency here.")
    figure, (held, asked, loaded) = plt.subplots(
        3, 1, sharex=True, figsize=(DOUBLE_COLUMN_IN, 3.5), layout="constrained",
        height_ratios=[5, 0.5, 1.6],
    )  # fmt: skip
    colors = model_colors({*resident.columns, *rows["model"]})
    sizes = _model_bytes(rows, resident)
    scale, unit = byte_scale(float(rows["capacity_bytes"].max()))
    _draw_held(held, resident, colors, sizes, scale)
    _draw_capacity(held, rows["capacity_bytes"].max() / scale, unit)
    held.set_ylabel(f"resident ({unit})")
    held.set_title(f"{system_look(system).label}: bytes of each model in the ring, by request")
    _draw_asked(asked, rows, colors)
    _draw_loaded(loaded, rows, colors, scale)
    loaded.set_ylabel(f"loaded ({unit})")
    figure.align_ylabels([held, loaded])
    _residency_legend(figure, colors, sizes, len(rows))
    failed = int((~rows["ok"]).sum())
    footnote(figure, [f"{failed} of {len(rows)} requests failed: no bars there."] if failed else [])
    return figure


def resident_bytes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the bytes resident after each request, one column for each model.

    Values that were not reported are NaN. The table is empty if the system never reports.
    """
    reports = [json.loads(text or "{}") for text in rows["resident_bytes"]]
    table = pd.DataFrame(reports, index=rows["request"].to_numpy())
    if not any(reports):
        return pd.DataFrame()
    table = table[sorted(table.columns)].fillna(0.0)
    table.loc[[not report for report in reports]] = np.nan
    return table


def _model_bytes(rows: pd.DataFrame, resident: pd.DataFrame) -> dict[str, float]:
    """Size of each model: after a request for it, all of it is resident."""
    needed = (rows["loaded_bytes"] + rows["resident_before_bytes"]).groupby(rows["model"]).max()
    sizes = resident.max().combine_first(needed)
    return {str(model): float(size) for model, size in sizes.items()}


def _draw_held(
    axes: Axes,
    resident: pd.DataFrame,
    colors: Mapping[str, str],
    sizes: Mapping[str, float],
    scale: float,
) -> None:
    base = np.zeros(len(resident))
    for model in resident.columns:
        height = resident[model].fillna(0.0).to_numpy() / scale
        whole = height * scale >= sizes[model]
        for part, hatch in ((whole, ""), (~whole, "/////")):
            axes.bar(
                resident.index[part], height[part], 1.0, base[part], color=colors[model],
                hatch=hatch, edgecolor="white", linewidth=0.4,
            )  # fmt: skip
        base += height
    axes.set_xlim(-0.6, len(resident) - 0.4)
    axes.set_ylim(0, max(float(base.max()), 1e-9))


def _draw_capacity(axes: Axes, capacity: float, unit: str) -> None:
    axes.axhline(capacity, color="black", linestyle="--", linewidth=1.0)
    axes.annotate(
        f"capacity {capacity:.{0 if capacity >= 100 else 1}f} {unit}", (1.0, capacity), (0, 2),
        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        va="bottom", fontsize=SMALL_PT,
    )  # fmt: skip
    axes.set_ylim(0, max(capacity, axes.get_ylim()[1]) * 1.12)


def _draw_asked(axes: Axes, rows: pd.DataFrame, colors: Mapping[str, str]) -> None:
    axes.bar(rows["request"], 1.0, 1.0, color=rows["model"].map(colors), edgecolor="white")
    axes.set_yticks([0.5], ["asked for"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(rows) > _MAX_GLYPHS:
        return
    columns = ["request", "model", "loaded_bytes", "resident_before_bytes"]
    for request, model, loaded, before in rows.loc[rows["ok"], columns].itertuples(index=False):
        glyph = _HIT if loaded == 0 else _PARTIAL if before else _MISS
        ink = "black" if is_light(colors[model]) else "white"
        axes.text(request, 0.46, glyph, color=ink, ha="center", va="center", fontsize=SMALL_PT)


def _draw_loaded(axes: Axes, rows: pd.DataFrame, colors: Mapping[str, str], scale: float) -> None:
    loaded = rows["loaded_bytes"] / scale
    axes.bar(rows["request"], loaded, 0.8, color=rows["model"].map(colors))
    axes.set_ylim(0, max(float(loaded.max()) * 1.08, 1e-9))
    axes.set_xlabel("request, in the order served")
    axes.grid(axis="y")


def _residency_legend(
    figure: Figure, colors: Mapping[str, str], sizes: Mapping[str, float], n_requests: int
) -> None:
    handles: list[Patch | Line2D] = [
        Patch(color=color, label=f"{model}\n({format_bytes(round(sizes.get(model, 0)))})")
        for model, color in colors.items()
    ]
    handles.append(Patch(facecolor="0.6", hatch="/////", edgecolor="white", label="only in part"))
    if n_requests <= _MAX_GLYPHS:
        texts = {_HIT: "found whole", _PARTIAL: "found in part", _MISS: "not resident"}
        handles += [
            Line2D([], [], linestyle="", marker=f"${glyph}$", color="black", label=text)
            for glyph, text in texts.items()
        ]
    figure.legend(handles=handles, loc="outside right upper")


@styled
def trace_timeline(trace: Trace) -> Figure:
    """Draw one mark for each request, in order, on the line of its model.

    A filled mark is a switch: the model differs from that of the previous request.

    Raises:
        RecordError: the trace has no requests.
    """
    models = [request.model for request in trace.requests]
    if not models:
        raise RecordError("the trace has no requests to draw: choose another trace")
    colors = model_colors(trace.params.get("models", trace.models))
    lines = {model: i for i, model in enumerate(sorted(colors, reverse=True))}
    height = [lines[model] for model in models]
    figure, axes = plt.subplots(
        figsize=(DOUBLE_COLUMN_IN, 0.6 + 0.3 * len(lines)), layout="constrained"
    )
    axes.step(range(len(models)), height, where="mid", color="0.75", linewidth=0.8, zorder=1)
    edges = [colors[model] for model in models]
    same = [False, *(model == before for before, model in pairwise(models))]
    faces = ["white" if stays else edge for stays, edge in zip(same, edges, strict=True)]
    axes.scatter(range(len(models)), height, s=34, c=faces, edgecolors=edges, zorder=2)
    axes.set_yticks(list(lines.values()), list(lines))
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel("request, in the order served (filled: another model than the one before)")
    return figure


@styled
def requests_and_ring(
    requests: pd.DataFrame, residency: pd.DataFrame, capacity_bytes: int, reason: str | None = None
) -> Figure:
    """Draw every request as a line, and below it the bytes of each model on the ring.

    Args:
        requests: columns model, request, begin_s, first_s, end_s.
        residency: columns at_s, model, resident_bytes.
        capacity_bytes: of the ring.
        reason: why there is nothing to draw on this machine.
    """
    if reason:
        return nothing_to_draw(f"Not on this machine: {reason}")
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(COLUMN_IN, 3.4), sharex=True, layout="constrained"
    )
    colors = model_colors(requests["model"])
    for y, row in enumerate(requests.sort_values(["model", "begin_s"]).itertuples()):
        color = colors[str(row.model)]
        above.plot([row.begin_s, row.first_s], [y, y], color=color, linewidth=0.8, alpha=0.4)
        above.plot([row.first_s, row.end_s], [y, y], color=color, linewidth=2.0)
    above.set_yticks([])
    above.set_ylabel("requests")
    scale, unit = byte_scale(capacity_bytes)
    if not residency.empty:
        table = residency.pivot_table(index="at_s", columns="model", values="resident_bytes")
        table = table.fillna(0)[sorted(colors)]
        below.stackplot(table.index, table.T / scale, labels=list(table), step="post",
                        colors=[colors[model] for model in table])  # fmt: skip
        figure.legend(loc="outside upper center", ncols=len(colors))
    below.axhline(capacity_bytes / scale, color="black", linewidth=0.8, linestyle="--")
    below.set_ylabel(f"on the ring ({unit})")
    below.set_xlabel("seconds")
    footnote(figure, ["thin: waiting for the first token; thick: decoding; dashed: the ring"])
    return figure
