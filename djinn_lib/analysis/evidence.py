"""What claims rest on: a run's evidence, the rows that a metric asks for, and the metrics by name.

A metric that cannot be measured raises `NotMeasured` with the reason; nothing is made up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from djinn_lib.metrics import Interval
from djinn_lib.rows import no_rows
from djinn_lib.trace import Trace

MAIN_TRACE, MAIN_CAPACITY = "paper", "25"
STATISTICS = ("p50", "p90", "p99", "mean", "max")


@dataclass(frozen=True)
class Evidence:
    """What a run shows.

    Attributes:
        rows: of every cell.
        machine: facts; `device` says whether times can be judged.
        sizes: bytes of each model.
        page_bytes: size of a page of the ring.
        traces: by name.
        device_sizes: by system, bytes of each model on the device when nothing is missing; all of
            its weights where a system is not listed.
        other_steps: systems that do not decode by transformers' own steps: their arithmetic rounds
            differently, so that now and then another token is the likeliest.
        replicates: rows of what else was measured of the same cells.
        machines: numbers of the machines that ran the cells and replicates, by run id; a newer
            machine has a higher one.
        machine_names: of these, by number; a machine that has none is called by its number.
    """

    rows: pd.DataFrame
    machine: Mapping[str, Any]
    sizes: Mapping[str, int]
    page_bytes: int
    traces: Mapping[str, Trace]
    device_sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    other_steps: Set[str] = frozenset()
    replicates: pd.DataFrame = field(default_factory=no_rows)
    machines: Mapping[str, int] = field(default_factory=dict)
    machine_names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """A value with its 95% interval, and how many requests it rests on."""

    value: float
    low: float
    high: float
    n: int
    remark: str = ""


class NotMeasured(Exception):
    """The run does not say; the message says why."""


Metric = Callable[..., Measurement]
METRICS: dict[str, Metric] = {}
TIMED: set[str] = set()  # metrics that rest on clocks, which a shared CPU does not keep


def metric(timed: bool = False) -> Callable[[Metric], Metric]:
    """Register a metric under its function's name."""

    def register(function: Metric) -> Metric:
        METRICS[function.__name__] = function
        if timed:
            TIMED.add(function.__name__)
        return function

    return register


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Make sure that a metric takes these arguments.

    Raises:
        TypeError: it does not; the message says which.
    """
    bound = inspect.signature(METRICS[name]).bind(None, **arguments).arguments
    inspect.signature(select).bind(None, None, **bound.get("where", {}))
    if (statistic := bound.get("statistic", "p50")) not in STATISTICS:
        raise TypeError(f"expected a statistic out of {STATISTICS}, got {statistic!r}")


def select(
    evidence: Evidence,
    system: str | None,
    trace: str | None = MAIN_TRACE,
    capacity_label: str | None = MAIN_CAPACITY,
    mode: str = "sequential",
) -> pd.DataFrame:
    """Return the attempted rows of a system; None stands for all.

    Raises:
        NotMeasured: there are none, or the system cannot run on this machine.
    """
    rows = evidence.rows[evidence.rows["mode"] == mode]
    wanted = {"system": system, "trace": trace, "capacity_label": capacity_label}
    for column, value in wanted.items():
        if value is not None:
            rows = rows[rows[column] == value]
    attempted = rows[rows["error_kind"] != "unavailable"]
    if attempted.empty:
        where = ", ".join(f"{k} {v!r}" for k, v in {**wanted, "mode": mode}.items() if v)
        raise NotMeasured(rows["error"].iloc[0] if len(rows) else f"no rows of {where} in this run")
    return attempted


def served(evidence: Evidence, system: str, **where: Any) -> pd.DataFrame:
    """Return the rows of the requests that a system served.

    Raises:
        NotMeasured: it served none.
    """
    rows = select(evidence, system, **where)
    if not rows["ok"].any():
        raise NotMeasured(f"{system} served no request: {rows['error'].iloc[0]}")
    return rows[rows["ok"]]


def with_replicates(evidence: Evidence) -> Evidence:
    """Return the evidence with its replicates among its rows."""
    if evidence.replicates.empty:
        return evidence
    rows = pd.concat([evidence.rows, evidence.replicates], ignore_index=True)
    return replace(evidence, rows=rows, replicates=no_rows())


def side_by_side(
    evidence: Evidence, systems: Sequence[str], **where: Any
) -> dict[str, pd.DataFrame]:
    """Return the attempted rows of a cell of each system, of one machine if all of them ran on one.

    Machines of one kind differ, so systems are compared on the newest machine that ran them all, be
    it with replicates. Where there is none, they are the rows that `select` gives.

    Raises:
        NotMeasured: one of them has none, or cannot run on this machine.
    """
    own = {system: select(evidence, system, **where) for system in systems}
    every = with_replicates(evidence)
    by_machine = {
        system: {
            evidence.machines.get(str(run_id), 0): rows
            for run_id, rows in select(every, system, **where).groupby("run_id", sort=True)
        }
        for system in systems
    }
    common = set.intersection(*(set(found) for found in by_machine.values()))
    if not common:
        return own
    newest = max(common)
    return {
        system: rows if machines_of(evidence, rows := own[system]) == [newest] else found[newest]
        for system, found in by_machine.items()
    }


def ran_on(evidence: Evidence, *frames: pd.DataFrame) -> str:
    """Say which machine rows come from, where the evidence has those of several; "" otherwise."""
    if len(set(evidence.machines.values())) < 2:
        return ""
    numbers = sorted({n for rows in frames for n in machines_of(evidence, rows)})
    *others, last = (evidence.machine_names.get(n, str(n)) for n in numbers)
    if not others:
        return f"on machine {last}"
    return f"on the machines {', '.join(others)} and {last}"


def machines_of(evidence: Evidence, rows: pd.DataFrame) -> list[int]:
    """Return the numbers of the machines that served rows, in order; 0 where it is not known."""
    return sorted({evidence.machines.get(str(run_id), 0) for run_id in rows["run_id"].unique()})


def swept(rows: pd.DataFrame) -> list[str]:
    """Return the capacities that rows were served at, the least first; a sweep has several.

    Raises:
        NotMeasured: there is only one.
    """
    by_room = rows.sort_values("capacity_bytes")
    labels = [str(label) for label in by_room["capacity_label"].unique()]
    if len(labels) < 2:
        raise NotMeasured(f"rows of one capacity only ({labels[0]}) in this run")
    return labels


def measured(interval: Interval, n: int, remark: str = "") -> Measurement:
    """Return a value with its interval."""
    return Measurement(*interval, n=n, remark=remark)


def exact(value: float, n: int, remark: str = "") -> Measurement:
    """Return a value that has no interval: a sum or a maximum."""
    return Measurement(value, value, value, n, remark)
