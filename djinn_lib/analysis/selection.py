"""Select rows of a run, and decide which of them may be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec

import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.run import Run
from djinn_lib.metrics import attempted

NOT_BATCHED = "could not batch: its engines were given one request at a time"
CPU_CLOCKS = "times on a shared CPU are noise: judged on a GPU only"
MAIN_TRACE, MAIN_CAPACITY = "paper", "25"
PINNED = "pytorch_pinned"  # what the paper compares with
COLD, WARM = "cold", "warm"  # what is resident before the first request
_USUAL = ("start", COLD)


_P = ParamSpec("_P")


class NotMeasured(Exception):
    """A value that the run does not have; the message says why."""


def or_reason(make: Callable[_P, pd.DataFrame]) -> Callable[_P, pd.DataFrame]:
    """Make a function return a table with the reason if it raises `NotMeasured`."""

    @wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> pd.DataFrame:
        try:
            return make(*args, **kwargs)
        except NotMeasured as reason:
            return pd.DataFrame({"not measured because": [str(reason)]})

    return made


def need_clocks(run: Run) -> None:
    """Make sure that the times of a run can be compared.

    Raises:
        NotMeasured: they come from a shared CPU.
    """
    if not run.has_clocks:
        raise NotMeasured(CPU_CLOCKS)


def select(
    run: Run,
    system: str | None,
    trace: str | None = MAIN_TRACE,
    capacity_label: str | None = MAIN_CAPACITY,
    mode: str | None = "sequential",
    start: str | None = COLD,
    replicates: bool = False,
) -> pd.DataFrame:
    """Return the attempted rows of a system, with replicates if asked for; None stands for all.

    Raises:
        NotMeasured: there are none, or the system cannot run on this machine.
    """
    rows = run.every_row if replicates else run.rows
    wanted = {"system": system, "trace": trace, "capacity_label": capacity_label, "mode": mode,
              "start": start}  # fmt: skip
    for column, value in wanted.items():
        if value is not None:
            rows = rows[rows[column] == value]
    found = attempted(rows)
    if found.empty:
        where = ", ".join(f"{k} {v!r}" for k, v in wanted.items() if v and (k, v) != _USUAL)
        raise NotMeasured(rows["error"].iloc[0] if len(rows) else f"no rows of {where} in this run")
    if mode == "concurrent":
        found = found[~could_not_batch(run, found)]
        if found.empty:
            raise NotMeasured(f"{system} {NOT_BATCHED}")
    return found


def could_not_batch(run: Run, rows: pd.DataFrame) -> pd.Series:
    """Whether rows are of concurrent requests to a system that was prevented from batching.

    vLLM batches the requests of a model by default. Older cells gave an engine one request at a
    time, so they say nothing about vLLM's queues and are not compared. Manifests of newer cells say
    that their engines could batch.
    """
    unfair = {
        manifest["run_id"]
        for manifest in run.all_manifests.values()
        if manifest["system"].startswith("vllm") and not manifest.get("batches")
    }
    waited = (rows["mode"] == "concurrent") & (rows["error_kind"] != "unavailable")
    return waited & rows["run_id"].isin(unfair)


def served(run: Run, system: str, **where: Any) -> pd.DataFrame:
    """Return the rows of the requests that a system served.

    Raises:
        NotMeasured: it served none.
    """
    rows = select(run, system, **where)
    if not rows["ok"].any():
        raise NotMeasured(f"{system} served no request: {rows['error'].iloc[0]}")
    return metrics.served(rows)


def side_by_side(run: Run, systems: Sequence[str], **where: Any) -> dict[str, pd.DataFrame]:
    """Return the attempted rows of a cell of each system, all from one machine.

    Machines of one kind differ, so systems are compared on the newest machine that ran them all,
    with replicates if necessary; on one that was shared only if there is no other.

    Raises:
        NotMeasured: one of them has none or cannot run here, or no machine ran them all.
    """
    own = {system: select(run, system, **where) for system in systems}
    each = on_each_machine(run, systems, **where)
    if not each:
        raise NotMeasured(
            f"no machine ran all of {', '.join(systems)}: {ran_on(run, *own.values())}"
        )
    newest = max(each, key=lambda number: (number not in run.shared_machines, number))
    return {
        system: own[system] if _numbers(run, own[system]) == {newest} else rows
        for system, rows in each[newest].items()
    }


def on_each_machine(
    run: Run, systems: Sequence[str], **where: Any
) -> dict[int, dict[str, pd.DataFrame]]:
    """Return the newest rows of each system on each machine that ran them all, by its number.

    Raises:
        NotMeasured: one of them has none or cannot run here.
    """
    found = {system: by_machine(run, system, **where) for system in systems}
    common = set.intersection(*(set(of) for of in found.values()))
    return {number: {system: found[system][number] for system in found} for number in common}


def sweep(run: Run, trace: str = MAIN_TRACE, baseline: str = PINNED) -> pd.DataFrame:
    """Return the rows of the systems that were run at more than one capacity.

    The baseline is always among them, so unfinished runs can be analysed too. At each capacity all
    rows are from one machine, if one machine ran all systems; else each system is from one that ran
    the baseline too, if there is one, preferably from the one that ran the baseline at most
    capacities. Systems of different machines, which column `machine` shows, are not compared. So
    the baseline may have rows of several machines at one capacity: those that are only there to
    compare others with are marked in column `only_beside`.

    Raises:
        RecordError: there are none.
    """
    rows = run.cells(trace)
    several = rows.groupby("system")["capacity_label"].transform("nunique") > 1
    rows = rows[several | (rows["system"] == baseline)] if several.any() else rows
    found = []
    for label in rows["capacity_label"].unique():
        here = rows[rows["capacity_label"] == label]
        systems = [str(name) for name in attempted(here)["system"].unique()]
        try:
            if systems:
                found += side_by_side(run, systems, trace=trace, capacity_label=str(label)).values()
            found.append(here[here["error_kind"] == "unavailable"])
        except NotMeasured:
            found += _beside(run, here, baseline, trace=trace, capacity_label=str(label))
    together = pd.concat(found)
    numbers = together["run_id"].map(run.machine_numbers).fillna(0)
    marks = (
        together["only_beside"] if "only_beside" in together else pd.Series(index=together.index)
    )
    return together.assign(machine=numbers, only_beside=marks.eq(True))


def usual_capacity(run: Run, trace: str = MAIN_TRACE) -> str:
    """Return the capacity to draw: the paper's, or where it was not run, the one of most systems.

    Of several it is the least. Without rows it is the paper's.
    """
    rows = run.other_cells(trace)
    if rows.empty or MAIN_CAPACITY in set(rows["capacity_label"]):
        return MAIN_CAPACITY
    found = rows.groupby("capacity_label").agg({"system": "nunique", "capacity_bytes": "max"})
    found = found.sort_values(["system", "capacity_bytes"], ascending=[False, True])
    return str(found.index[0])


def usual_baseline(run: Run, trace: str = MAIN_TRACE) -> str:
    """Return the system to compare others with: PyTorch pinned, or where it was not run, another.

    That is the slowest one of those that were run at most capacities.

    Raises:
        RecordError: there are no rows.
    """
    rows = run.cells(trace)
    rows = rows if (served := metrics.served(rows)).empty else served
    if PINNED in set(rows["system"]):
        return PINNED
    found = rows.groupby("system").agg({"capacity_label": "nunique", "total_ms": "mean"})
    return str(found.sort_values(["capacity_label", "total_ms"]).index[-1])


def _beside(run: Run, rows: pd.DataFrame, baseline: str, **where: Any) -> list[pd.DataFrame]:
    """Return rows of each system: those of a machine with the baseline, where there are any.

    Of several such machines, those that were not shared first, it is the one that ran the baseline
    at most capacities, then the one with most systems here, then the newest. Rows of the baseline
    are those of the first of them, and, marked, of all others in use.
    """
    names = [str(name) for name in attempted(rows)["system"].unique()]
    found = {name: by_machine(run, name, **where) for name in names}
    together = Counter(chain.from_iterable(found.values()))
    swept_by = _capacities_by_machine(run, baseline, str(where["trace"]))
    order = {number: (number not in run.shared_machines, swept_by[number], together[number], number)
             for number in together}  # fmt: skip
    best = sorted(found.get(baseline, ()), key=order.__getitem__, reverse=True)
    chosen, used = [], set()
    for name, own in rows.groupby("system", sort=False):
        of = found.get(str(name), {})
        number = next((number for number in best if number in of), None)
        chosen.append(own if number is None else of[number])
        used.add(number)
    others = [found[baseline][number] for number in best[1:] if number in used]
    return chosen + [rows.assign(only_beside=True) for rows in others]


def _capacities_by_machine(run: Run, system: str, trace: str) -> Counter[int]:
    """Return at how many capacities each machine ran a system, one request after another."""
    rows = run.every_row.query("system == @system and trace == @trace and mode == 'sequential'")
    each = rows[["run_id", "capacity_label"]].drop_duplicates()
    numbers = each["run_id"].map(run.machine_numbers).fillna(0).astype(int)
    return Counter(numbers[~each.assign(number=numbers).duplicated(["number", "capacity_label"])])


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


def ran_on(run: Run, *frames: pd.DataFrame) -> str:
    """Return from which machines rows come, if the run has several machines; else ""."""
    if len(set(run.machine_numbers.values())) < 2:
        return ""
    *others, last = run.machines_of(pd.concat(frames)).split(", ")
    return f"on the machines {', '.join(others)} and {last}" if others else f"on machine {last}"


def by_machine(run: Run, system: str, **where: Any) -> dict[int, pd.DataFrame]:
    """Return the newest rows of a system on each machine that ran it, by the machine's number.

    Raises:
        NotMeasured: there are none.
    """
    every = select(run, system, replicates=True, **where).groupby("run_id", sort=True)
    return {run.machine_numbers.get(str(run_id), 0): rows for run_id, rows in every}


def _numbers(run: Run, rows: pd.DataFrame) -> set[int]:
    return {run.machine_numbers.get(str(run_id), 0) for run_id in rows["run_id"].unique()}
