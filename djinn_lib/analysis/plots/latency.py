"""Draw one trace at one capacity: latencies, their parts, and the bytes moved.

No figure drops a system silently: failed requests are marked, and a system that cannot run on this
machine is named in a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from djinn_lib.analysis.plots.style import (
    COLUMN_IN,
    DOUBLE_COLUMN_IN,
    PHASE_COLORS,
    SMALL_PT,
    SYSTEM_STYLE,
    byte_scale,
    describe_rows,
    draw_cdf,
    label_ms,
    legend_above,
    order_systems,
    require_one_cell_each,
    split_unavailable,
    styled,
    system_look,
)
from djinn_lib.analysis.plots.switches import label_times
from djinn_lib.metrics import bootstrap_interval, by_request, phases_ms, served
from djinn_lib.units import three_digits

# The systems that the paper compares, and variants of vLLM that it does not.
COMPARED = ("djinn", "djinn_vllm", "pytorch_pinned", "pytorch_pageable", "serverless_warm",
            "serverless_cold", "vllm_recreate", "vllm_sleep", "vllm_sleep_readonly")  # fmt: skip

_CDF_IN = 2.3  # height without the legend
_HOLLOW: dict[str, Any] = {"linestyle": "", "marker": "D", "markersize": 4.5,
                           "markerfacecolor": "white"}  # fmt: skip


@styled
def latency_cdf(rows: pd.DataFrame, paper: Mapping[str, Any] | None = None) -> Figure:
    """Draw the share of requests that were served within a given time, for each system.

    Each request is drawn at the mean of its repeats. Failed requests count in the denominator. The
    curve of a system with failed requests therefore ends below 100%, at a cross. Of the paper's
    numbers, if given, hollow diamonds mark P50 and P99, and a line the share of requests at which
    its vLLM ends.

    Raises:
        RecordError: there are no rows, or they mix traces or capacities.
    """
    require_one_cell_each(rows, "a latency CDF")
    rows, unavailable = split_unavailable(rows)
    systems = order_systems(rows["system"])
    figure, axes = plt.subplots(figsize=(COLUMN_IN, _CDF_IN), layout="constrained")
    axes.set_xscale("log")
    for system in systems:
        label = _label(rows, system, before_notes="\n")
        _draw_system(axes, rows[rows["system"] == system], system, label)
        if paper:
            _draw_published(axes, paper, system)
    axes.set(ylim=(0, 103), xlabel="total latency of a request (ms, log scale)")
    axes.set_ylabel("share of all requests served")
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.grid(which="major")
    handles = axes.get_legend_handles_labels()[0]
    if paper:
        handles.append(Line2D([], [], **_HOLLOW, markeredgecolor="black", label="paper: P50, P99"))
        handles += _draw_ceiling(axes, paper)
    if handles:
        height_in = legend_above(figure, handles, 2, handlelength=1.8, columnspacing=1.0)
        figure.set_figheight(_CDF_IN + height_in)
    axes.margins(x=0.03)
    axes.autoscale(axis="x")
    label_times(axes)
    describe_rows(figure, rows, unavailable)
    return figure


def _draw_ceiling(axes: Axes, paper: Mapping[str, Any]) -> list[Line2D]:
    """Draw where the curve of the paper's vLLM ends; some of its requests failed."""
    completed = paper.get("systems", {}).get("vllm_recreate", {}).get("completed")
    if completed is None:
        return []
    share = 100 * completed / paper["setup"]["n_requests"]
    look: dict[str, Any] = {"color": "0.35", "linestyle": (0, (1, 1.5)), "linewidth": 1.1}
    axes.axhline(share, **look, zorder=1)
    return [Line2D([], [], label=f"paper: vLLM ends at {share:.0f}%", **look)]


def _draw_system(axes: Axes, rows: pd.DataFrame, system: str, label: str) -> None:
    look, n_all, n_failed = system_look(system), len(rows), int((~rows["ok"]).sum())
    draw_cdf(axes, rows, "total_ms", **look.line | {"label": label}, zorder=_front(system))
    if 0 < n_failed < n_all:
        end = by_request(served(rows)).max(), 100.0 * (n_all - n_failed) / n_all
        axes.plot(*end, "x", color=look.color, markersize=6, markeredgewidth=1.6)


def _front(system: str) -> float:
    """Return the z-order of a system: those first in the legend are drawn on top."""
    known = list(SYSTEM_STYLE)
    return 3.0 - (known.index(system) if system in known else len(known)) / 100


def _draw_published(axes: Axes, paper: Mapping[str, Any], system: str) -> None:
    published = paper.get("systems", {}).get(system, {})
    for name, height in (("p50_total_ms", 50.0), ("p99_total_ms", 99.0)):
        if name in published:
            axes.plot(published[name], height, **_HOLLOW,
                      markeredgecolor=system_look(system).color, clip_on=False)  # fmt: skip


@styled
def latency_breakdown(rows: pd.DataFrame) -> Figure:
    """Draw the mean latency of each system with its interval, and the shares of its parts.

    Left: milliseconds with 95% intervals over requests. The scale is logarithmic because systems
    differ by orders of magnitude. Right: queue, switch, prefill and decode as shares of each
    system's own total. Failed requests have no times and are left out; the label counts them.

    Raises:
        RecordError: there are no rows, or they mix traces or capacities.
    """
    require_one_cell_each(rows, "a latency breakdown")
    rows, unavailable = split_unavailable(rows)
    done = served(rows)
    phases = phases_ms(done).groupby(done["system"]).mean().reindex(order_systems(rows["system"]))
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(DOUBLE_COLUMN_IN, _bars_height(len(phases))),
        layout="constrained", width_ratios=[1.15, 1],
    )  # fmt: skip
    _stack(right, phases.div(phases.sum(axis=1, min_count=1), axis=0) * 100)
    left.set_xscale("log")
    left.grid(axis="x")
    for place, system in enumerate(phases.index):
        _draw_mean(left, rows[rows["system"] == system], place, system_look(system).color)
    left.margins(x=0.16)
    label_ms(left.xaxis)
    left.set_yticks(range(len(phases)), _bar_labels(rows, phases.index))
    left.set(xlabel="mean latency of a served request (ms, log scale)")
    right.set(xlabel="share of it", xlim=(0, 100))
    right.xaxis.set_major_formatter(PercentFormatter())
    handles = [
        Patch(color=color, label=name if phases[name].any() else f"{name} (none)")
        for name, color in PHASE_COLORS.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    bars = "Bars: 95% intervals of the mean, over requests."
    describe_rows(figure, rows, unavailable, bars)
    return figure


def _draw_mean(axes: Axes, rows: pd.DataFrame, place: int, color: str) -> None:
    mean, low, high = bootstrap_interval(np.mean, by_request(rows))
    if np.isnan(mean):
        return
    sides = np.nan_to_num([[mean - low], [high - mean]])
    axes.errorbar(mean, place, xerr=sides, fmt="o", color=color, markersize=4, capsize=2.5)
    _write_after(axes, mean if np.isnan(high) else high, place, three_digits(mean))


def _stack(axes: Axes, table: pd.DataFrame) -> None:
    """Draw one stacked bar for each row; the first column is next to the axis."""
    axes.grid(axis="x")
    if table.empty:
        return
    long = table.rename_axis("system").reset_index().melt("system", var_name="phase").fillna(0.0)
    sns.histplot(
        long, y="system", hue="phase", weights="value", multiple="stack", discrete=True,
        shrink=0.72, hue_order=[*reversed(PHASE_COLORS)], palette=PHASE_COLORS, alpha=1.0,
        edgecolor="white", linewidth=0.4, legend=False, ax=axes,
    )  # fmt: skip
    axes.set_ylabel("")


@styled
def bytes_loaded(
    rows: pd.DataFrame, optimal_bytes: float | None = None, compulsory_bytes: float | None = None
) -> Figure:
    """Draw the bytes of weights that each system loaded and wrote back for the trace.

    The mean of the repeats is drawn, next to the bytes that the offline optimum loads within the
    capacity, and those of every model once, the minimum at any capacity.

    Raises:
        RecordError: there are no rows, or they mix traces or capacities.
    """
    require_one_cell_each(rows, "bytes loaded")
    rows, unavailable = split_unavailable(rows)
    columns = ["loaded_bytes", "writeback_bytes"]
    totals = rows.groupby(["system", "repeat"])[columns].sum().groupby("system").mean()
    totals = totals.reindex(order_systems(totals.index))
    lines = {"offline optimum": optimal_bytes, "every model once": compulsory_bytes}
    longest = max([1.0, *totals.sum(axis=1), *filter(None, lines.values())])
    scale, unit = byte_scale(float(longest))
    figure, axes = plt.subplots(
        figsize=(DOUBLE_COLUMN_IN, _bars_height(len(totals))), layout="constrained"
    )
    _draw_byte_bars(axes, totals / scale)
    handles: list[Patch | Line2D] = [
        Patch(facecolor="0.5", label="loaded"),
        Patch(facecolor="white", edgecolor="0.5", hatch="/////", label="written back to the host"),
    ]
    for (name, value), style in zip(lines.items(), ("--", ":"), strict=True):
        if value is not None:
            label = f"{name}: {three_digits(value / scale)} {unit}"
            axes.axvline(value / scale, color="black", linestyle=style, linewidth=1.1)
            handles.append(
                Line2D([], [], color="black", linestyle=style, linewidth=1.1, label=label)
            )
    axes.set_yticks(range(len(totals)), _bar_labels(rows, totals.index))
    axes.set_xlim(0, longest / scale * 1.16)
    axes.set_xlabel(f"weights moved for the whole trace ({unit})")
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    describe_rows(figure, rows, unavailable)
    return figure


def _draw_byte_bars(axes: Axes, totals: pd.DataFrame) -> None:
    axes.grid(axis="x")
    if totals.empty:
        return
    together = totals.sum(axis=1)
    colors = {system: system_look(system).color for system in totals.index}
    bars = {"y": list(totals.index), "orient": "h", "width": 0.72, "ax": axes}
    written = sns.barplot(x=together, color="white", hatch="/////", **bars).containers[-1]
    for bar, color in zip(written, colors.values(), strict=True):
        bar.set_edgecolor(color)
    sns.barplot(x=totals["loaded_bytes"], hue=list(colors), palette=colors, saturation=1.0,
                legend=False, **bars)  # fmt: skip
    axes.set_ylabel("")
    for place, (loaded, back) in enumerate(totals.itertuples(index=False)):
        text = three_digits(loaded) + (f" + {three_digits(back)}" if back else "")
        _write_after(axes, loaded + back, place, text)


def _write_after(axes: Axes, value: float, place: int, text: str) -> None:
    axes.annotate(
        text, (value, place), (3, 0), textcoords="offset points", va="center",
        fontsize=SMALL_PT, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _bars_height(n_bars: int) -> float:
    return 0.9 + 0.21 * max(n_bars, 2)


def _bar_labels(rows: pd.DataFrame, systems: pd.Index) -> list[str]:
    return [_label(rows, system) for system in systems]


def _label(rows: pd.DataFrame, system: str, before_notes: str = " ") -> str:
    """Return a system's label; it says if requests failed, or were fewer than of the others."""
    own = rows[rows["system"] == system]
    n_failed, n, n_most = (~own["ok"]).sum(), own["request"].nunique(), rows["request"].nunique()
    notes = [f"{n_failed} of {len(own)} failed"] if n_failed else []
    notes += [f"first {n} requests"] if n < n_most else []
    return system_look(system).label + (f"{before_notes}({', '.join(notes)})" if notes else "")
