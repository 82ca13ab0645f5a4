"""Cells of a run, executed in its folder: whatever happens, each has rows that say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING

import pandas as pd

from djinn_lib import nvml
from djinn_lib.errors import in_words
from djinn_lib.experiment.inputs import (
    cell_inputs,
    changed,
    duration,
    expected_s,
    is_current,
    kernel_name,
)
from djinn_lib.experiment.kept_rows import set_aside
from djinn_lib.experiment.manifest import note_execution
from djinn_lib.experiment.profile import Cell, Profile
from djinn_lib.experiment.run_folder import CELL_NOTEBOOK, RunFolder
from djinn_lib.experiment.status import Status, read_execution
from djinn_lib.rows import classify_error, read_rows

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager


def stale_cells(run: RunFolder, profile: Profile, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that have to be run, in an order to run them in.

    Cells that failed before come last. Those of one system at one capacity come together: they
    are a series, which starts it once.
    """
    stale = [cell for cell in cells if not is_current(run, profile, cell)]
    first: dict[tuple[str, str], int] = {}
    for i, cell in enumerate(stale):
        first.setdefault(_series_of(cell), i)

    def place(cell: Cell) -> tuple[bool, int]:
        status = read_execution(run.cell(cell.id).manifest)
        return status is not None and not status.settled, first[_series_of(cell)]

    return sorted(stale, key=place)


def _series_of(cell: Cell) -> tuple[str, str]:
    return cell.system, cell.capacity_label


def run_cells(run: RunFolder, profile: Profile, cells: Sequence[Cell]) -> Iterator[Status]:
    """Run cells here, one after the other; yields how each ended, as it does.

    Those of a series that follow each other have one process. Memory of the GPU that it held is
    waited for before the next one begins.
    """
    base_bytes = nvml.used_bytes() if profile.device == "cuda" else None
    places = {cell.id: f"cell {i} of {len(cells)}" for i, cell in enumerate(cells, start=1)}
    for _, series in groupby(cells, _series_of):
        left = deque(series)
        while left:
            yield from _run_in_one_process(run, profile, left, places)
            if held := nvml.await_memory(base_bytes):
                print(f"warning: {held}", flush=True)


def _run_in_one_process(
    run: RunFolder, profile: Profile, left: deque[Cell], places: Mapping[str, str]
) -> Iterator[Status]:
    """Run cells of a series until none is left, or one failed: the next one gets a new process."""
    from djinn_lib.experiment.notebooks import one_kernel  # see `execute_cell`

    with one_kernel(kernel_name(profile, left[0]), fork=profile.device == "cpu") as kernel:
        while left:
            cell = left.popleft()
            place = f"{places[cell.id]}, {duration(expected_s(run, profile, cell))}"
            status = run_cell_notebook(run, profile, cell, place, kernel, bool(left))
            yield status
            if not status.settled:
                return


def run_cell_notebook(
    run: RunFolder,
    profile: Profile,
    cell: Cell,
    place: str,
    kernel: KernelManager | None = None,
    keep_running: bool = False,
) -> Status:
    """Execute a cell's notebook; a failure becomes rows, and is a status.

    Args:
        run: the folder, after set-up and traces.
        profile: of the run.
        cell: one of the profile's.
        place: what is said of it at its beginning, for people.
        kernel: where to run it; default is one of its own.
        keep_running: whether the next notebook of that kernel is of the same system.

    Raises:
        KeyboardInterrupt: the cell's process has been ended. Its journal is there.
    """
    print(f"{cell.id} ({place}) ...", flush=True)
    begun = cell_inputs(run, profile, cell)
    status = execute_cell(run, profile, cell, kernel, keep_running)
    status = settle(run, profile, cell, replace(status, begun_with=begun))
    report(status, changed(begun, cell_inputs(run, profile, cell)))
    return status


def execute_cell(
    run: RunFolder,
    profile: Profile,
    cell: Cell,
    kernel: KernelManager | None = None,
    keep_running: bool = False,
) -> Status:
    """Execute a cell's notebook, in a kernel of its own or a given one; returns how that ended."""
    from djinn_lib.experiment.notebooks import execute  # papermill: seconds, where nothing is run

    files = run.cell(cell.id)
    with suppress(OSError):  # an interrupted execution's, whose rows are not those of this one
        set_aside(files)
    return execute(
        CELL_NOTEBOOK,
        files.notebook,
        {
            "profile": profile.given,
            "run_dir": str(run.path),
            "system": cell.system,
            "trace": cell.trace,
            "capacity_label": cell.capacity_label,
            "mode": cell.mode,
            "start": cell.start,
            "keep_running": keep_running,
        },
        kernel=kernel_name(profile, cell),
        fork=profile.device == "cpu",
        manager=kernel,
    )


def settle(run: RunFolder, profile: Profile, cell: Cell, status: Status) -> Status:
    """See to it that a cell has rows, and that its manifest says how its execution ended.

    Args:
        run: the folder, with whatever the execution left there.
        profile: of the run.
        cell: that was executed.
        status: of its notebook.

    Returns:
        What the rows make of the status. It says so if not even a failure could be written down
        (the disk is full, say): other cells go on.
    """
    files = run.cell(cell.id)
    try:
        if status.state == "failed":
            status = _close(run, profile, cell, status)
        else:
            status = judge_rows(status, read_rows(files.rows))
        note_execution(files.manifest, asdict(status))
        return status
    except Exception as error:  # of any kind: other cells go on
        kind = status.error_kind or classify_error(error)
        said = f"{status.error} (its rows cannot be kept: {in_words(error)})".strip()
        return replace(status, state="failed", error_kind=kind, error=said)


def _close(run: RunFolder, profile: Profile, cell: Cell, status: Status) -> Status:
    # They import torch, which a run without failures needs only in its cells' processes.
    from djinn_lib.experiment.bench import Bench
    from djinn_lib.experiment.cell import close_dead_cell

    bench = Bench.open(profile, run.path)
    rows = close_dead_cell(bench, cell, status.error_kind, status.error)
    if not (n_served := int(rows["ok"].sum())):
        return status
    kept = f"{n_served} of {len(rows)} requests had been served, and their rows are kept"
    return replace(status, error=f"{status.error}; {kept}")


def judge_rows(status: Status, rows: pd.DataFrame) -> Status:
    """Return the status of a cell whose notebook went through, by what its rows say."""
    failed = rows[~rows["ok"]]
    if failed.empty:
        return status
    first = failed.iloc[0]
    unavailable = bool((failed["error_kind"] == "unavailable").all())
    return replace(
        status,
        state="unavailable" if unavailable else "failed",
        error_kind=first["error_kind"],
        error=f"{len(failed)} of {len(rows)} requests: {first['error']}",
    )


def report(status: Status, changes: Sequence[str] = ()) -> None:
    """Print how an execution ended, and what changed while it went on."""
    print(status, flush=True)
    if changes:
        print(f"{status.task}: {', '.join(changes)} changed while it ran: the next run does it "
              "again", flush=True)  # fmt: skip
