"""Figures of what switches cost: where requests wait, and on a longer trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    draw_cdf,
    footnote,
    nothing_to_draw,
    order_systems,
    sample_note,
    split_unavailable,
    styled,
    system_look,
    unavailable_notes,
)
from djinn_lib.analysis.selection import COULD_NOT_BATCH
from djinn_lib.metrics import attempted, later_touches

_LEAST_MS = 0.01  # where a logarithmic axis begins; what is less is drawn there


@styled
def switches_beside_waiting(concurrent: pd.DataFrame, sequential: pd.DataFrame) -> Figure:
    """Draw what switches still cost when requests wait, and how long requests take altogether.

    Left: the share of requests whose switch cost no more than a time, the first for each model left
    out. Right: the share that was done within a time of its arrival. Grey: one after the other.
    Systems that could have batched are named in a note instead.

    Args:
        concurrent: rows of one trace and capacity in mode "concurrent"; may be empty.
        sequential: the rows of `djinn` on the same trace at the same capacity, for comparison.
    """
    unfair = concurrent["system"].isin(COULD_NOT_BATCH) & (
        concurrent["error_kind"] != "unavailable"
    )
    fair, left_out = concurrent[~unfair], _left_out(concurrent.loc[unfair, "system"])
    if attempted(fair).empty:
        return nothing_to_draw(" ".join(["This run has no concurrent cells here.", *left_out]))
    figure, (left, right) = _two_panels()
    _draw_systems(figure, left, right, fair, left_out)
    before = {"color": "0.6", "linestyle": "-", "label": "Djinn, one after the other"}
    _draw_switches(left, attempted(sequential), **before)
    _finish(figure, left, right, "from arrival to the last token (ms, log scale)")
    return figure


@styled
def switches_on_a_longer_trace(rows: pd.DataFrame) -> Figure:
    """Draw what switches cost, and how long requests take, on a trace that not every run has.

    Left: the share of requests whose switch cost no more than a time, the first for each model left
    out. Right: the share that was served within a time.

    Args:
        rows: of one trace and capacity, served in sequence; may be empty.
    """
    if attempted(rows).empty:
        return nothing_to_draw("This run has no rows of this trace.")
    figure, (left, right) = _two_panels()
    _draw_systems(figure, left, right, rows)
    _finish(figure, left, right, "total latency of a request (ms, log scale)")
    return figure


def _left_out(systems: pd.Series) -> list[str]:
    names = [system_look(system).label for system in order_systems(systems)]
    why = "vLLM batches by default, and was given one request at a time"
    return [f"Left out: {', '.join(names)} ({why})."] if names else []


def _two_panels() -> tuple[Figure, Sequence[Axes]]:
    figure, panels = plt.subplots(
        1, 2, figsize=(DOUBLE_COLUMN_IN, 2.6), sharey=True, layout="constrained"
    )
    for axes in panels:
        axes.set_xscale("log")
    return figure, panels


def _draw_systems(
    figure: Figure,
    left: Axes,
    right: Axes,
    rows: pd.DataFrame,
    left_out: Sequence[str] = (),
) -> None:
    """Both panels of every system, and below them on how many rows they rest."""
    rows, unavailable = split_unavailable(rows)
    for system in order_systems(rows["system"]):
        part, look = rows[rows["system"] == system], system_look(system)
        style = {"color": look.color, "linestyle": look.linestyle, "label": look.label}
        _draw_switches(left, part, **style)
        draw_cdf(right, part, "total_ms", **style)
    footnote(figure, [sample_note(rows), *unavailable_notes(unavailable), *left_out])


def _draw_switches(axes: Axes, rows: pd.DataFrame, **style: Any) -> None:
    later = later_touches(rows)
    draw_cdf(axes, later.assign(ms=later["switch_ms"].clip(lower=_LEAST_MS)), "ms", **style)


def _finish(figure: Figure, left: Axes, right: Axes, right_label: str) -> None:
    """Scales, labels and the legend."""
    left.set(xlabel="cost of the switch (ms, log scale)", ylabel="share of requests")
    right.set_xlabel(right_label)
    left.yaxis.set_major_formatter(PercentFormatter())
    for axes in (left, right):
        axes.set_ylim(0, 103)
        _label_times(axes)
        axes.grid(which="major")
    figure.legend(handles=left.get_legend_handles_labels()[0], loc="outside upper center", ncols=3)


def _label_times(axes: Axes) -> None:
    """Label powers of ten, and 2 and 5 between them where there are few."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
