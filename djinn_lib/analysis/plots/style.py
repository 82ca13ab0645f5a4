"""Define the style of all figures, and save them.

Each system has one colour, label and line style, and each model has one colour. The colours can be
told apart with the common kinds of colour blindness. Systems use the set of Okabe and Ito
(https://jfly.uni-koeln.de/color/), models use Paul Tol's "muted" set
(https://sronpersonalpages.nl/~pault/). With two sets, a model is never confused with a system.
"""

from __future__ import annotations

import os
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from djinn_lib.errors import RecordError
from djinn_lib.metrics import REQUEST, by_request, served
from djinn_lib.paths import user_path

COLUMN_IN, DOUBLE_COLUMN_IN = 3.3, 7.0  # widths of a paper's single and double column
SMALL_PT = 7
_LONG_LABEL = 24  # characters of an entry of a legend that gets a second line where space is short
_SHEET = Path(__file__).with_name("djinn.mplstyle")


@dataclass(frozen=True, slots=True)
class Look:
    """Style of one system; no two systems share both colour and line style."""

    label: str
    color: str
    linestyle: str = "-"
    marker: str = "o"

    @property
    def line(self) -> dict[str, Any]:
        """The options of a line of the system, with its entry in the legend."""
        return {"color": self.color, "linestyle": self.linestyle, "label": self.label}


_BLUE, _SKY, _GREEN, _ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
_RED, _PINK, _BLACK, _GREY = "#D55E00", "#CC79A7", "#000000", "#7F7F7F"
_NAVY = "#003F7F"

SYSTEM_STYLE: dict[Any, Any] = {
    "djinn": Look("Djinn", _BLUE),
    "djinn_adaptive": Look("Djinn, adaptive policy", _NAVY, ":", "^"),
    "djinn_compressed": Look("Djinn, compressed masters", _NAVY, "-.", "o"),
    "djinn_affinity": Look("Djinn, by affinity", _BLUE, "-.", "h"),
    "djinn_no_lookahead": Look("Djinn, no lookahead", _SKY, "-.", "X"),
    "djinn_compiled": Look("Djinn, tables in the ring", _NAVY, "--", "o"),
    "djinn_graph": Look("Djinn, not compiled", _SKY, ":", "d"),
    "djinn_eager": Look("Djinn, eager decode", _BLUE, ":", "p"),
    "djinn_partial_no_overlap": Look("Djinn, no overlap", _BLUE, "--", "s"),
    "djinn_whole_overlap": Look("Djinn, whole models", _SKY, "-", "D"),
    "djinn_whole": Look("Djinn, whole, no overlap", _SKY, "--", "v"),
    "pytorch_lru_decoder": Look("PyTorch LRU, Djinn's decoder", _GREEN, ":", "^"),
    "pytorch_pinned_readonly_decoder": Look(
        "PyTorch read-only, Djinn's decoder", _ORANGE, ":", "P"
    ),
    "pytorch_pinned_decoder": Look("PyTorch pinned, Djinn's decoder", _RED, ":", "X"),
    "pytorch_lru": Look("PyTorch LRU", _GREEN, "-", "^"),
    "pytorch_pinned_readonly": Look("PyTorch pinned, read-only", _ORANGE, "-", "P"),
    "pytorch_pinned": Look("PyTorch pinned", _RED, "-", "X"),
    "pytorch_pageable": Look("PyTorch pageable", _RED, "--", "*"),
    "serverless_warm": Look("Serverless, warm cache", _PINK, "-", "<"),
    "serverless_cold": Look("Serverless, cold cache", _PINK, "--", ">"),
    "ray_actors": Look("Ray actors", _GREY, "-", "h"),
    "vllm_sleep": Look("vLLM sleep", _BLACK, "--", "d"),
    "vllm_sleep_naive": Look("vLLM sleep, naive", _BLACK, ":", "s"),
    "vllm_sleep_core_process": Look("vLLM sleep, core apart", _GREY, "--", "D"),
    "vllm_sleep_readonly": Look("vLLM sleep, read-only", _BLACK, "-.", "v"),
    "djinn_vllm": Look("Djinn under vLLM", _NAVY, "-", "s"),
    "vllm_recreate": Look("vLLM re-created", _BLACK, "-", "p"),
}
_FALLBACK_COLORS = ("#8C510A", "#5D3A9B", "#40B0A6", "#994F00", "#4B0092", "#1A85FF")
_FALLBACK_LINES = (":", "-.")

MODEL_COLORS = ("#332288", "#DDCC77", "#CC6677", "#44AA99", "#AA4499", "#999933", "#88CCEE")
PHASE_COLORS = {"queue": "#BBBBBB", "switch": "#D55E00", "prefill": "#F0E442", "decode": "#56B4E9"}

_NOTHING = "nothing to draw"

_P = ParamSpec("_P")


def system_look(label: str) -> Look:
    """Return the style of a system; an unknown label always gets the same style."""
    if label in SYSTEM_STYLE:
        return SYSTEM_STYLE[label]
    number = zlib.crc32(label.encode())  # unlike hash(), the same in every process
    color = _FALLBACK_COLORS[number % len(_FALLBACK_COLORS)]
    line = _FALLBACK_LINES[number // len(_FALLBACK_COLORS) % len(_FALLBACK_LINES)]
    return Look(label.replace("_", " "), color, line)


def order_systems(labels: Iterable[str]) -> list[str]:
    """Return labels in the order of all figures: known systems first, the others by name."""
    known = list(SYSTEM_STYLE)
    return sorted(set(labels), key=lambda s: (known.index(s) if s in known else len(known), s))


def model_colors(models: Iterable[str]) -> dict[str, str]:
    """Return a colour for each model; it depends on the names, not on the rows' order."""
    names = sorted(set(models))
    return {name: MODEL_COLORS[i % len(MODEL_COLORS)] for i, name in enumerate(names)}


def is_light(color: str) -> bool:
    """Whether dark text is easier to read than white on a colour such as "#DDCC77"."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


@contextmanager
def theme() -> Iterator[None]:
    """Set seaborn's theme with the figures' sizes while the block runs."""
    with mpl.rc_context():
        # Changes of the colour codes would remain after the block.
        sns.set_theme(context="paper", style="ticks", color_codes=False)
        plt.style.use(_SHEET)
        yield


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Run a drawing function in the figures' style; matplotlib's settings stay.

    The figure is removed from pyplot's list, so that a notebook shows it once, and laid out here,
    because ticks take their style when they are first drawn.
    """

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with theme():
            figure = draw(*args, **kwargs)
            figure.canvas.draw()
            plt.close(figure)
        return figure

    return drawn


def require_rows(rows: pd.DataFrame, what: str) -> None:
    """Check that there are rows to draw.

    Raises:
        RecordError: there are no rows.
    """
    if rows.empty:
        raise RecordError(
            f"there are no rows for {what}: run the cells first, and check the trace and the "
            "capacity label that the rows are filtered by"
        )


def require_one_cell_each(
    rows: pd.DataFrame, what: str, alike: Sequence[str] = ("trace", "capacity_label", "mode")
) -> None:
    """Check that all rows have the same trace, capacity and mode.

    Raises:
        RecordError: there are no rows, or they differ in one of the columns `alike`.
    """
    require_rows(rows, what)
    for column in alike:
        values = sorted(rows[column].unique())
        if len(values) > 1:
            raise RecordError(
                f"rows of more than one {column} cannot be drawn as {what}, got {values}: filter "
                f"them, e.g. rows[rows[{column!r}] == {values[0]!r}]"
            )


def split_unavailable(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the rows of systems that could run here, and the reasons of the others."""
    missing = rows[rows["error_kind"] == "unavailable"]
    reasons = {str(row.system): str(row.error) for row in missing.itertuples()}
    rest = rows[rows["error_kind"] != "unavailable"]
    return rest, {system: reasons[system] for system in order_systems(reasons)}


def nothing_to_draw(text: str) -> Figure:
    """Return a figure with a sentence instead of a drawing; it is never saved."""
    figure, axes = plt.subplots(figsize=(DOUBLE_COLUMN_IN, 0.6), layout="constrained")
    figure.set_gid(_NOTHING)
    axes.axis("off")
    axes.text(0.5, 0.5, textwrap.fill(text, 100), ha="center", va="center", color="0.3")
    return figure


def legend_above(figure: Figure, handles: Sequence[Artist], ncols: int, **options: Any) -> float:
    """Draw a legend above a figure, in as many of `ncols` columns as fit.

    If they do not fit, long labels get a second line first.

    Returns:
        The height of the legend in inches.
    """
    for attempt in range(ncols + 1):
        legend = figure.legend(handles=handles, loc="outside upper center",
                               ncols=min(ncols, ncols + 1 - attempt), **options)  # fmt: skip
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or attempt == ncols:
            return box.height / figure.dpi
        legend.remove()
        if attempt == 0:
            for handle in handles:
                if len(label := str(handle.get_label())) > _LONG_LABEL:
                    handle.set_label(",\n".join(label.rsplit(", ", 1)))
    return 0.0


def footnote(figure: Figure, notes: Iterable[str]) -> None:
    """Write notes below a figure with constrained layout, wrapped to its width."""
    characters = int(figure.get_figwidth() * 72 / (SMALL_PT * 0.56))
    lines = [line for note in notes for line in textwrap.wrap(note, characters)]
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=SMALL_PT, color="0.3", x=0.01, ha="left")


def sample_note(rows: pd.DataFrame) -> str:
    """Return a note with the number of requests of a cell in a figure, and of their repeats."""
    if rows.empty:
        return ""
    cells = rows.groupby(["system", "capacity_label", "trace"])
    n, often = (number_range(cells[column].nunique()) for column in ("request", "repeat"))
    where = " at each capacity" if rows["capacity_label"].nunique() > 1 else ""
    said = f", {often} repeats" if often != "1" else ""
    return f"n = {n} requests of each system{where}{said}."


def machine_notes(rows: pd.DataFrame) -> list[str]:
    """Return a note if rows are from several machines, which their column `place` names."""
    n = rows["place"].nunique() if "place" in rows else 1
    return [f"From {n} machines (see tables): compare times within one only."] * (n > 1)


def number_range(values: pd.Series) -> str:
    """Return a whole number as text, or the least and the greatest where they differ."""
    low, high = int(values.min()), int(values.max())
    return f"{low}" if low == high else f"{low} to {high}"


def connected(points: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the points that a line may connect: neighbours that one machine measured.

    Times of different machines are not compared, so no line joins them. The points are in the order
    of the line and have a column `machine`, which is NaN where a point is missing.
    """
    stretch = (points["machine"] != points["machine"].shift()).cumsum()
    for _, part in points.groupby(stretch):
        yield part


def unavailable_notes(reasons: Mapping[str, str]) -> list[str]:
    """Return a note for each system that cannot run here."""
    return [
        f"Not on this machine: {system_look(system).label} ({reason})"
        for system, reason in reasons.items()
    ]


def describe_rows(
    figure: Figure, rows: pd.DataFrame, unavailable: Mapping[str, str], *notes: str
) -> None:
    """Write below a figure which rows it shows, other notes, and which systems are missing.

    If the rows have a column `place` with several machines, a note says so, in a line added to the
    figure's height.
    """
    several = machine_notes(rows)
    figure.set_figheight(figure.get_figheight() + 0.15 * len(several))
    footnote(figure, [sample_note(rows), *notes, *several, *unavailable_notes(unavailable)])


def label_ms(axis: Axis) -> None:
    """Label an axis of milliseconds with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))


def draw_cdf(axes: Axes, rows: pd.DataFrame, column: str, **style: Any) -> None:
    """Draw the cumulative distribution of a time, in percent of all requests.

    Each request is drawn at the mean of the repeats that served it, and counts with their share.
    So the curve of a system with failed requests ends below 100%. A system that served no request
    has an entry in the legend but no curve.
    """
    if rows.empty:
        return
    times = by_request(served(rows), column)
    if times.empty:
        axes.plot([], [], **style)
        return
    shares = rows["ok"].groupby([rows[name] for name in REQUEST]).mean().reindex(times.index)
    sns.ecdfplot(x=times.to_numpy(), weights=shares.to_numpy(), stat="count", ax=axes, **style)
    # The curve begins at the first request, not at the left end of the axis.
    line = axes.lines[-1]
    ends, counts = np.asarray(line.get_xdata())[1:], np.asarray(line.get_ydata())
    n_requests = len(rows[REQUEST].drop_duplicates())
    line.set_data([times.min(), *ends], 100.0 * counts / n_requests)


def byte_scale(n_bytes: float) -> tuple[float, str]:
    """Return the unit for an axis that ends at `n_bytes`: bytes per unit, and its name."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n_bytes >= 4 * 1024**power:  # 1026 MiB is more precise than 1.0 GiB
            return 1024.0**power, unit
    return 1.0, "B"


def save_figure(figure: Figure, folder: Path | str, name: str) -> tuple[Path, ...]:
    """Write ``<name>.pdf`` and ``<name>.png`` (200 dpi, opaque) and return their paths.

    A figure from `nothing_to_draw` is not written, and files of an earlier run are deleted. A file
    is either complete or missing, and the same rows give the same bytes.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Dates and the library's version would change the bytes.
    options = {
        "pdf": {"metadata": {"CreationDate": None, "Producer": None, "Creator": None}},
        "png": {"metadata": {"Software": None}, "dpi": 200},
    }
    if figure.get_gid() == _NOTHING:
        for ending in options:
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
        return ()
    with theme():
        for ending, settings in options.items():
            partial = folder / f".{name}.partial.{ending}"
            figure.savefig(partial, format=ending, **settings)
            os.replace(partial, folder / f"{name}.{ending}")
    return folder / f"{name}.pdf", folder / f"{name}.png"
