"""Draw the ring at several moments: which page of which model is in which frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
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

PageTables = Mapping[str, Sequence[int]]  # for each model: the frame of each resident page

_FRAMES_A_ROW = 12
_EMPTY = "#EFEFEF"


@styled
def ring_moments(moments: Mapping[str, PageTables], n_frames: int) -> Figure:
    """Draw every frame of a ring at several moments, side by side.

    A frame has the colour of its model and the number of the page in it. A frame whose content
    differs from the moment before has a black edge.

    Args:
        moments: page tables (`Djinn.stats().frames`) by title, in order of time.
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
