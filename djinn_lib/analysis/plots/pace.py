"""Draw how much decoding times vary: every decode relative to the fastest of its kind."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    describe_rows,
    order_systems,
    require_one_cell_each,
    split_unavailable,
    styled,
    system_look,
)
from djinn_lib.metrics import decode_multiples

_ROW_IN = 0.09
_GAP = 1  # rows between systems
_SLOWEST = 4.0  # end of the colour scale


@styled
def decode_pace(rows: pd.DataFrame) -> Figure:
    """Draw each decoding time as a multiple of the fastest of its model and system.

    A band is a system, and a line in it is a repeat. A dark column means that a request is slow in
    every repeat. Other dark patches come from outside, such as a slow host. Requests that
    failed, or that the system did not get, are white.

    Raises:
        RecordError: there are no rows, or they are not of one trace, capacity and mode.
    """
    require_one_cell_each(rows, "the pace of decoding")
    rows, unavailable = split_unavailable(rows)
    requests = sorted(rows["request"].unique())
    bands = {system: _multiples(rows[rows["system"] == system], requests)
             for system in order_systems(rows["system"])}  # fmt: skip
    grid, middles = _stacked(list(bands.values()))
    size_in = (DOUBLE_COLUMN_IN, 0.9 + _ROW_IN * max(len(grid), 14))
    figure, axes = plt.subplots(figsize=size_in, layout="constrained")
    sns.heatmap(grid, cmap="magma_r", norm=LogNorm(1.0, _SLOWEST), xticklabels=5, rasterized=True,
                cbar=False, ax=axes)  # fmt: skip
    axes.set_yticks(middles, [system_look(system).label for system in bands], rotation=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("request of the trace")
    image = axes.collections[0]
    bar = figure.colorbar(image, ax=axes, extend="max", pad=0.01, fraction=0.04, aspect=40)
    bar.set_label("decode /\nfastest of its model", fontsize=SMALL_PT)
    bar.set_ticks([1, 1.5, 2, 3, 4])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    note = "A line is a repeat. Each decode is compared with the fastest of its model and system."
    describe_rows(figure, rows, unavailable, note, *_slower_note(grid))
    return figure


def _multiples(rows: pd.DataFrame, requests: Sequence[int]) -> np.ndarray:
    """Return decoding times relative to the fastest; one line for each repeat."""
    table = rows.assign(multiple=decode_multiples(rows))
    grid = table.pivot(index="repeat", columns="request", values="multiple")
    return grid.reindex(columns=requests).to_numpy(dtype=float)


def _slower_note(grid: np.ndarray) -> list[str]:
    """Return a note if decodes are slower than the end of the colour scale."""
    n = int((grid > _SLOWEST).sum())
    return [f"{n} slower than {_SLOWEST:g}x are drawn as {_SLOWEST:g}x."] if n else []


def _stacked(bands: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """Stack the bands with gaps between them; return the grid and the middle of each band."""
    gap = np.full((_GAP, max(band.shape[1] for band in bands)), np.nan)
    parts, middles, top = [], [], 0
    for band in bands:
        middles.append(top + len(band) / 2)
        parts += [band, gap]
        top += len(band) + _GAP
    return np.vstack(parts[:-1]), middles
