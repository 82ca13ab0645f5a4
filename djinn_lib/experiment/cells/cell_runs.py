"""Execute cells of a run; each gets rows, even if it fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import pandas as pd

from djinn_lib import nvml
from djinn_lib.errors import in_words
from djinn_lib.experiment.cells.inputs import (
    cell_inputs,
    changed,
    duration,
    expected_s,
    is_current,
    kernel_name,
)
from djinn_lib.experiment.cells.kept_rows import set_aside
from djinn_lib.experiment.manifest import Status, note_execution, read_execution
from djinn_lib.experiment.profile import Cell, Profile
from djinn_lib.experiment.run_folder import CELL_NOTEBOOK, RunFolder
from djinn_lib.rows import classify_error, read_rows
from djinn_lib.systems import resizes

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager


def stale_cells(run: RunFolder, profile: Profile, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells to run, in their order of execution.

    Cells that failed before come last. Cells of one system are a series, at one capacity or, if the
    system can change it while it runs, at all: they come together, so it starts only once.
    """
    stale = [cell for cell in cells if not is_current(run, profile, cell)]
    first: dict[tuple[str, str], int] = {}
    for i, cell in enumerate(stale):
        first.setdefault(_series_of(profile, cell), i)

    def place(cell: Cell) -> tuple[bool, int]:
        status = read_execution(run.cell(cell.id).manifest)
        return status is not None and not status.settled, first[_series_of(profile, cell)]

    return sorted(stale, key=place)


def _series_of(profile: Profile, cell: Cell) -> tuple[str, str]:
    entry = profile.systems[cell.system]
    return cell.system, "" if resizes(entry.system, entry.options) else cell.capacity_label


def run_cells(run: RunFolder, profile: Profile, cells: Sequence[Cell]) -> Iterator[Status]:
    """Run cells here, one after the other; yield the status of each when it ends.

    Consecutive cells of a series share a process. The next series starts after the memory of the
    GPU has been freed.
    """
    base_bytes = nvml.used_bytes() if profile.device == "cuda" else None
    places = {cell.id: f"cell {i} of {len(cells)}" for i, cell in enumerate(cells, start=1)}
    for _, series in groupby(cells, partial(_series_of, profile)):
        left = deque(series)
        while left:
            yield from _run_in_one_process(run, profile, left, places)
            if held := nvml.await_memory(base_bytes):
                print(f"warning: {held}", flush=True)


def _run_in_one_process(
    run: RunFolder, profile: Profile, left: deque[Cell], places: Mapping[str, str]
) -> Iterator[Status]:
    """Run the cells of a series up to the first failure, after which a new process is needed."""
    from djinn_lib.experiment.execution.notebooks import one_kernel  # see `execute_cell`

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
    """Execute a cell's notebook; a failure becomes rows and a status.

    Args:
        run: the folder, after set-up and traces.
        profile: the profile of the run.
        cell: a cell of the profile.
        place: text to print when it starts.
        kernel: the kernel to use; default is a new one.
        keep_running: whether the next notebook of that kernel uses the same system.

    Raises:
        KeyboardInterrupt: the cell's process has been ended. Its journal is kept.
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
    """Execute a cell's notebook, in a new or a given kernel; return its status."""
    # It imports papermill, which takes seconds.
    from djinn_lib.experiment.execution.notebooks import execute

    files = run.cell(cell.id)
    with suppress(OSError):  # rows of an interrupted execution do not belong to this one
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
    """Make sure that an executed cell has rows, and its manifest the status of the execution.

    Returns:
        The status of the cell, with the failures in its rows. If nothing can be written, for
        example on a full disk, the status says so, and other cells continue.
    """
    files = run.cell(cell.id)
    try:
        if status.state == "failed":
            status = _close(run, profile, cell, status)
        else:
            status = judge_rows(status, read_rows(files.rows))
        note_execution(files.manifest, asdict(status))
        return status
    except Exception as error:  # of any kind; other cells continue
        kind = status.error_kind or classify_error(error)
        said = f"{status.error} (its rows cannot be kept: {in_words(error)})".strip()
        return replace(status, state="failed", error_kind=kind, error=said)


def _close(run: RunFolder, profile: Profile, cell: Cell, status: Status) -> Status:
    # These import torch, which this process needs only after a failure.
    from djinn_lib.experiment.bench import Bench
    from djinn_lib.experiment.cells.cell import close_dead_cell

    bench = Bench.open(profile, run.path)
    rows = close_dead_cell(bench, cell, status.error_kind, status.error)
    if not (n_served := int(rows["ok"].sum())):
        return status
    kept = f"{n_served} of {len(rows)} requests had been served, and their rows are kept"
    return replace(status, error=f"{status.error}; {kept}")


def judge_rows(status: Status, rows: pd.DataFrame) -> Status:
    """Return the status of a cell whose notebook succeeded, from its rows."""
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
    """Print the status of an execution, and the inputs that changed meanwhile."""
    print(status, flush=True)
    if changes:
        print(f"{status.task}: {', '.join(changes)} changed while it ran: the next run does it "
              "again", flush=True)  # fmt: skip
