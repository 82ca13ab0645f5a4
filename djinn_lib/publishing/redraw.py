"""Figures drawn again from rows: `make figures`, `python -m djinn_lib.publishing.redraw`.

The notebooks that only read rows are the one definition of every figure, so they are what runs
here. Without a folder it is the reference run, and the published figures in `figures/` are drawn
again; with one it is a run of your own, whose figures, claims, notebooks and page are made anew.
Notebooks run side by side, one a core: it takes about a minute and needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from djinn_lib.analysis.run import REPLICATES, load_run
from djinn_lib.errors import ConfigError, DjinnError, RecordError
from djinn_lib.experiment import large_results
from djinn_lib.experiment.notebooks import Status, execute, read_statuses, write_status
from djinn_lib.paths import FIGURES, REFERENCE, user_path
from djinn_lib.publishing.report import build_report
from djinn_lib.replacing import recover, replace_folders

MOST_AT_ONCE = 4  # each takes up to a gigabyte of memory
_processes = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
# Those that take longest come first, so that none is left over for the end.
READING = ("06_policies", "04_figures", "03_sensitivity", "05_claims", "explore")


def main(arguments: list[str] | None = None) -> int:
    """Draw; returns the exit status: 1 when a notebook failed, 2 when there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="djinn_lib.publishing.redraw", description=__doc__)
    parser.add_argument("run_dir", type=user_path, nargs="?", help="default: the reference run")
    options = parser.parse_args(arguments)
    try:
        if options.run_dir:
            failed = [s for s in read_again(options.run_dir.resolve()) if s.state != "ok"]
            print(f"results: {build_report(options.run_dir)}", flush=True)
        else:
            failed = redraw_published()
    except (DjinnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def read_again(run_dir: Path, reference_dir: Path = REFERENCE) -> list[Status]:
    """Execute every notebook that only reads rows, into a run's folder; returns how each ended.

    Args:
        run_dir: with rows, traces and machine.json; gets figures, claims, notebooks and statuses.
        reference_dir: of the rows that the simulator's clock is fitted to.

    Raises:
        RecordError: the folder holds no run that can be read.
    """
    load_run(run_dir)
    (run_dir / "figures").mkdir(exist_ok=True)
    parameters = {name: {"run_dir": str(run_dir)} for name in READING}
    parameters["06_policies"]["reference_dir"] = str(reference_dir)
    parameters["explore"] = {"figures_dir": str(run_dir / "figures")}
    if (run_dir / large_results.ROWS).exists():
        profile = large_results.profile_of(run_dir)
        more = {"profile": profile, "run_dir": str(run_dir), "measure": False}
        parameters[large_results.NOTEBOOK] = more
    for status in _side_by_side(run_dir / "notebooks", parameters):
        write_status(status, run_dir / "status")
        took = f"{status.state} in {status.seconds:.1f} s {status.error}".rstrip()
        print(f"{status.task}: {took}", flush=True)
    return [status for status in read_statuses(run_dir / "status") if status.task in parameters]


def _side_by_side(folder: Path, parameters: Mapping[str, dict[str, Any]]) -> Iterator[Status]:
    """Execute notebooks into a folder; yields how each ended, the first to end first.

    In processes, because papermill changes the working directory of its own. They only read the
    same rows, so that it does not matter which comes first, nor how long another makes it take.
    """
    with _processes(min(len(parameters), len(os.sched_getaffinity(0)), MOST_AT_ONCE)) as pool:
        running = {
            pool.submit(execute, name, folder / f"{name}.ipynb", values): name
            for name, values in parameters.items()
        }
        print(f"{', '.join(running.values())} ...", flush=True)
        try:
            for ended in as_completed(running):
                yield _status(ended, running[ended])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _status(ended: Future[Status], name: str) -> Status:
    try:
        return ended.result()
    except BrokenProcessPool as error:
        return Status(name, "failed", 0.0, "kernel_died", f"its process ended: {error}")


def redraw_published(reference: Path = REFERENCE, figures: Path = FIGURES) -> list[Status]:
    """Draw the published figures again from the reference rows; returns what failed.

    Nothing in the reference's folder is touched, and figures are replaced when all are drawn, as
    one.

    Raises:
        ConfigError: there are no reference rows.
    """
    recover(reference, figures)  # of a publication that was killed
    if not any((reference / "requests").glob("*.parquet")):
        raise ConfigError(
            f"expected rows of the reference run in {reference / 'requests'}, got none: to draw "
            "the figures of a run of your own, name its folder (make figures FROM=data/runs/cpu)"
        )
    with TemporaryDirectory(prefix="djinn-figures-") as name:
        scratch = Path(name).resolve()
        taken = ("requests", REPLICATES, "traces", "machine.json", *large_results.FILES)
        for part in taken:
            if (reference / part).exists():
                (scratch / part).symlink_to(reference / part)
        failed = [s for s in read_again(scratch, reference) if s.state != "ok"]
        if not failed:
            with new_figures(figures) as drawn:
                copy_figures(scratch / "figures", drawn)
                replace_folders({figures: drawn})
            print(f"figures: {figures}", flush=True)
        return failed


@contextmanager
def new_figures(figures: Path) -> Iterator[Path]:
    """A folder to take the place of `figures`; what is not drawn again is in it already."""
    figures.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{figures.name}-", dir=figures.parent) as name:
        drawn = Path(name) / figures.name
        if figures.exists():
            shutil.copytree(figures, drawn)
        else:
            drawn.mkdir()
        yield drawn


def copy_figures(source: Path, target: Path) -> list[Path]:
    """Copy PDFs and PNGs of one folder into another; returns the copies.

    Raises:
        RecordError: there are none.
    """
    found = sorted(path for path in source.glob("*") if path.suffix in (".pdf", ".png"))
    if not found:
        raise RecordError(f"expected figures in {source}, got none: draw them first")
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(path, target / path.name)) for path in found]


if __name__ == "__main__":
    sys.exit(main())
