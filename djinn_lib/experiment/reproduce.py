"""`make reproduce`: runs the tasks of `dodo.py` for one profile and says how it went.

The exit status is 0 when every request of every cell that can run here was served and every
notebook went through; 1 when something failed, which the last lines then name; 2 for bad input and
for a run folder or GPU that another run uses; 75 (of sysexits.h: try again later) when cells were
left over because of `--time-limit`; 130 when it was interrupted (Ctrl-C) or told to stop. After 75
and 130 the same command goes on where it was.

A file that is edited while a task runs, be it code, profile, trace or weights, has it run again by
the next command: what it left belongs to what it was begun with.

With `--time-limit` no cell begins that is not expected to end in time. doit keeps its records cell
by cell, so that whatever ends the process, even a kill, costs no more than the cell that it runs.

With `--executor ray` the cells run on a Ray cluster. doit still owns all tracking: after set-up and
trace it says which cells are not up to date; those go to the workers, each of which executes its
notebook in a scratch folder; and whenever an outcome comes back, doit runs that cell's task, whose
action then only puts the files in place. So a cell that Ray ran is up to date for either executor,
at once, and a run that is interrupted goes on where it was. What is left after the cells, doit runs
here as always.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from djinn_lib import nvml
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.experiment.bench import ensure_writable
from djinn_lib.experiment.fan_out import Job, Result, ensure_ray, fan_out
from djinn_lib.experiment.locks import run_locks
from djinn_lib.experiment.notebooks import Status, read_statuses
from djinn_lib.experiment.profile import REPO, Cell, Profile, load_profile
from djinn_lib.experiment.schedule import Limit, estimate_s, left_over_lines, run_within, span
from djinn_lib.experiment.tasks import (
    CellOutcome,
    Driver,
    cell_inputs,
    failed_outcome,
    give_up,
    run_cell_apart,
)
from djinn_lib.paths import user_path

INCOMPLETE = 75  # EX_TEMPFAIL
READING_S = 90.0  # what the notebooks that only read rows and the report take, all together


def main(arguments: list[str] | None = None) -> int:
    """Run a profile; returns the exit status."""
    options = _options(arguments)
    begin_s, limit = time.perf_counter(), Limit(options.time_limit)
    try:
        profile = load_profile(options.profile)
        _ensure_device(profile)
        run_dir = (options.run_dir or REPO / "data" / "runs" / profile.name).resolve()
        ensure_writable(run_dir)
        locked = run_locks(run_dir, profile.device if options.executor == "local" else "cpu")
        with locked, _told_to_stop():
            code = _run(profile, run_dir, options.tasks, options.executor, limit)
    except DjinnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: the same command goes on with the first unfinished cell", file=sys.stderr
        )
        return 130
    print(f"finished in {time.perf_counter() - begin_s:.0f} s", flush=True)
    return max(code, _summary(run_dir))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="djinn_lib.experiment.reproduce", description=__doc__)
    parser.add_argument("--profile", default="cpu", help="a file of params/, without .yml")
    parser.add_argument(
        "--run-dir", type=user_path, help="where results go; default data/runs/PROFILE"
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where cells run: here, one after the other, or on a Ray cluster (RAY_ADDRESS)",
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help="begin no cell that is not expected to end in time; exit status 75 if some are left",
    )
    parser.add_argument("tasks", nargs="*", help="tasks of dodo.py; default all")
    options = parser.parse_args(arguments)
    if options.time_limit is not None and options.executor == "ray":
        parser.error("--time-limit: expected the local executor, which runs one cell after another")
    return options


def _seconds(text: str) -> float:
    if (seconds := float(text)) <= 0:
        raise ValueError(f"expected more than 0 seconds, got {text}")
    return seconds


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Take SIGTERM, which `timeout` and batch systems send, for an interrupt: kernels end too."""

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
                f"expected a usable CUDA device for profile {profile.name!r}, got none: "
                "use PROFILE=cpu, or install a driver"
            )


def _run(profile: Profile, run_dir: Path, tasks: list[str], executor: str, limit: Limit) -> int:
    os.environ["DJINN_PROFILE"], os.environ["DJINN_RUN_DIR"] = profile.name, str(run_dir)
    sys.path.insert(0, str(REPO))
    if executor == "ray":
        ensure_ray()  # before the set-up, which takes a while
    if _stale_cells(tasks):
        if code := _doit(["setup", "trace"]):
            return code
        cells = _as_named(_stale_cells(tasks), tasks)
        if executor == "ray":
            _fan_out_cells(profile, run_dir, cells)
        elif _run_cells(profile, run_dir, cells, limit):
            return INCOMPLETE
    if not limit.allows(None if tasks else READING_S):
        print(f"the limit of {span(limit.seconds or 0)} is near: what only reads rows is left")
        return INCOMPLETE
    return _doit(tasks)


def _as_named(cells: list[Cell], tasks: list[str]) -> list[Cell]:
    """Put the cells that are named themselves first, in the order of their names."""
    place = {task: i for i, task in enumerate(tasks)}
    return sorted(cells, key=lambda cell: place.get(f"cell:{cell.id}", len(place)))


def _run_cells(profile: Profile, run_dir: Path, cells: list[Cell], limit: Limit) -> list[Cell]:
    """Run cells here, one after the other; returns those for which there was no time.

    Those that failed before come last: others have not had their turn.
    """
    import dodo

    def estimate(cell: Cell) -> float | None:
        return estimate_s(cell, profile, run_dir)

    def begin(cell: Cell) -> None:
        dodo.TRIED.discard(cell.id)
        _doit(["--single", f"cell:{cell.id}"])
        dodo.TRIED.add(cell.id)
        if left := nvml.await_memory(base_bytes):
            print(f"warning: {left}", flush=True)

    base_bytes = nvml.used_bytes() if profile.device == "cuda" else None
    tried = {status.task for status in read_statuses(run_dir / "status")}
    in_order = sorted(cells, key=lambda cell: f"02_run_system.{cell.id}" in tried)
    left_over = run_within(in_order, begin, estimate, limit)
    if left_over:
        print("\n".join(left_over_lines(left_over, estimate, limit)), flush=True)
    return left_over


def _doit(arguments: list[str]) -> int:
    from doit.cmd_base import ModuleTaskLoader
    from doit.doit_cmd import DoitMain

    import dodo

    return DoitMain(ModuleTaskLoader(dodo)).run(
        ["run", "--continue", "--reporter", "error-only", *arguments]
    )


def _stale_cells(tasks: list[str]) -> list[Cell]:
    """Return the cells that the tasks need and that are not up to date, by doit's own records.

    Raises:
        ConfigError: there is no such task.
    """
    from doit.cmd_base import DoitCmdBase, ModuleTaskLoader
    from doit.control import TaskControl
    from doit.exceptions import InvalidCommand

    import dodo

    stale: set[str] = set()

    class Stale(DoitCmdBase):
        def _execute(self) -> None:
            control = TaskControl(self.task_list)
            control.process(self.sel_tasks)
            names = _with_needed(control.tasks, control.selected_tasks)
            for name in names:
                status = self.dep_manager.get_status(control.tasks[name], control.tasks)
                stale.update([] if status.status == "up-to-date" else [name])
            self.dep_manager.close()

    try:
        Stale(task_loader=ModuleTaskLoader(dodo)).parse_execute(tasks)
    except InvalidCommand as error:
        raise ConfigError(f"{error}") from error
    return [cell for cell in dodo.CELLS if f"cell:{cell.id}" in stale]


def _with_needed(tasks: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Return the names of tasks and of all that have to run before them."""
    needed, open_names = set(), list(names)
    while open_names:
        name = open_names.pop()
        if name not in needed:
            needed.add(name)
            open_names += tasks[name].task_dep
    return needed


def _fan_out_cells(profile: Profile, run_dir: Path, cells: list[Cell]) -> None:
    """Run cells on Ray; each is in its place, and up to date for doit, as soon as it is back."""

    def on_done(job: Job, result: Result) -> None:
        _, cell, inputs, *_ = job.arguments
        try:
            _keep(cell, _whole_outcome(profile, cell, inputs, result))
        except Exception as error:  # of one cell, whose rows no disk has room for, say
            give_up(cell, run_dir, error)

    import dodo

    for cell in cells:
        dodo.BEGUN.note(f"cell:{cell.id}", dodo.inputs_of(cell))
    fan_out([_job(profile, run_dir, cell) for cell in cells], on_done)


def _whole_outcome(
    profile: Profile, cell: Cell, inputs: dict[str, bytes], result: Result
) -> CellOutcome:
    """What a cell came to, with rows for every request whatever came back."""
    outcome: CellOutcome | None = result.value
    if outcome is None:
        kind = "kernel_died" if result.lost else "other"
        return failed_outcome(profile, cell, inputs, kind, result.error)
    if outcome.is_whole:
        return outcome
    status, came_back = outcome.status, {**inputs, **outcome.files}
    return failed_outcome(profile, cell, came_back, status.error_kind, status.error)


def _job(profile: Profile, run_dir: Path, cell: Cell) -> Job:
    arguments = (profile, cell, cell_inputs(run_dir, cell), run_dir, Driver.this())
    if profile.device == "cuda":
        return Job(cell.id, run_cell_apart, arguments, num_gpus=1)
    return Job(cell.id, run_cell_apart, arguments, whole_node=True)  # it computes on all cores


def _keep(cell: Cell, outcome: CellOutcome) -> None:
    import dodo

    dodo.OUTCOMES[cell.id] = outcome
    _doit(["--single", f"cell:{cell.id}"])
    if outcome.status.state != "ok":
        print(f"{outcome.status.state}: {_line(outcome.status)}", flush=True)


def _summary(run_dir: Path) -> int:
    statuses = read_statuses(run_dir / "status")
    for status in statuses:
        if status.state != "ok":
            print(f"{status.state}: {_line(status)}")
    failed = [status for status in statuses if status.state == "failed"]
    page = run_dir / "index.html"
    print(f"{len(statuses)} notebooks, {len(failed)} failed; results: {page}", flush=True)
    return 1 if failed else 0


def _line(status: Status) -> str:
    return f"{status.task} ({status.error_kind}: {status.error})"


if __name__ == "__main__":
    sys.exit(main())
