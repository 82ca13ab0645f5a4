"""The steps of a run: what `dodo.py` lists as tasks and doit calls when something changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.bench import Bench
from djinn_lib.cell import close_dead_cell
from djinn_lib.notebooks import Status, execute, has_kernel, read_statuses, write_status
from djinn_lib.profile import Cell, Profile
from djinn_lib.records import read_rows
from djinn_lib.systems import system_class


def kernel_for(profile: Profile, cell: Cell) -> str | None:
    """Return the kernel of an environment of its own that a cell needs, where it is installed."""
    kernel = system_class(profile.systems[cell.system].system).kernel
    return kernel if profile.device == "cpu" and kernel and has_kernel(kernel) else None


def run_notebook(
    notebook: str, run_dir: Path, parameters: Mapping[str, Any], needs_success: bool = True
) -> bool:
    """Execute a notebook into the run folder and keep its status.

    Returns:
        False when it failed and the tasks after it cannot do without it.
    """
    print(f"{notebook} ...", flush=True)
    status = execute(notebook, run_dir / "notebooks" / f"{notebook}.ipynb", parameters)
    _report(status, run_dir)
    return status.state == "ok" or not needs_success


def run_cell_notebook(profile: Profile, cell: Cell, run_dir: Path, place: str) -> bool:
    """Execute 02_run_system for one cell; a failure becomes rows, and the run goes on."""
    print(f"02_run_system.{cell.id} ({place}) ...", flush=True)
    status = execute(
        "02_run_system",
        run_dir / "notebooks" / f"02_run_system.{cell.id}.ipynb",
        {
            "profile": profile.name,
            "run_dir": str(run_dir),
            "system": cell.system,
            "trace": cell.trace,
            "capacity_label": cell.capacity_label,
        },
        kernel=kernel_for(profile, cell),
    )
    bench = Bench.open(profile, run_dir)
    if status.state == "failed":
        close_dead_cell(bench, cell, status.error_kind, status.error)
    else:
        status = judge_rows(status, read_rows(bench.rows_path(cell)))
    _report(status, run_dir)
    return True


def judge_rows(status: Status, rows: pd.DataFrame) -> Status:
    """Return the status of a cell whose notebook went through, by what its rows say."""
    failed = rows[~rows["ok"]]
    if failed.empty:
        return status
    first = failed.iloc[0]
    unavailable = bool((failed["error_kind"] == "unavailable").all())
    state = "unavailable" if unavailable else "failed"
    error = f"{len(failed)} of {len(rows)} requests: {first['error']}"
    return Status(status.task, state, status.seconds, first["error_kind"], error)


def _report(status: Status, run_dir: Path) -> None:
    write_status(status, run_dir / "status")
    detail = f" ({status.error_kind}: {status.error})" if status.error else ""
    print(f"{status.task}: {status.state} in {status.seconds:.1f} s{detail}", flush=True)


def is_settled(run_dir: Path, task: str) -> bool:
    """Whether a task need not be run again for its own sake: it did not fail the last time."""
    states = {status.task: status.state for status in read_statuses(run_dir / "status")}
    return states.get(task) in ("ok", "unavailable")
