"""Draw latencies, and the share of requests done in time, against the arrival rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from djinn_lib.analysis.plots.style import (
    DOUBLE_COLUMN_IN,
    connected,
    footnote,
    label_ms,
    machine_notes,
    nothing_to_draw,
    number_range,
    order_systems,
    require_one_cell_each,
    split_unavailable,
    styled,
    system_look,
    unavailable_notes,
)
from djinn_lib.metrics import (
    STATISTICS,
    block_length,
    bootstrap_interval,
    by_request,
    share_interval,
)

TIMES = {"ttft_ms": "To the first token", "total_ms": "To the last token"}
DRAWN = ("p50", "p90")  # a P99 of few requests is their maximum, which has no interval
IN_TIME = "in_time"

_DODGE = 0.024  # of the axis, between neighbouring systems, so that intervals do not hide others


@styled
def load(
    rows: pd.DataFrame,
    rates: Mapping[str, float],
    target_ms: float = 2000.0,
    traces: str = "load",
) -> Figure:
    """Draw time to first token, total time and share in time against the arrival rate.

    Intervals are those of `load_intervals`. A line connects rates that one machine measured.

    Args:
        rows: requests that were sent when they arrived; may be none.
        rates: arrivals per second of each trace.
        target_ms: a request is in time if it is done this long after its arrival.
        traces: draw the traces whose names begin with this and "_".

    Raises:
        RecordError: the rows are of more than one capacity or mode.
    """
    rows, unavailable = split_unavailable(rows[rows["trace"].str.startswith(f"{traces}_")])
    if not (systems := order_systems(rows["system"])):
        sentence = f"This run has no requests that arrive at the rates of traces {traces}_*."
        return nothing_to_draw(" ".join([sentence, *unavailable_notes(unavailable)]))
    require_one_cell_each(rows, "latencies under load", ("capacity_label", "mode"))
    table = load_intervals(rows, rates, target_ms)
    notes = [
        _counts(rows, rates),
        "Bars: 95% intervals over requests, resampled in blocks, as requests wait for others.",
        "Dotted: 90%. Failed requests are late, and have no latency.",
        *machine_notes(rows),
        *unavailable_notes(unavailable),
    ]
    size_in = (DOUBLE_COLUMN_IN, 3.1 + 0.15 * len(notes))
    figure, grid = plt.subplots(
        2, 3, figsize=size_in, sharex=True, sharey="col", layout="constrained"
    )
    for (row, statistic), (column, time) in product(enumerate(DRAWN), enumerate(TIMES)):
        axes = grid[row, column]
        _draw_panel(axes, table[table["measure"] == f"{time}_{statistic}"], systems)
        axes.set_title(f"{TIMES[time]}, {statistic.upper()}")
        _scale_times(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms from the arrival")
    for axes in grid[1]:
        axes.set_xlabel("arrivals a second")
    beside, share = grid[:, 2]
    _draw_share(share, table, systems, target_ms)
    _scale_rates(share, sorted(table["rate"].unique()))
    beside.axis("off")
    beside.legend(handles=_legend(systems), loc="center", handlelength=3.0)
    footnote(figure, notes)
    return figure


def load_intervals(
    rows: pd.DataFrame, rates: Mapping[str, float], target_ms: float
) -> pd.DataFrame:
    """Return the values of the figure with their 95% intervals, one row for each point.

    Columns: system, rate, machine (the column `place` of the rows, if there), measure, value, low,
    high. Measures are a key of `TIMES`, "_" and one of `DRAWN`, in ms, and `IN_TIME`, in percent.
    Requests are resampled in blocks of `metrics.block_length`.
    """
    found = [
        {"system": system, "rate": rates[str(trace)], "machine": _machine(part), **point}
        for (system, trace), part in rows.groupby(["system", "trace"])
        for point in _measures(part, target_ms)
    ]
    return pd.DataFrame(found).sort_values("rate", kind="stable")


def _measures(rows: pd.DataFrame, target_ms: float) -> Iterator[dict[str, float | str]]:
    """Yield each measure of a system at one rate, with its interval."""
    names = ("value", "low", "high")
    block = block_length(rows["request"].nunique())
    for time, statistic in product(TIMES, DRAWN):
        times_ms = by_request(rows, time)
        interval = bootstrap_interval(STATISTICS[statistic], times_ms, block=block)
        yield {"measure": f"{time}_{statistic}", **dict(zip(names, interval, strict=True))}
    in_time = rows["ok"] & (rows["total_ms"] <= target_ms)
    share = share_interval(in_time.groupby(rows["request"]).mean(), block)
    percent = (100 * value for value in share)
    yield {"measure": IN_TIME, **dict(zip(names, percent, strict=True))}


def _machine(rows: pd.DataFrame) -> str:
    return str(rows["place"].iloc[0]) if "place" in rows else ""


def _draw_panel(axes: Axes, table: pd.DataFrame, systems: Sequence[str]) -> None:
    """Draw the points of one measure with intervals: a colour, marker and line for each system."""
    step = _DODGE * np.log(table["rate"].max() / table["rate"].min())
    for number, system in enumerate(systems):
        look, aside = system_look(system), np.exp(step * (number - (len(systems) - 1) / 2))
        for part in connected(table[table["system"] == system]):
            sides = [part["value"] - part["low"], part["high"] - part["value"]]
            axes.errorbar(part["rate"] * aside, part["value"], sides, color=look.color,
                          linestyle=look.linestyle, linewidth=1.1, marker=look.marker,
                          markersize=3.5, elinewidth=0.8, capsize=1.5)  # fmt: skip
    axes.grid(which="major")


def _draw_share(axes: Axes, table: pd.DataFrame, systems: Sequence[str], target_ms: float) -> None:
    _draw_panel(axes, table[table["measure"] == IN_TIME], systems)
    axes.set(title=f"Done within {target_ms / 1e3:g} s", ylabel="share of requests", ylim=(-7, 107))
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.axhline(90, color="0.4", linestyle=(0, (1, 1.5)), linewidth=1.0)


def _scale_times(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    label_ms(axes.yaxis)


def _scale_rates(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def _counts(rows: pd.DataFrame, rates: Mapping[str, float]) -> str:
    """Return a note with the number of requests of a system at each rate."""
    n = rows.groupby(["trace", "system"])["request"].nunique()
    by_rate = sorted((rates[str(trace)], number_range(of)) for trace, of in n.groupby("trace"))
    said = ", ".join(f"{of} at {rate:g}/s" for rate, of in by_rate)
    often = number_range(rows.groupby(["trace", "system"])["repeat"].nunique())
    return f"n, requests of each system: {said}{f'; {often} repeats' * (often != '1')}."


def _legend(systems: Sequence[str]) -> list[Line2D]:
    looks = [system_look(system) for system in systems]
    return [Line2D([], [], **look.line, marker=look.marker, markersize=3.5) for look in looks]
