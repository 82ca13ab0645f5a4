"""Draw results of models that are larger than the ring."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from djinn_lib.analysis.plots.style import (
    COLUMN_IN,
    SMALL_PT,
    byte_scale,
    footnote,
    number_range,
    require_rows,
    styled,
)
from djinn_lib.analysis.results import large_table
from djinn_lib.experiment.large_results import SYSTEMS
from djinn_lib.units import three_digits

_LABELS = {
    "resident": "everything resident",
    "djinn": "djinn, layers in turns",
    "accelerate": "accelerate, offloaded",
}
_COLORS = {"resident": "#7F7F7F", "djinn": "#0072B2", "accelerate": "#E69F00"}


@styled
def time_per_token(rows: pd.DataFrame) -> Figure:
    """Draw the time per token in each system, with the time that the link alone needs.

    Each model has a panel. Bars are medians, dots are repeats.

    Raises:
        RecordError: there are no rows.
    """
    require_rows(rows, "models larger than the ring")
    models = list(rows["model"].unique())
    link_ms = large_table(rows)["these at the link's rate (ms)"]
    figure, grid = plt.subplots(
        len(models), 1, figsize=(COLUMN_IN, 0.5 + 1.15 * len(models)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    notes = []
    for model, axes in zip(models, grid[:, 0], strict=True):
        part = rows[rows.model == model]
        shown = [system for system in SYSTEMS if system in set(part.system)]
        for y, system in enumerate(shown):
            own = part[part.system == system]
            values = own.ms_per_token.dropna()
            if values.empty:
                notes.append(f"{model}, {_LABELS[system]}: {own.error.max()}")
                continue
            axes.annotate(
                f"{three_digits(values.median())} ms", (values.max(), y), (4, 0), va="center",
                textcoords="offset points", fontsize=SMALL_PT,
            )  # fmt: skip
        at_ms = link_ms.get((model, "djinn"), float("nan"))
        axes.axvline(at_ms, color="#D55E00", linewidth=1.0, linestyle="--")
        bars = {"data": part, "x": "ms_per_token", "y": "system", "order": shown, "ax": axes}
        sns.barplot(**bars, hue="system", palette=_COLORS, saturation=1.0, estimator="median",
                    errorbar=None, width=0.62, legend=False)  # fmt: skip
        sns.stripplot(**bars, color="black", size=2.5, jitter=False)
        axes.set_yticks(range(len(shown)), [_LABELS[system] for system in shown])
        axes.set(xlabel="", ylabel="")
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        case = part.iloc[0]
        scale, unit = byte_scale(case.model_bytes)
        sizes = (case.model_bytes / scale, case.capacity_bytes / scale)
        axes.set_title(f"{model}: {sizes[0]:.3g} {unit} in {sizes[1]:.3g} {unit}")
    grid[-1, 0].set_xlabel("ms per token")
    dashed = "dashed: djinn's bytes per token at the rate of the link"
    footnote(figure, [_counts(rows), dashed, *notes])
    return figure


def _counts(rows: pd.DataFrame) -> str:
    """Return a note with the number of requests that a bar rests on, and of their tokens."""
    served = rows[rows["ok"]]
    if served.empty:
        return ""
    n = number_range(served.groupby(["model", "system"]).size())
    return f"n = {n} requests of {number_range(served['n_tokens'])} tokens for each bar, a median"
