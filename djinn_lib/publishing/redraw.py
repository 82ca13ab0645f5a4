"""Draw figures again from rows: `make figures`, `djinn figures`.

Every figure is defined by a notebook that only reads rows, so these notebooks are executed. Without
a folder they read the reference run and draw the published figures in `figures/`. With the folder
of a run they update its figures, claims, notebooks and page. Notebooks run in parallel, one on each
core. This takes about a minute and needs no GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from djinn_lib.analysis.run import REPLICATES, load_run
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment import large_results
from djinn_lib.experiment.execution.notebooks import execute, side_by_side
from djinn_lib.experiment.manifest import Status, keep_status
from djinn_lib.files import replace_folders
from djinn_lib.paths import FIGURES, REFERENCE
from djinn_lib.publishing.report import build_report

# Those that take longest come first.
READING = ("06_policies", "04_figures", "03_sensitivity", "05_claims", "explore")
FIGURE_NOTEBOOKS = {  # by the paper's names: the notebook that draws it, and the file it writes
    "cdf": ("04_figures", "latency_cdf"),
    "sensitivity": ("03_sensitivity", "sensitivity"),
}


def redraw(run_dir: Path | None = None) -> int:
    """Draw the figures of a run, or the published ones; return 1 if a notebook failed, else 0."""
    if run_dir is None:
        return 1 if redraw_published() else 0
    failed = [status for status in read_again(run_dir.resolve()) if status.state != "ok"]
    print(f"results: {build_report(run_dir)}", flush=True)
    return 1 if failed else 0


def read_again(run_dir: Path, reference_dir: Path = REFERENCE) -> list[Status]:
    """Execute every notebook that only reads rows, into a run's folder; return their statuses.

    The folder has rows, traces and machine.json. The simulator's costs are fitted to the rows of
    `reference_dir`.

    Raises:
        RecordError: the folder has no readable run.
    """
    load_run(run_dir)
    (run_dir / "figures").mkdir(exist_ok=True)
    parameters: dict[str, dict[str, Any]]
    parameters = {name: {"run_dir": str(run_dir)} for name in READING}
    parameters["06_policies"]["reference_dir"] = str(reference_dir)
    parameters["explore"] = {"figures_dir": str(run_dir / "figures")}
    if (run_dir / large_results.ROWS).exists():
        parameters[large_results.NOTEBOOK] = {
            "profile": large_results.profile_of(run_dir), "run_dir": str(run_dir), "measure": False,
        }  # fmt: skip
    print(f"{', '.join(parameters)} ...", flush=True)
    jobs = {
        name: partial(execute, name, run_dir / "notebooks" / f"{name}.ipynb", values)
        for name, values in parameters.items()
    }
    ended = []
    for status in side_by_side(jobs):
        with suppress(OSError):  # a killed process has left no copy
            keep_status(status, run_dir / "notebooks" / f"{status.task}.ipynb")
        print(status, flush=True)
        ended.append(status)
    return ended


def draw_one(figure: str, run_dir: Path | None = None, output: Path | None = None) -> Path:
    """Draw one figure from the rows of a run; return its path.

    Args:
        figure: a key of `FIGURE_NOTEBOOKS`.
        run_dir: the run's folder; default is the published run, which is not changed.
        output: file to write; default is a PDF in the run's ``figures/``, or in the working
            directory for the published run.

    Raises:
        ConfigError: the figure or the ending is unknown, or it could not be drawn.
        RecordError: the folder has no readable run.
    """
    if figure not in FIGURE_NOTEBOOKS:
        raise ConfigError(f"there is no figure {figure!r}; choose from {list(FIGURE_NOTEBOOKS)}")
    notebook, name = FIGURE_NOTEBOOKS[figure]
    ending = (output.suffix if output else ".pdf").lower()
    if ending not in (".pdf", ".png"):
        raise ConfigError(f"{output} is no .pdf or .png file; choose one of these endings")
    rows = (run_dir or REFERENCE).resolve()
    load_run(rows)
    with TemporaryDirectory(prefix="djinn-figure-") as scratch:
        _link_rows(rows, Path(scratch))
        copy = Path(scratch).resolve() / f"{notebook}.ipynb"
        status = execute(notebook, copy, {"run_dir": str(copy.parent)})
        if status.state != "ok":
            raise ConfigError(f"{figure} could not be drawn: {status.error}")
        target = output or (rows / "figures" if run_dir else Path()) / f"{name}{ending}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(copy.parent / "figures" / f"{name}{ending}", target)
    return target


def _link_rows(run_dir: Path, scratch: Path) -> None:
    """Provide the rows of a run in a scratch folder, without derived files."""
    for part in ("requests", REPLICATES, "traces", "machine.json", *large_results.FILES):
        if (run_dir / part).exists():
            (scratch / part).symlink_to(run_dir / part)


def redraw_published(reference: Path = REFERENCE, figures: Path = FIGURES) -> list[Status]:
    """Draw the published figures again from the reference rows; return the failures.

    The reference's folder is not changed. Figures are replaced together, when all are drawn.

    Raises:
        ConfigError: there are no reference rows.
    """
    if not any((reference / "requests").glob("*.parquet")):
        raise ConfigError(
            f"expected rows of the reference run in {reference / 'requests'}, got none: to draw "
            "the figures of a run of your own, name its folder (make figures FROM=data/runs/cpu)"
        )
    with TemporaryDirectory(prefix="djinn-figures-") as name:
        scratch = Path(name).resolve()
        _link_rows(reference, scratch)
        failed = [s for s in read_again(scratch, reference) if s.state != "ok"]
        if not failed:
            with new_figures(figures) as drawn:
                copy_figures(scratch / "figures", drawn)
                replace_folders({figures: drawn})
            print(f"figures: {figures}", flush=True)
        return failed


@contextmanager
def new_figures(figures: Path) -> Iterator[Path]:
    """Make a folder to replace `figures`, with copies of the figures that are not redrawn."""
    figures.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{figures.name}-", dir=figures.parent) as name:
        drawn = Path(name) / figures.name
        if figures.exists():
            shutil.copytree(figures, drawn)
        else:
            drawn.mkdir()
        yield drawn


def copy_figures(source: Path, target: Path) -> list[Path]:
    """Copy PDFs and PNGs of one folder into another; return the copies.

    Raises:
        RecordError: there are no figures.
    """
    found = sorted(path for path in source.glob("*") if path.suffix in (".pdf", ".png"))
    if not found:
        raise RecordError(f"expected figures in {source}, got none: draw them first")
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(path, target / path.name)) for path in found]
