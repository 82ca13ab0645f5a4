"""The steps of a run: what `dodo.py` lists as tasks and doit calls when something changed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from djinn_lib.errors import in_words
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.cell import close_dead_cell
from djinn_lib.experiment.kept_rows import rows_that_stay, set_aside
from djinn_lib.experiment.locks import gpu_lock
from djinn_lib.experiment.notebooks import (
    NOTEBOOKS_DIR,
    Status,
    execute,
    has_kernel,
    read_statuses,
    write_status,
)
from djinn_lib.experiment.profile import Cell, Profile
from djinn_lib.files import path_below, write_atomically, write_json
from djinn_lib.rows import classify_error, read_rows
from djinn_lib.systems import system_class

_ROWS, _MANIFEST = ".parquet", ".manifest.json"


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
    kept = _report(status, run_dir)
    return kept and (status.state == "ok" or not needs_success)


def run_cell_notebook(profile: Profile, cell: Cell, run_dir: Path, place: str) -> bool:
    """Execute 02_run_system for one cell; a failure becomes rows, and the run goes on.

    Returns:
        False when not even the failure could be written down (the disk is full, say); the tasks
        that read rows cannot run then, but other cells can.
    """
    status, has_rows = _run_cell(profile, cell, run_dir, place)
    return _report(status, run_dir) and has_rows


def _run_cell(profile: Profile, cell: Cell, run_dir: Path, place: str) -> tuple[Status, bool]:
    """Execute a cell's notebook; returns how it ended, and whether its rows are in their place."""
    print(f"{notebook_of(cell)} ({place}) ...", flush=True)
    with suppress(OSError):  # an interrupted execution's, whose rows are not those of this one
        set_aside(run_dir / "requests" / f"{cell.id}.journal.jsonl")
    status = execute(
        "02_run_system",
        run_dir / "notebooks" / f"{notebook_of(cell)}.ipynb",
        {
            "profile": profile.name,
            "run_dir": str(run_dir),
            "system": cell.system,
            "trace": cell.trace,
            "capacity_label": cell.capacity_label,
            "mode": cell.mode,
        },
        kernel=kernel_for(profile, cell),
    )
    try:
        return _settle(Bench.open(profile, run_dir), cell, status), True
    except Exception as error:  # of any kind: other cells go on
        kind = status.error_kind or classify_error(error)
        said = f"{status.error} (its rows cannot be kept: {error})".strip()
        return replace(status, state="failed", error_kind=kind, error=said), False


def notebook_of(cell: Cell) -> str:
    """Name of a cell's execution: of its notebook and of its status."""
    return f"02_run_system.{cell.id}"


def _settle(bench: Bench, cell: Cell, status: Status) -> Status:
    """See to it that a cell has rows, and return what they make of its notebook's status."""
    if status.state == "failed":
        rows = close_dead_cell(bench, cell, status.error_kind, status.error)
        if n_served := int(rows["ok"].sum()):
            kept = f"{n_served} of {len(rows)} requests had been served, and their rows are kept"
            return replace(status, error=f"{status.error}; {kept}")
        return status
    return judge_rows(status, read_rows(bench.rows_path(cell)))


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


@dataclass(frozen=True)
class Driver:
    """What a worker has to know of the process that it works for."""

    host: str
    threads: str | None  # its OMP_NUM_THREADS

    @classmethod
    def this(cls) -> Driver:
        """Describe this process."""
        return cls(socket.gethostname(), os.environ.get("OMP_NUM_THREADS"))


@dataclass(frozen=True)
class CellOutcome:
    """All that a cell leaves behind, on its way from a worker to the run folder."""

    status: Status
    files: dict[str, bytes]  # by their path in the run folder

    @property
    def is_whole(self) -> bool:
        """Whether rows and manifest are among them."""
        return all(any(name.endswith(end) for name in self.files) for end in (_ROWS, _MANIFEST))


def cell_inputs(run_dir: Path, cell: Cell) -> dict[str, bytes]:
    """Return the files of the run folder that a cell reads, by their path there."""
    paths = ("machine.json", f"traces/{cell.trace}.jsonl")
    return {path: (run_dir / path).read_bytes() for path in paths}


def run_cell_apart(
    profile: Profile, cell: Cell, inputs: dict[str, bytes], run_dir: Path, driver: Driver
) -> CellOutcome:
    """Execute a cell in a scratch folder, for a run whose folder may be on another machine.

    Args:
        profile: of the run; its file and the models must be at the same paths on this machine.
        cell: to be run.
        inputs: from `cell_inputs`.
        run_dir: the run's folder, which the notebook is to name; it is not touched.
        driver: the process that the outcome goes to.

    Raises:
        ConfigError: another run uses the GPU of this machine that Ray has given to the cell.
    """
    lock = gpu_lock(run_dir) if profile.device == "cuda" else nullcontext()
    with lock, _scratch(inputs) as folder, _environment(driver):
        status, has_rows = _run_cell(profile, cell, folder, f"on {socket.gethostname()}")
        if has_rows:
            _note_host(Bench.open(profile, folder).manifest_path(cell), driver.host)
        return _outcome(status, folder, cell, run_dir)


def failed_outcome(
    profile: Profile, cell: Cell, inputs: dict[str, bytes], kind: str, error: str
) -> CellOutcome:
    """Return the outcome of a cell of which nothing came back, or no rows with a manifest.

    Args:
        profile: of the run.
        cell: that failed.
        inputs: from `cell_inputs`, and whatever files did come back.
        kind: an error kind.
        error: what is known of the cause.
    """
    notebook = f"notebooks/{notebook_of(cell)}.ipynb"
    source = (NOTEBOOKS_DIR / "02_run_system.ipynb").read_bytes()
    with _scratch({notebook: source, **inputs}) as folder:
        close_dead_cell(Bench.open(profile, folder), cell, kind, error)
        return _outcome(Status(notebook_of(cell), "failed", 0.0, kind, error), folder, cell, folder)


def keep_outcome(outcome: CellOutcome, run_dir: Path) -> bool:
    """Put an outcome in its place: each file whole or not at all, and the status last.

    Its rows are left out where those of an earlier execution stay (see `kept_rows`).
    """
    files = dict(outcome.files)
    for name in [name for name in files if name.endswith(_ROWS)]:
        manifest = name.removesuffix(_ROWS) + _MANIFEST
        rows = pd.read_parquet(BytesIO(files[name]))
        stay = rows_that_stay(path_below(run_dir, name), rows, json.loads(files[manifest]))
        if stay is not None:
            del files[name], files[manifest]
    for name, content in files.items():
        target = path_below(run_dir, name)
        write_atomically(target, lambda path, content=content: path.write_bytes(content))
    write_status(outcome.status, run_dir / "status")
    return True


def give_up(cell: Cell, run_dir: Path, error: Exception) -> None:
    """Say, here and in its status, that a cell came to nothing; others go on."""
    said = f"its rows cannot be kept: {in_words(error)}"
    _report(Status(notebook_of(cell), "failed", 0.0, classify_error(error), said), run_dir)


@contextmanager
def _scratch(inputs: dict[str, bytes]) -> Iterator[Path]:
    """A run folder that holds the inputs of one cell, and goes in the end."""
    with TemporaryDirectory(prefix="djinn-cell-") as name:
        for path, content in inputs.items():
            (Path(name) / path).parent.mkdir(exist_ok=True)
            (Path(name) / path).write_bytes(content)
        yield Path(name).resolve()


def _outcome(status: Status, folder: Path, cell: Cell, run_dir: Path) -> CellOutcome:
    """All that there is: a kernel that did not start leaves no notebook, a full disk no rows."""
    notebook = f"notebooks/{notebook_of(cell)}.ipynb"
    rows = [f"requests/{cell.id}{end}" for end in (_MANIFEST, _ROWS, ".journal.jsonl")]
    paths = [path for path in (notebook, *rows) if (folder / path).exists()]
    files = {path: (folder / path).read_bytes() for path in paths}
    if notebook in files:  # its reader is to find the run's folder in it, not one that is gone
        files[notebook] = files[notebook].replace(_in_json(folder), _in_json(run_dir))
    return CellOutcome(status, files)


def _in_json(path: Path) -> bytes:
    """A path as it stands within a text of a notebook."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1].encode()


@contextmanager
def _environment(driver: Driver) -> Iterator[None]:
    """Give kernels the environment that they have without Ray.

    A cell may start a Ray of its own, which must not find the one that runs the cell, and Ray sets
    the number of threads, which the systems under test choose themselves.
    """
    kept = dict(os.environ)
    for name in [name for name in kept if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0"})
    if driver.threads:
        os.environ["OMP_NUM_THREADS"] = driver.threads
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _note_host(manifest: Path, set_up_on: str) -> None:
    """Say in the manifest of a cell that another machine than the one described ran it."""
    if (host := socket.gethostname()) != set_up_on:
        content = json.loads(manifest.read_text())
        content["notes"].append(f"run on {host}; the machine described here is {set_up_on}")
        write_json(manifest, content)


def _report(status: Status, run_dir: Path) -> bool:
    """Print a status and keep it; returns False if it cannot be kept."""
    detail = f" ({status.error_kind}: {status.error})" if status.error else ""
    print(f"{status.task}: {status.state} in {status.seconds:.1f} s{detail}", flush=True)
    try:
        write_status(status, run_dir / "status")
    except OSError as error:
        print(f"{status.task}: its status cannot be kept: {error}", flush=True)
        return False
    return True


def is_settled(run_dir: Path, task: str) -> bool:
    """Whether a task need not be run again for its own sake: it did not fail the last time."""
    states = {status.task: status.state for status in read_statuses(run_dir / "status")}
    return states.get(task) in ("ok", "unavailable")
