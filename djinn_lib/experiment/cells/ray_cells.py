"""Run cells on a Ray cluster: a worker executes a cell and returns all its files.

A worker executes the cell in a scratch folder. The files are then put into the run's folder by this
process only, as for a cell that ran here. So a cell that Ray ran is up to date for either executor.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from djinn_lib.errors import in_words
from djinn_lib.experiment.cells.cell_runs import execute_cell, report, settle
from djinn_lib.experiment.cells.inputs import cell_inputs, changed
from djinn_lib.experiment.cells.kept_rows import keep, set_aside
from djinn_lib.experiment.executors import Job, Result, fan_out
from djinn_lib.experiment.locks import gpu_lock
from djinn_lib.experiment.manifest import Status
from djinn_lib.experiment.profile import Cell, Profile
from djinn_lib.experiment.run_folder import CELL_NOTEBOOK, CellFiles, RunFolder
from djinn_lib.files import write_atomically
from djinn_lib.paths import NOTEBOOKS
from djinn_lib.rows import classify_error

_KINDS = ("rows", "manifest", "journal", "notebook", "log")  # files of a cell, as in `CellFiles`


@dataclass(frozen=True)
class Driver:
    """What a worker must know about the process that sent the cell."""

    run_dir: Path
    threads: str | None  # its OMP_NUM_THREADS


@dataclass(frozen=True)
class Outcome:
    """Status of a cell's notebook on a worker, the worker's host, and the files by their kind."""

    status: Status
    host: str
    files: dict[str, bytes]


def run_cells_on_ray(run: RunFolder, profile: Profile, cells: Sequence[Cell]) -> Iterator[Status]:
    """Run cells on Ray; save each one's files when they arrive, and yield its status.

    Raises:
        ConfigError, PlatformError: no cluster is available; nothing has run.
    """
    begun = {cell.id: cell_inputs(run, profile, cell) for cell in cells}
    by_id, driver = (
        {cell.id: cell for cell in cells},
        Driver(run.path, os.environ.get("OMP_NUM_THREADS")),
    )
    gpus = 1 if profile.device == "cuda" else 0  # without a GPU it computes on all cores
    jobs = [
        Job(cell.id, run_apart, (profile, cell, _inputs(run, cell), driver),
            num_gpus=gpus, whole_node=not gpus)
        for cell in cells
    ]  # fmt: skip
    for n_done, (job, result) in enumerate(fan_out(jobs), start=1):
        cell = by_id[job.name]
        status = take_back(run, profile, cell, result, begun[cell.id])
        print(f"{cell.id}: {n_done} of {len(cells)} back", flush=True)
        report(status, changed(begun[cell.id], cell_inputs(run, profile, cell)))
        yield status


def _inputs(run: RunFolder, cell: Cell) -> dict[str, bytes]:
    """Read the files of the run folder that a cell needs, by their path in the folder."""
    paths = (run.machine, run.trace(cell.trace))
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def run_apart(profile: Profile, cell: Cell, inputs: dict[str, bytes], driver: Driver) -> Outcome:
    """Execute a cell in a scratch folder, because the folder of the run may be on another machine.

    Args:
        profile: profile of the run; its file and the models must have the same paths here.
        cell: the cell to run.
        inputs: files that it reads, by their path in the run's folder.
        driver: the process that receives the outcome.

    Raises:
        ConfigError: another run uses the GPU that Ray assigned to the cell.
    """
    lock = gpu_lock(driver.run_dir) if profile.device == "cuda" else nullcontext()
    with lock, TemporaryDirectory(prefix="djinn-cell-") as name, _environment(driver):
        scratch = RunFolder(Path(name).resolve())
        for path, content in inputs.items():
            (scratch.path / path).parent.mkdir(exist_ok=True)
            (scratch.path / path).write_bytes(content)
        status = execute_cell(scratch, profile, cell)
        files = scratch.cell(cell.id)
        left = {
            kind: path.read_bytes() for kind in _KINDS if (path := getattr(files, kind)).exists()
        }
        if notebook := left.get("notebook"):  # names the run's folder, not the scratch folder
            left["notebook"] = notebook.replace(_in_json(scratch.path), _in_json(driver.run_dir))
        return Outcome(status, socket.gethostname(), left)


def take_back(
    run: RunFolder, profile: Profile, cell: Cell, result: Result, begun: dict[str, str]
) -> Status:
    """Put the returned files of a cell into the run's folder, and return its status.

    If nothing or no rows came back, every request that is missing in the journal gets a failed row.
    If the files cannot be written, the status says so, and other cells continue.
    """
    files, outcome = run.cell(cell.id), result.value
    if outcome is None:
        kind = "kernel_died" if result.lost else "other"
        status = Status(files.task, "failed", 0.0, kind, result.error, begun)
    else:
        status = replace(outcome.status, begun_with=begun)
        if status.settled and not {"rows", "manifest"} <= outcome.files.keys():
            status = replace(status, state="failed", error_kind="other", error="no rows came back")
    try:
        set_aside(files)
        _put(outcome, files)
    except Exception as error:  # of one cell, for example a full disk; others continue
        said = f"its rows cannot be kept: {in_words(error)}"
        return replace(status, state="failed", error_kind=classify_error(error), error=said)
    return settle(run, profile, cell, status)


def _put(outcome: Outcome | None, files: CellFiles) -> None:
    left = outcome.files if outcome else {}
    files.log.unlink(missing_ok=True)  # of an earlier execution
    for kind in ("notebook", "log", "journal"):
        if kind in left:
            content = left[kind]
            write_atomically(getattr(files, kind), lambda to, of=content: to.write_bytes(of))
    if "notebook" not in left:
        files.notebook.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(NOTEBOOKS / f"{CELL_NOTEBOOK}.ipynb", files.notebook)
    if outcome and {"rows", "manifest"} <= left.keys():
        manifest = json.loads(left["manifest"])
        if outcome.host != (here := socket.gethostname()):
            note = f"run on {outcome.host}; the machine described here is {here}"
            manifest["notes"].append(note)
        keep(files, pd.read_parquet(BytesIO(left["rows"])), manifest)


def _in_json(path: Path) -> bytes:
    """Encode a path as in a string of a notebook's JSON."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1].encode()


@contextmanager
def _environment(driver: Driver) -> Iterator[None]:
    """Give kernels the same environment as without Ray.

    A cell may start its own Ray, which must not find the cluster that runs the cell. Ray also sets
    the number of threads, but the systems under test choose it themselves.
    """
    kept = dict(os.environ)
    for name in [name for name in kept if name.startswith("RAY_") or name == "OMP_NUM_THREADS"]:
        del os.environ[name]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if driver.threads:
        os.environ["OMP_NUM_THREADS"] = driver.threads
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
