"""Draw the study of policies, and simulated next to measured requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    Look,
    footnote,
    require_rows,
    styled,
)
from djinn_lib.analysis.validation import errors
from djinn_lib.experiment.study import KNOWN, WHOLE_LRU, free_capacity

POLICY_STYLE: dict[Any, Look] = {
    WHOLE_LRU: Look("LRU, whole models", "#7F7F7F", "--", "v"),
    "lru": Look("LRU", "#E69F00", "-", "^"),
    "lfu": Look("LFU", "#56B4E9", "-", "s"),
    "ewma": Look("EWMA", "#CC79A7", "-", "D"),
    "adaptive": Look("adaptive", "#0072B2", "-", "o"),
    "lookahead": Look("lookahead", "#009E73", "-", "P"),
    KNOWN: Look("popularity known", "#D55E00", "--", "X"),
    "oracle": Look("oracle (optimum)", "#000000", ":", ""),
}
TRAFFIC = {"independent": "independent requests", "sessions": "sessions"}
_BAND = 0.05


@styled
def distance_to_optimum(study: pd.DataFrame) -> Figure:
    """Draw bytes loaded over the optimum against the skew of popularity.

    Each number of models and kind of traffic has a panel. Points are means over the capacities of
    the study.

    Raises:
        RecordError: the study has no points.
    """
    study = study[study["mode"] == "sequential"]
    require_rows(study, "the distance to the optimum")
    fleets, traffics = sorted(study["n_models"].unique()), list(study["traffic"].unique())
    figure, grid = plt.subplots(
        len(traffics), len(fleets), figsize=(DOUBLE_COLUMN_IN, 0.6 + 1.75 * len(traffics)),
        sharex=True, sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for traffic, row in zip(traffics, grid, strict=True):
        for n_models, axes in zip(fleets, row, strict=True):
            part = study[(study["traffic"] == traffic) & (study["n_models"] == n_models)]
            _lines(axes, part, "alpha", "ratio")
            axes.set_title(f"{n_models} models")
            axes.grid(axis="y")
        row[0].set_ylabel(f"{TRAFFIC[traffic]}:\nbytes loaded / optimum")
        _ratio_scale(row[0])
    figure.supxlabel(r"skew $\alpha$ of the models' popularity", fontsize=8)
    _legend(figure, grid[0][0])
    return figure


@styled
def latencies_under_load(study: pd.DataFrame) -> Figure:
    """Draw mean latency and bytes over the optimum against the load of the GPU.

    Raises:
        RecordError: the study has no points with a queue.
    """
    queued = study[study["mode"] == "concurrent"]
    require_rows(queued, "latencies under load")
    figure, (left, right) = _two_panels(2.5)
    _lines(left, queued, "load", "mean_ms")
    left.set(ylabel="mean latency, ms", yscale="log", title="Latency, queueing included")
    _lines(right, queued, "load", "ratio")
    right.set(ylabel="bytes loaded / optimum", title="Bytes loaded")
    for axes in (left, right):
        axes.set_xlabel("load of the GPU if nothing had to be loaded")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
    _legend(figure, left)
    return figure


@styled
def capacity_that_suffices(study: pd.DataFrame, policy: str = "adaptive") -> Figure:
    """Draw the least capacity at which switching is free on average, against the skew.

    Raises:
        RecordError: the study has no points of that policy.
    """
    part = study[(study["mode"] == "sequential") & (study["policy"] == policy)]
    require_rows(part, f"the capacity that suffices with {policy}")
    free = free_capacity(part)
    traffics = list(part["traffic"].unique())
    figure, grid = plt.subplots(
        1, len(traffics), figsize=(DOUBLE_COLUMN_IN, 2.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    free["fleet"] = free["n_models"].map("{} models".format)
    for traffic, axes in zip(traffics, grid[0], strict=True):
        sns.lineplot(
            free[free["traffic"] == traffic], x="alpha", y="share", hue="fleet", palette="viridis",
            marker="o", markersize=5, errorbar=None, ax=axes,
        )  # fmt: skip
        axes.get_legend().remove()
        axes.set(title=TRAFFIC[traffic], xlabel=r"skew $\alpha$", ylim=(0, 1.05))
        axes.set_xlim(part["alpha"].min() - 0.1, part["alpha"].max() + 0.1)
        axes.set_xticks(sorted(part["alpha"].unique()))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y")
    grid[0][0].set_ylabel("capacity / all weights")
    _legend(figure, grid[0][0])
    footnote(figure, ["Least capacity tried at which a switch costs less than 10 ms on average; no "
                      "point where none is enough."])  # fmt: skip
    return figure


@styled
def measured_and_simulated(requests: pd.DataFrame) -> Figure:
    """Draw each request's simulated time against its measured one, and both distributions.

    Raises:
        RecordError: there are no requests from `djinn_lib.analysis.validation.compared`.
    """
    require_rows(requests, "measured and simulated times")
    figure, (left, right) = _two_panels(2.85)
    times_ms = requests[["measured_ms", "simulated_ms"]].to_numpy()
    ends = np.array([times_ms.min() * 0.85, times_ms.max() * 1.18])
    left.fill_between(ends, ends * (1 - _BAND), ends * (1 + _BAND), color="0.88", linewidth=0)
    left.plot(ends, ends, color="0.5", linewidth=0.8)
    loads = requests["measured_bytes"] > 0
    kinds = loads.map({False: "hit", True: "something to load"}).rename(None)
    looks = {"hit": ("#0072B2", "o"), "something to load": ("#D55E00", "^")}
    sns.scatterplot(
        requests, x="measured_ms", y="simulated_ms", hue=kinds, style=kinds, s=28, alpha=0.8,
        hue_order=looks, palette={name: color for name, (color, _) in looks.items()},
        markers={name: marker for name, (_, marker) in looks.items()}, linewidth=0, ax=left,
    )  # fmt: skip
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured time, ms",
             ylabel="simulated time, ms", title="Each request")  # fmt: skip
    left.legend(loc="upper left")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(plain)
    for label, style, color, width in (("measured", "-", "0.65", 2.6), ("simulated", "--", "k", 1)):
        sns.ecdfplot(requests, x=f"{label}_ms", linestyle=style, color=color, linewidth=width,
                     label=label, ax=right)  # fmt: skip
    right.set(xlabel="measured or simulated time, ms", ylabel="share of requests", title="All",
              ylim=(0, 1.03))  # fmt: skip
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.legend(loc="lower right")
    equal = "equal" if errors(requests)["bytes_equal"].all() else "NOT equal"
    n, n_cells = len(requests), requests["source"].nunique()
    within = (requests["simulated_ms"] / requests["measured_ms"] - 1).abs() <= _BAND
    footnote(figure, [f"Both: n = {n:,} requests of {n_cells} cells. Measured times are medians of "
                      "the repeats.", f"Grey: within 5% ({within.mean():.1%} of requests). Bytes "
                      f"loaded are {equal} in every request."])  # fmt: skip
    return figure


@styled
def growth(scale: Mapping[str, Any]) -> Figure:
    """Draw time and memory of a simulation against its number of requests.

    `scale` is the content of ``scale.json``, from `benchmarks/simulator.py`.
    """
    table = pd.DataFrame(scale["growth"])
    require_rows(table, "the simulator's growth")
    figure, (left, right) = _two_panels(2.4)
    for policy, rows in table.groupby("policy", sort=False):
        look = POLICY_STYLE[policy]
        for axes, y in ((left, "seconds"), (right, "peak_mib")):
            sns.lineplot(rows, x="n_requests", y=y, color=look.color, marker=look.marker,
                         markersize=5, label=look.label, legend=False, ax=axes)  # fmt: skip
    ends = np.array([table["n_requests"].min(), table["n_requests"].max()])
    slope = table["seconds"].max() / ends[1]
    left.plot(ends, ends * slope, color="0.6", linestyle=":", label="proportional")
    left.set(xscale="log", yscale="log", xlabel="requests", ylabel="seconds", title="Time")
    right.set(xscale="log", ylim=(0, 1100), xlabel="requests", ylabel="MiB", title="Peak of memory")
    for axes in (left, right):
        axes.grid(axis="y")
    left.legend()
    return figure


def _two_panels(height_in: float) -> tuple[Figure, Sequence[Axes]]:
    return plt.subplots(1, 2, figsize=(DOUBLE_COLUMN_IN, height_in), layout="constrained")


def _lines(axes: Axes, points: pd.DataFrame, x: str, y: str) -> None:
    """Draw a line for each policy through the means of its points."""
    for policy, look in POLICY_STYLE.items():
        if policy in set(points["policy"]):
            sns.lineplot(points[points["policy"] == policy], x=x, y=y, errorbar=None, ax=axes,
                         **look.line, marker=look.marker, markersize=4, markeredgewidth=0,
                         legend=False)  # fmt: skip
    axes.set(xlabel="", ylabel="")
    axes.tick_params(labelsize=SMALL_PT)


def _ratio_scale(axes: Axes) -> None:
    """Set a logarithmic axis that begins at 1, so equal ratios are equal distances."""
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.97)
    axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    ncols = len(labels) if len(labels) <= 5 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=ncols,
                  title="simulated, not measured")  # fmt: skip
