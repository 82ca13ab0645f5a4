"""Build the widgets of `notebooks/explore.ipynb`, which redraw a simulated run."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from djinn_lib.analysis.plots.policies import POLICY_STYLE
from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    MODEL_COLORS,
    model_colors,
    save_figure,
    styled,
)
from djinn_lib.engine.memory.policies import POLICIES
from djinn_lib.errors import ConfigError
from djinn_lib.experiment.parameters import one_of
from djinn_lib.paths import RUNS
from djinn_lib.simulator.checkpoint_sizes import PAPER, fleet
from djinn_lib.simulator.cost_model import reference_costs
from djinn_lib.simulator.optimal import optimal_loads
from djinn_lib.simulator.simulate import PAGE_BYTES, simulate
from djinn_lib.trace import Trace, paper_trace, session_trace, zipf_trace

GIB = 2**30
N_REQUESTS = 300
SCREEN_DPI = 110
TRAFFIC = ("the paper's 30 requests", "independent requests", "sessions")
CHOICES = [*POLICIES, "oracle"]
KEPT = RUNS / "explore"  # files of the reader, not in git


def requests(traffic: str, sizes: dict[str, int], alpha: float) -> Trace:
    """Return the trace of a kind of traffic.

    Raises:
        ConfigError: there is no such traffic, or the paper's requests were chosen with a number of
            models other than three.
    """
    one_of(traffic, TRAFFIC, "traffic")
    if traffic == TRAFFIC[0]:
        if len(sizes) != len(PAPER):
            raise ConfigError(
                f"{traffic} are for {len(PAPER)} models, and {len(sizes)} were chosen: choose "
                f"{len(PAPER)} models or other traffic"
            )
        return paper_trace(models=list(sizes))
    make = session_trace if traffic == TRAFFIC[2] else zipf_trace
    return make(N_REQUESTS, alpha, list(sizes), seed=0, rate_per_s=1.0)


def capacities(n_models: int) -> tuple[float, float]:
    """Return the smallest and the largest capacity to offer (GiB), multiples of 0.5.

    The smallest holds the largest model. The largest holds all models.
    """
    sizes = fleet(n_models)
    least, most = max(sizes.values()), sum(sizes.values())
    return math.ceil(2 * least / GIB) / 2, math.ceil(2 * most / GIB + 1) / 2


@styled
def picture(
    capacity_gib: float = 25.0,
    n_models: int = 3,
    alpha: float = 1.0,
    link_gb_per_s: float = 54.0,
    policy: str = "lru",
    traffic: str = TRAFFIC[0],
) -> Figure:
    """Draw what is resident over time, the switches' distribution, and the bytes loaded.

    Args:
        capacity_gib: capacity of the ring.
        n_models: number of models; see `djinn_lib.simulator.checkpoint_sizes`.
        alpha: skew of the models' popularity; the paper's requests ignore it.
        link_gb_per_s: rate of the link in 10^9 bytes per second.
        policy: a name of `POLICIES`, or "oracle".
        traffic: one of `TRAFFIC`.

    Raises:
        ConfigError: the ring is smaller than the largest model, or the traffic is not for this
            number of models.
    """
    sizes = fleet(n_models)
    trace = requests(traffic, sizes, alpha)
    costs = replace(reference_costs(), link_bytes_per_s=link_gb_per_s * 1e9)
    capacity = int(capacity_gib * GIB) // PAGE_BYTES * PAGE_BYTES
    name, largest = max(sizes.items(), key=lambda item: item[1])
    if capacity < largest:
        raise ConfigError(
            f"a ring of {capacity_gib:g} GiB is smaller than {name} ({largest / GIB:.1f} GiB): "
            f"choose at least {capacities(n_models)[0]:g} GiB"
        )
    rows = simulate(trace, sizes, capacity, policy, costs=costs)
    least = np.cumsum(optimal_loads(trace, sizes, capacity, PAGE_BYTES)) / GIB
    figure, panels = plt.subplot_mosaic(
        [["top", "top"], ["left", "right"]], figsize=(DOUBLE_COLUMN_IN, 4.4), layout="constrained"
    )
    left, right = panels["left"], panels["right"]
    _draw_residency(panels["top"], rows, sizes, capacity)
    sns.ecdfplot(rows, x="switch_ms", color=POLICY_STYLE[policy].color, ax=left)
    left.set(xlabel="switch (ms)", ylabel="share of requests", title="What switches cost")
    left.axvline(10, color="0.6", linestyle=":")
    loaded = rows["loaded_bytes"].cumsum() / GIB
    right.plot(loaded, color=POLICY_STYLE[policy].color, label=POLICY_STYLE[policy].label)
    right.plot(least, color="black", linestyle=":", label="optimum")
    ratio = loaded.iloc[-1] / least[-1]
    right.set(xlabel="request", ylabel="loaded (GiB)", title=f"{ratio:.2f}x of the optimum")
    right.legend()
    return figure


def _draw_residency(axes: Axes, rows: pd.DataFrame, sizes: dict[str, int], capacity: int) -> None:
    held = [json.loads(text) for text in rows["resident_bytes"]]
    colors = _colors(sizes)
    bands = np.array([[row.get(model, 0) for row in held] for model in sizes]) / GIB
    axes.stackplot(rows["request"], bands, colors=[colors[m] for m in sizes], step="post")
    axes.axhline(capacity / GIB, color="black", linewidth=0.8)
    axes.set(xlabel="request", ylabel="resident (GiB)", title="Which bytes are resident",
             xlim=(0, len(rows) - 1))  # fmt: skip
    handles = [Rectangle((0, 0), 1, 1, color=colors[m]) for m in sizes]
    axes.figure.legend(handles, list(sizes), loc="outside right upper")


def _colors(models: Collection[str]) -> dict[str, Any]:
    """A colour for each model: those of the other figures, if these have enough of them."""
    if len(models) <= len(MODEL_COLORS):
        return model_colors(models)
    return dict(zip(models, sns.color_palette("tab20", len(models)), strict=True))


def explorer(folder: Path = KEPT) -> widgets.VBox:
    """Return the widgets; every change redraws `picture`, and a button saves it in `folder`.

    Every combination that they offer can be drawn; see `_follow`.
    """
    controls = _controls()
    # Do not use an Output widget: the execution of a notebook that has one may never end
    # (jupyter/nbclient#312).
    canvas = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
    keep = widgets.Button(description="keep this picture", icon="save")
    kept = widgets.Label()

    def shown() -> Figure:
        return picture(**{name: control.value for name, control in controls.items()})

    def changed(_change: Any) -> None:
        for control in controls.values():  # changes that follow from a choice must not redraw again
            control.unobserve(changed, names="value")
        _follow(controls)
        for control in controls.values():
            control.observe(changed, names="value")
        png, figure = BytesIO(), shown()
        figure.savefig(png, format="png", dpi=SCREEN_DPI)
        plt.close(figure)  # else the notebook shows it again below the cell
        canvas.value, kept.value = png.getvalue(), ""

    def save(_button: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(shown(), folder, "explore")
        kept.value = f"kept: {folder / 'explore.png'}"

    for control in controls.values():
        control.observe(changed, names="value")
    keep.on_click(save)
    changed(None)
    wrap = widgets.Layout(flex_flow="row wrap")  # in a narrow window one below the other
    every = list(controls.values())
    rows = [widgets.HBox(every[i : i + 2], layout=wrap) for i in range(0, len(every), 2)]
    return widgets.VBox([*rows, widgets.HBox([keep, kept]), canvas])


def _controls() -> dict[str, Any]:
    """The widgets by their parameter of `picture`; each pair in this order shares a line."""
    menu: dict[str, Any] = {
        "style": {"description_width": "11rem"},
        "layout": widgets.Layout(width="25rem", flex="0 0 auto"),
    }
    wide = {**menu, "continuous_update": False}
    least, most = capacities(len(PAPER))
    return {
        "traffic": widgets.Dropdown(
            options=TRAFFIC, value=TRAFFIC[0], description="traffic", **menu
        ),
        "n_models": widgets.Dropdown(
            options=[3, 5, 10, 20], value=len(PAPER), description="number of models", **menu
        ),
        "capacity_gib": widgets.FloatSlider(
            25, min=least, max=most, step=0.5, description="capacity (GiB)", **wide
        ),
        "policy": widgets.Dropdown(options=CHOICES, value="lru", description="policy", **menu),
        "link_gb_per_s": widgets.FloatLogSlider(
            54, min=0.5, max=3, step=0.05, description="rate of the link (GB/s)", **wide
        ),
        "alpha": widgets.FloatSlider(
            1.0, min=0, max=2, step=0.1, description="skew (Zipf's exponent)", **wide
        ),
    }


def _follow(controls: Mapping[str, Any]) -> None:
    """Restrict the widgets to values that can be combined with the current choices."""
    is_paper = controls["traffic"].value == TRAFFIC[0]
    if is_paper:
        controls["n_models"].value = len(PAPER)
    controls["n_models"].disabled = controls["alpha"].disabled = is_paper
    slider, (least, most) = controls["capacity_gib"], capacities(controls["n_models"].value)
    slider.min, slider.max = min(least, slider.min), max(most, slider.max)
    slider.value = min(max(slider.value, least), most)
    slider.min, slider.max = least, most
