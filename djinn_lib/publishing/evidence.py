"""Link a claim to its evidence: its notebook, its figure and its rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from djinn_lib.analysis.claims import Claim, Verdict
from djinn_lib.analysis.selection import MAIN_CAPACITY, MAIN_TRACE
from djinn_lib.experiment.profile import cell_id

_SYSTEMS = ("system", "to", "baseline", "reference")  # arguments of metrics that name systems
_OF_THE_MACHINE = {"total_gib", "model_gib", "capacity_share"}
_OF_THE_TRACE = {"popularity_ratio", "computed_hit_share"}
_OF_LOADS = {"highest_rate"}  # rows of the traces whose names begin alike
_OF_ALL_SYSTEMS = {"token_agreement", "token_agreement_of"}
_OF_ALL_CELLS_OF_A_SYSTEM = {
    "token_agreement_when_concurrent": ("sequential", "concurrent"),
    "token_repeatability": ("sequential",),
    "writeback_bytes": ("sequential", "concurrent"),
}
_OF_ALL_CAPACITIES = {"speedup_over_capacities", "speedup_spread", "worst_bytes_to_optimum"}
_MOST = 8  # a claim with more cells gets one link to all


@dataclass(frozen=True, slots=True)
class Link:
    """One link of a page, relative to it, with those to other runs of the same cell."""

    text: str
    href: str
    others: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class Shown:
    """The link targets on the page of a run.

    `notebooks` has the path of each executed notebook by name, `figures` their names, `cells` the
    parts of the id of each cell that has rows; `traces` and `replicates` are names of files.
    """

    notebooks: Mapping[str, str]
    figures: Collection[str]
    cells: Sequence[tuple[str, str, str, str, str]]
    traces: Collection[str]
    replicates: Collection[str] = ()


def evidence(verdict: Verdict, claim: Claim | None, shown: Shown) -> list[Link]:
    """Return the links of a verdict to its existing evidence.

    The claim of the same id names its rows; it is None if it no longer exists.
    """
    links = []
    if href := shown.notebooks.get(verdict.notebook):
        links.append(Link(verdict.notebook, href))
    if verdict.figure in shown.figures:
        links.append(Link("figure", f"#figure-{verdict.figure}"))
    return links + (list(_data(claim, shown)) if claim else [])


def _data(claim: Claim, shown: Shown) -> Iterator[Link]:
    if claim.metric in _OF_THE_MACHINE:
        yield Link("machine.json", "machine.json")
        return
    if claim.metric in _OF_THE_TRACE:
        name = f"{claim.arguments.get('trace', MAIN_TRACE)}.jsonl"
        if name in shown.traces:
            yield Link("trace", f"traces/{name}")
        return
    cells = [cell for cell in shown.cells if _rests_on(claim, *cell)]
    if len(cells) > _MOST:
        yield Link(f"rows of {len(cells)} cells", "#data")
        return
    for cell in cells:
        name = cell_id(*cell)
        others = tuple(_other_runs(name, shown.replicates))
        yield Link(f"rows of {name}", f"requests/{name}.parquet", others)


def _other_runs(cell: str, replicates: Collection[str]) -> Iterator[Link]:
    """Yield the other runs of a cell, the oldest first.

    A comparison rests on rows of one machine, which may be those of another run.
    """
    for name in sorted(replicates):
        if found := re.fullmatch(rf"{re.escape(cell)}-(\d{{8}}T\d{{6}})\d*\.parquet", name):
            at = datetime.strptime(found[1], "%Y%m%dT%H%M%S")
            yield Link(f"{at:%Y-%m-%d %H:%M}", f"replicates/{name}")


def _rests_on(claim: Claim, trace: str, capacity: str, system: str, mode: str, start: str) -> bool:
    """Whether a claim is measured on the rows of a cell; None in an argument stands for all."""
    where: Mapping[str, Any] = claim.arguments
    if claim.metric not in _OF_ALL_SYSTEMS and system not in _systems(where, system):
        return False
    if claim.metric in _OF_ALL_CELLS_OF_A_SYSTEM:
        return mode in _OF_ALL_CELLS_OF_A_SYSTEM[claim.metric]
    if where.get("start", "cold") not in (start, None):
        return False
    of_load, load = claim.metric in _OF_LOADS, f"{where.get('traces', 'load')}_"
    all_capacities = claim.metric in _OF_ALL_CAPACITIES
    wanted_capacity = where.get("capacity_label", None if all_capacities else MAIN_CAPACITY)
    wanted_trace = where.get("trace", MAIN_TRACE)
    return (
        ("concurrent" if of_load else where.get("mode", "sequential")) in (mode, None)
        and (trace.startswith(load) if of_load else wanted_trace in (trace, None))
        and wanted_capacity in (capacity, None)
    )


def _systems(where: Mapping[str, Any], system: str) -> set[str]:
    named: set[str] = set()
    for argument in _SYSTEMS:
        if argument in where:
            value = where[argument]
            named |= {system} if value is None else {value} if isinstance(value, str) else {*value}
    return named
