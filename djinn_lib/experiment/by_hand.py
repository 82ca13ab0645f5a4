"""Tell users who run a cell by hand, in Jupyter or with papermill, what that updates."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from IPython.display import Markdown

from djinn_lib.experiment.profile import Cell
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.paths import REPO

_COPIES = "DJINN_EXECUTED_COPIES"  # of a kernel that a run started: the folder of its notebooks


@contextmanager
def executing(copies: Path) -> Iterator[None]:
    """Tell kernels that start in the block the folder of their executed copies."""
    os.environ[_COPIES] = str(copies)
    try:
        yield
    finally:
        os.environ.pop(_COPIES, None)


def what_is_renewed(run: RunFolder, cell: Cell) -> Markdown | None:
    """Return what a cell that was run by hand has updated, and how to update the rest.

    Args:
        run: the run's folder.
        cell: the cell.

    Returns:
        None if a run executes the notebook, because the run updates everything.
    """
    files = run.cell(cell.id)
    if os.environ.get(_COPIES) == str(files.notebook.resolve().parent):
        return None
    folder = _from_here(run.path)
    return Markdown(
        f"**Run by hand.** The rows are new: `{folder}/requests/{files.rows.name}`. The figures, "
        f"the verdicts and `{folder}/index.html` are not: `make figures FROM={folder}` makes them "
        "again from the rows. The executed copy of this notebook is that of the run: the next "
        "`make reproduce` runs this cell again, and renews everything."
    )


def _from_here(folder: Path) -> str:
    """Return a folder relative to the repository, if it is inside, for use in a command."""
    path = folder.resolve()
    return str(path.relative_to(REPO) if path.is_relative_to(REPO) else path)
