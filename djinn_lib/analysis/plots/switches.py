"""Draw the cost of switches in sequential and concurrent mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from djinn_lib.analysis.plots.style import (
    COLUMN_IN,
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    describe_rows,
    draw_cdf,
    label_ms,
    legend_above,
    nothing_to_draw,
    order_systems,
    require_one_cell_each,
    split_unavailable,
    styled,
    system_look,
)
from djinn_lib.metrics import attempted, later_touches, served

_LEAST_MS = 0.01  # start of a logarithmic axis; smaller values are drawn there


FOUND = {"whole": "^", "in part": "s", "not at all": "v"}  # part resident before a request


_CDF_IN = 2.6  # height without the legend


@styled
def switch_cdf(rows: pd.DataFrame, paper: Mapping[str, Any]) -> Figure:
    """Draw the distribution of the cost of switches, for each system, of rows in sequential mode.

    Each request is drawn at the mean of its repeats. Marks on Djinn's curve show how much of the
    model was resident in the first repeat. The paper's three modes of Djinn's switches are grey.
    """
    require_one_cell_each(rows, "a CDF of switches")
    rows, unavailable = split_unavailable(rows)
    figure, axes = plt.subplots(figsize=(COLUMN_IN, _CDF_IN), layout="constrained")
    axes.set_xscale("log")
    for system in order_systems(rows["system"]):
        part, look = rows[rows["system"] == system], system_look(system)
        shown = part.assign(ms=part["switch_ms"].clip(lower=_LEAST_MS))
        shown["ms"] = shown.groupby("request")["ms"].transform("mean")
        draw_cdf(axes, shown, "ms", **look.line)
        if system == "djinn":
            _mark_found(axes, shown, look.color)
    _shade_modes(axes, paper)
    axes.set(xlabel="cost of the switch (ms, log scale)", ylabel="share of requests", ylim=(0, 103))
    axes.yaxis.set_major_formatter(PercentFormatter())
    label_times(axes)
    axes.grid(which="major")
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        height_in = legend_above(figure, handles, 2, handlelength=1.8, columnspacing=1.0,
                                 handletextpad=0.5)  # fmt: skip
        figure.set_figheight(_CDF_IN + height_in)
    describe_rows(figure, rows, unavailable, *_least_note(rows))
    return figure


def _mark_found(axes: Axes, rows: pd.DataFrame, color: str) -> None:
    done = served(rows).drop_duplicates("request").sort_values("ms")
    heights = 100 * np.arange(1, len(done) + 1) / rows["request"].nunique()
    before, loaded = done["resident_before_bytes"], done["loaded_bytes"]
    kinds = np.select([loaded == 0, before > 0], ["whole", "in part"], "not at all")
    for kind, marker in FOUND.items():
        of_kind = kinds == kind
        label = f"Djinn, found {kind}: {of_kind.mean():.0%}" if len(done) else kind
        axes.plot(done["ms"][of_kind], heights[of_kind], marker, color=color, markersize=3.5,
                  markerfacecolor="white", label=label)  # fmt: skip


def _shade_modes(axes: Axes, paper: Mapping[str, Any]) -> None:
    """Shade the paper's modes of switches, with their shares above the axes, clear of curves."""
    low, high = axes.get_xlim()
    high = max(high, 4e4)
    for number, mode in enumerate(paper.get("switches_of_djinn", [])):
        left, right = max(mode["low_ms"], low), mode["high_ms"] or high
        axes.axvspan(left, right, color="0.55", alpha=0.16, linewidth=0)
        axes.annotate(
            f"{'paper: ' * (number == 0)}{mode['share']:.0%}", ((left * right) ** 0.5, 1), (0, 2),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
            fontsize=SMALL_PT, color="0.3", annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(low, high)


def _least_note(rows: pd.DataFrame) -> list[str]:
    """Return a note if switches are drawn at the left end that cost less."""
    n = int((served(rows)["switch_ms"] < _LEAST_MS).sum())
    return [f"{n} switches below {_LEAST_MS} ms are drawn at it."] if n else []


@styled
def switches_beside_waiting(
    concurrent: pd.DataFrame, sequential: pd.DataFrame, left_out: Sequence[str] = ()
) -> Figure:
    """Draw the remaining cost of switches in concurrent mode, and the total latencies.

    Left: the distribution of the cost of switches, without the first request for each model. Right:
    the distribution of the time from arrival to the last token. Grey: Djinn in sequential mode.
    Systems that were prevented from batching are named in a note instead.

    Args:
        concurrent: rows of one trace and capacity in mode "concurrent"; may be empty.
        sequential: rows of `djinn` on the same trace at the same capacity, for comparison.
        left_out: systems whose rows would be unfair to them (`selection.could_not_batch`).
    """
    notes = _left_out(left_out)
    if attempted(concurrent).empty:
        return nothing_to_draw(" ".join(["This run has no concurrent cells here.", *notes]))
    label = "from arrival to the last token (ms, log scale)"
    return _switches_and_totals(concurrent, label, notes, attempted(sequential))


@styled
def switches_on_a_longer_trace(rows: pd.DataFrame) -> Figure:
    """Draw the cost of switches and the total latencies on a trace that not every run has.

    Left: the distribution of the cost of switches, without the first request for each model. Right:
    the distribution of total latencies. The rows, of one cell in sequential mode, may be none.
    """
    if attempted(rows).empty:
        return nothing_to_draw("This run has no rows of this trace.")
    return _switches_and_totals(rows, "total latency of a request (ms, log scale)")


def _left_out(systems: Sequence[str]) -> list[str]:
    names = [system_look(system).label for system in order_systems(systems)]
    why = "vLLM batches by default, and was given one request at a time"
    return [f"Left out: {', '.join(names)} ({why})."] if names else []


def _switches_and_totals(
    rows: pd.DataFrame, label: str, notes: Sequence[str] = (), before: pd.DataFrame | None = None
) -> Figure:
    """Draw later switches (left) and total latencies (right) of every system.

    `label` is that of the right axis. `before` has rows of Djinn in sequential mode, drawn in grey.
    """
    rows, unavailable = split_unavailable(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(DOUBLE_COLUMN_IN, 2.6), sharey=True, layout="constrained"
    )
    for axes in (left, right):
        axes.set_xscale("log")
    for system in order_systems(rows["system"]):
        part, look = rows[rows["system"] == system], system_look(system)
        _draw_switches(left, part, **look.line)
        draw_cdf(right, part, "total_ms", **look.line)
    later = later_touches(rows)
    n_left = later.groupby("system")["request"].nunique().max() if len(later) else 0
    first = [f"Left: n = {n_left}, without the first request for each model."] if n_left else []
    describe_rows(figure, rows, unavailable, *first, *_least_note(later), *notes)
    if before is not None:
        _draw_switches(left, before, color="0.6", linestyle="-", label="Djinn, one after the other")
    left.set(xlabel="cost of the switch (ms, log scale)", ylabel="share of requests")
    right.set_xlabel(label)
    left.yaxis.set_major_formatter(PercentFormatter())
    for axes in (left, right):
        axes.set_ylim(0, 103)
        label_times(axes)
        axes.grid(which="major")
    legend_above(figure, left.get_legend_handles_labels()[0], 3)
    return figure


def _draw_switches(axes: Axes, rows: pd.DataFrame, **style: Any) -> None:
    later = later_touches(rows)
    draw_cdf(axes, later.assign(ms=later["switch_ms"].clip(lower=_LEAST_MS)), "ms", **style)


def label_times(axes: Axes) -> None:
    """Label powers of ten, and also 2 and 5 between them if there are few."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    label_ms(axes.xaxis)
    axes.xaxis.set_minor_formatter(NullFormatter())
