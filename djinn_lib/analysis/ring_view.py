"""Show a running ring in notebook 00_start_here: pages in frames, moves, costs of requests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    SMALL_PT,
    is_light,
    model_colors,
    styled,
)
from djinn_lib.errors import RecordError

if TYPE_CHECKING:
    from djinn_lib.engine.serving.generation import Generation

# `Djinn.stats().frames`: for each model, the frame of each resident page.
PageTables = Mapping[str, Sequence[int]]

_FRAMES_A_ROW = 12
_EMPTY = "#EFEFEF"


@styled
def ring_moments(moments: Mapping[str, PageTables], n_frames: int) -> Figure:
    """Draw every frame of a ring at several moments, side by side.

    A frame has the colour of its model and the number of the page in it. A frame whose content
    differs from the moment before has a black edge.

    Args:
        moments: page tables by title, in order of time.
        n_frames: number of frames of the ring.

    Raises:
        RecordError: there is no moment, or a page table names a frame that the ring does not have.
    """
    if not moments:
        raise RecordError("there is no moment to draw: pass at least one page table")
    contents = [contents_of(tables, n_frames) for tables in moments.values()]
    colors = model_colors(model for tables in moments.values() for model in tables)
    rows = math.ceil(n_frames / _FRAMES_A_ROW)
    figure, panels = plt.subplots(
        1, len(moments), figsize=(DOUBLE_COLUMN_IN, 0.75 + 0.29 * rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    before: list[tuple[str, int] | None] | None = None
    for axes, title, content in zip(panels[0], moments, contents, strict=True):
        _draw_frames(axes, content, before or content, colors)
        axes.set_title(title)
        before = content
    handles = [Patch(color=color, label=model) for model, color in colors.items()]
    handles.append(Patch(facecolor=_EMPTY, label="free"))
    if len(moments) > 1:
        handles.append(Patch(facecolor="white", edgecolor="black", label="changed since the left"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def contents_of(tables: PageTables, n_frames: int) -> list[tuple[str, int] | None]:
    """Return the model and page number that each frame holds; None for a free frame.

    Raises:
        RecordError: a page table names a frame that the ring does not have.
    """
    content: list[tuple[str, int] | None] = [None] * n_frames
    for model, frames in tables.items():
        for page, frame in enumerate(frames):
            if not 0 <= frame < n_frames:
                raise RecordError(
                    f"page {page} of {model!r} is in frame {frame}, but the ring has {n_frames} "
                    "frames: pass the number of frames of the same ring"
                )
            content[frame] = model, page
    return content


def _draw_frames(
    axes: Axes,
    content: Sequence[tuple[str, int] | None],
    before: Sequence[tuple[str, int] | None],
    colors: Mapping[str, str],
) -> None:
    for frame, (held, was) in enumerate(zip(content, before, strict=True)):
        row, column = divmod(frame, _FRAMES_A_ROW)
        color = colors[held[0]] if held else _EMPTY
        edge, width = ("black", 1.3) if held != was else ("none", 0.0)
        axes.add_patch(
            FancyBboxPatch(
                (column + 0.1, row + 0.1), 0.8, 0.8, facecolor=color,
                boxstyle="round,pad=0,rounding_size=0.12", edgecolor=edge, linewidth=width,
            )
        )  # fmt: skip
        if held:
            ink = "black" if is_light(color) else "white"
            axes.text(column + 0.5, row + 0.52, str(held[1]), color=ink, ha="center", va="center",
                      fontsize=SMALL_PT - 1)  # fmt: skip
    n_rows = math.ceil(len(content) / _FRAMES_A_ROW)
    axes.set(xlim=(0, _FRAMES_A_ROW), ylim=(n_rows, 0), aspect="equal")
    axes.axis("off")


def moves_table(before: PageTables, after: PageTables) -> pd.DataFrame:
    """Return a row a model: how many of its pages stayed, came and went between two moments."""
    pages = {model: (set(enumerate(before.get(model, ()))), set(enumerate(frames)))
             for model, frames in after.items()}  # fmt: skip
    return pd.DataFrame.from_dict({
        model: {"stayed": len(old & new), "loaded": len(new - old), "evicted": len(old - new)}
        for model, (old, new) in pages.items()
    }, orient="index").rename_axis("pages of")  # fmt: skip


def costs_table(served: Iterable[tuple[str, Generation]]) -> pd.DataFrame:
    """Return a row a request, each given with its model: what it found, loaded and evicted."""
    rows = [(model, g.resident_before_bytes, g.loaded_bytes, g.evicted_bytes)
            for model, g in served]  # fmt: skip
    names = ["model", "found (MiB)", "loaded (MiB)", "evicted from others (MiB)"]
    table = pd.DataFrame(rows, pd.RangeIndex(1, len(rows) + 1, name="request"), names)
    return table.assign(**{name: (table[name] / 2**20).round(1) for name in names[1:]})


def small_llama(n_layers: int) -> dict[str, Any]:
    """Return the configuration of a small Llama: about 2.5 MiB of float32 weights a layer."""
    return {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # random weights as small as usual give one token again and again
    }
