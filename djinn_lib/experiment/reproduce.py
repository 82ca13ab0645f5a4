"""Bring all notebooks of a profile up to date, and print a summary (`make reproduce`).

    djinn reproduce --profile cpu
    djinn reproduce --profile cpu cell:paper-25-djinn figures

The order is: the set-up and the traces, the cells, the notebooks that read rows, the page. If cells
and notebooks are named, only these are run, after the set-up that they need. A task that succeeded
with the present inputs is not run again. A run that was stopped or killed therefore continues with
its current cell.

The exit status is 0 if all notebooks succeeded and all requests of all cells that can run here were
served. It is 1 if something failed; the last lines name it. It is 2 if the input is wrong, or if
another run uses the run folder or the GPU. It is 130 if the run was interrupted or got SIGTERM.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.cells.cell_runs import run_cells, stale_cells
from djinn_lib.experiment.cells.inputs import LIBRARY, expected_s
from djinn_lib.experiment.executors import ensure_ray
from djinn_lib.experiment.locks import run_locks
from djinn_lib.experiment.manifest import Status, read_execution, read_status
from djinn_lib.experiment.profile import Cell, Profile, load_profile
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.experiment.steps import READING, STEPS, Step, run_steps, set_up
from djinn_lib.files import ensure_writable
from djinn_lib.paths import RUNS
from djinn_lib.rows import classify_error

_CELL = "cell:"
_PAGE = "page"


def reproduce(
    profile_name: str,
    run_dir: Path | None = None,
    executor: str = "local",
    names: Sequence[str] = (),
) -> int:
    """Run the missing and outdated parts of a profile; return 0, or 1 if something failed.

    Args:
        profile_name: a file of ``params/`` without ".yml", or the path of a .yml file.
        run_dir: folder of the results; default ``data/runs/<profile>``.
        executor: where cells run: "local" or "ray".
        names: cells ("cell:paper-25-djinn") and notebooks ("figures") to run; default all.

    Raises:
        ConfigError: there is no such profile or name, no device for it, the folder cannot be
            written to, or another run uses it or the GPU.
        PlatformError: Ray cannot be used.
        KeyboardInterrupt: the process was interrupted or got SIGTERM.
    """
    begin_s, profile = time.perf_counter(), load_profile(profile_name)
    work = Work.named(profile, names)
    _ensure_device(profile)
    run = RunFolder((run_dir or RUNS / profile.name).resolve())
    ensure_writable(run.path)
    if executor == "ray":
        ensure_ray()  # check it first, because the set-up takes long
    device = profile.device if executor == "local" else "cpu"
    with run_locks(run.path, device), _told_to_stop():
        ended = {status.task: status for status in _run(work, run, profile, executor)}
    print(f"finished in {time.perf_counter() - begin_s:.0f} s", flush=True)
    return _summary(_statuses(work, run, ended), run)


@dataclass(frozen=True)
class Work:
    """The tasks that a command brings up to date.

    Args:
        cells: cells, in the order of execution.
        steps: notebooks that run after the cells.
        set_up: whether the set-up and the traces are included; cells need them.
        page: whether the page is included.
    """

    cells: Sequence[Cell]
    steps: Sequence[Step]
    set_up: bool = True
    page: bool = True

    @classmethod
    def named(cls, profile: Profile, names: Sequence[str]) -> Work:
        """Return the tasks with these names; no names mean all tasks.

        Raises:
            ConfigError: the profile has no such cell, or there is no such notebook.
        """
        cells = {f"{_CELL}{cell.id}": cell for cell in profile.all_cells()}
        if not names:
            return cls(list(cells.values()), READING)
        steps = {name: step for step in STEPS for name in (step.name, step.notebook)}
        for name in names:
            if name not in (*cells, *steps, _PAGE):
                raise ConfigError(
                    f"the profile {profile.name!r} has no {name!r}: name a notebook out of "
                    f"{[step.name for step in STEPS]}, {_PAGE!r}, or a cell, such as "
                    f"{next(iter(cells))}"
                )
        chosen = [cells[name] for name in names if name in cells]
        named = [steps[name] for name in names if name in steps]
        reading = [step for step in READING if step in named]
        needs_set_up = bool(chosen) or any(step not in READING or step.measures for step in named)
        return cls(chosen, reading, needs_set_up, _PAGE in names)


def _run(work: Work, run: RunFolder, profile: Profile, executor: str) -> Iterator[Status]:
    """Bring all tasks up to date in order; yield the status of each execution."""
    if work.set_up:
        ended = set_up(run, profile)
        yield from ended
        if not all(status.settled for status in ended):
            print("without set-up and traces nothing else can run", flush=True)
            return
    if cells := stale_cells(run, profile, work.cells):
        print(_ahead(run, profile, cells, len(work.cells)), flush=True)
        if executor == "ray":
            from djinn_lib.experiment.cells.ray_cells import run_cells_on_ray

            yield from run_cells_on_ray(run, profile, cells)
        else:
            yield from run_cells(run, profile, cells)
    yield from run_steps(work.steps, run, profile)
    if work.page:
        yield from _make_page(run)


def _ahead(run: RunFolder, profile: Profile, cells: Sequence[Cell], n_all: int) -> str:
    known = [s for cell in cells if (s := expected_s(run, profile, cell)) is not None]
    text = f"{len(cells)} of {n_all} cells to run"
    if known:
        text += f", about {sum(known) / 60:.1f} min for {len(known)} of them"
    return text


def _make_page(run: RunFolder) -> Iterator[Status]:
    """Write the page if something that it shows is newer; yield a status if that fails."""
    code = LIBRARY / "publishing"
    shown = [run.claims, run.machine, *run.requests.glob("*.*"), *run.figures.glob("*"),
             *run.notebooks.glob("*.ipynb"), *code.glob("*.py"),
             *code.glob("templates/*")]  # fmt: skip
    newest_ns = max((path.stat().st_mtime_ns for path in shown if path.exists()), default=0)
    if not run.page.exists() or run.page.stat().st_mtime_ns < newest_ns:
        from djinn_lib.experiment.execution.notebooks import in_a_fork  # imports papermill

        print("index.html ...", flush=True)
        begin_s = time.perf_counter()
        try:
            in_a_fork(_build, run.path)
        except OSError as error:  # what was measured is kept
            said = f"{error}: make room, and run the same command again"
            seconds = time.perf_counter() - begin_s
            yield Status(run.page.name, "failed", seconds, classify_error(error), said)


def _build(folder: Path) -> None:
    from djinn_lib.publishing.report import build_report  # from a higher layer

    build_report(folder)


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Treat SIGTERM (from `timeout`, batch systems) as an interrupt, so kernels end too."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ensure_device(profile: Profile) -> None:
    if profile.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"profile {profile.name!r} needs a CUDA device, and none is usable here: "
                "install a driver, or choose the profile cpu (make: PROFILE=cpu; djinn run and "
                "sweep: --config-file cpu; djinn reproduce: --profile cpu)"
            )


def _statuses(work: Work, run: RunFolder, ended: dict[str, Status]) -> list[Status]:
    """Return the statuses of all tasks, from this run or an earlier one."""
    steps = [*(STEPS[:2] if work.set_up else ()), *work.steps]
    kept = [
        *(read_status(run.notebook(step.notebook)) for step in steps),
        *(read_execution(run.cell(cell.id).manifest) for cell in work.cells),
    ]
    return list(({status.task: status for status in kept if status} | ended).values())


def _summary(statuses: Sequence[Status], run: RunFolder) -> int:
    failed = [status for status in statuses if not status.settled]
    for status in statuses:
        if status.state != "ok":
            print(status)
    results = run.page if run.page.exists() else run.path
    print(f"{len(statuses)} notebooks, {len(failed)} failed; results: {results}", flush=True)
    return 1 if failed else 0
