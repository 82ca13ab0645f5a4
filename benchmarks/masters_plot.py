"""Draw how long a full miss takes with compressed masters, compared with the link.

`python benchmarks/masters_plot.py RESULT... --out FIGURE` draws results of several runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from djinn_lib.analysis.plots.style import (
    COLUMN_IN,
    SMALL_PT,
    footnote,
    number_range,
    require_rows,
    save_figure,
    styled,
)
from djinn_lib.paths import user_path
from djinn_lib.units import three_digits

_COLORS = {"plain": "#7F7F7F", "compressed": "#0072B2"}


@styled
def full_misses(rows: pd.DataFrame) -> Figure:
    """Draw the time until all weights are on the device, one panel for each dtype.

    Args:
        rows: one row for each dtype, model and form ("plain", "compressed"). Columns: `load_ms` is
            the median; `link_ms` is the time of the model's plain bytes at the link's rate; `share`
            is its stored bytes divided by its plain bytes; `repeats` is the number of loads.

    Raises:
        RecordError: there are no rows.
    """
    require_rows(rows, "compressed masters")
    dtypes, models = list(rows["dtype"].unique()), list(rows["model"].unique())
    figure, grid = plt.subplots(
        len(dtypes), 1, figsize=(COLUMN_IN, 0.65 + len(dtypes) * (0.35 + 0.38 * len(models))),
        squeeze=False, sharex=True, layout="constrained",
    )  # fmt: skip
    for dtype, axes in zip(dtypes, grid[:, 0], strict=True):
        part = rows[rows["dtype"] == dtype]
        sns.barplot(part, x="load_ms", y="model", hue="form", order=models, palette=_COLORS,
                    saturation=1.0, errorbar=None, ax=axes, legend=dtype == dtypes[0])  # fmt: skip
        for y, model in enumerate(models):
            own = part[part["model"] == model].set_index("form")
            if own.empty:
                continue
            axes.vlines(own["link_ms"].iloc[0], y - 0.45, y + 0.45, color="#D55E00", linestyle="--")
            for form, height in (("plain", -0.2), ("compressed", 0.2)):
                if form in own.index:
                    note = f"{three_digits(own.load_ms[form])} ms, {own.share[form]:.0%} of bytes"
                    end_ms = max(own.load_ms[form], own.link_ms[form])
                    axes.annotate(note, (end_ms, y + height), (4, 0), va="center",
                                  textcoords="offset points", fontsize=SMALL_PT,
                                  in_layout=False)  # fmt: skip
        axes.set(title=dtype, xlabel="", ylabel="")
    if legend := grid[0, 0].get_legend():
        sns.move_legend(legend.axes, "lower right", bbox_to_anchor=(1, 1), ncols=2, title=None)
    longest_ms = rows[["load_ms", "link_ms"]].max(axis=None)
    grid[-1, 0].set_xlim(0, 1.9 * longest_ms)  # leaves room for the text next to the bars
    grid[-1, 0].set_xlabel("ms from nothing resident to all weights")
    n = number_range(rows["repeats"])
    dashed = "dashed: plain bytes at the rate of the link"
    footnote(figure, [f"n = {n} loads for each bar, a median", dashed])
    return figure


def result_rows(result: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of a result of `masters.py` with the number of repeats that they rest on."""
    return pd.DataFrame(result["rows"]).assign(repeats=result["repeats"])


def main() -> None:
    """Draw the rows of several results of `masters.py` as one figure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=user_path, nargs="+", help="one panel for each dtype")
    parser.add_argument("--out", type=user_path, required=True, help="without .png")
    options = parser.parse_args()
    rows = pd.concat(result_rows(json.loads(one.read_text())) for one in options.results)
    print(*save_figure(full_misses(rows), options.out.parent, options.out.name))


if __name__ == "__main__":
    main()
