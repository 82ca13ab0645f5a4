"""What differs where users run a notebook by hand, in Jupyter or with papermill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from IPython.display import Markdown
from tqdm import auto, std

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


def progress_bar(*args: Any, **options: Any) -> std.tqdm[Any]:
    """Return a bar of tqdm, which takes the arguments.

    It is a widget where a user watches a notebook, and text everywhere else: a run's log keeps the
    last text of a bar, but only the first state of a widget.
    """
    bar = std.tqdm if _COPIES in os.environ else auto.tqdm
    return bar(*args, **options)


def what_is_renewed(run: RunFolder, cell: Cell) -> Markdown | None:
    """Return what a cell that was run by hand has updated, and how to update the rest.

    None if a run executes the notebook, because the run updates everything.
    """
    files = run.cell(cell.id)
    if os.environ.get(_COPIES) == str(files.notebook.resolve().parent):
        return None
    path = run.path.resolve()
    folder = path.relative_to(REPO) if path.is_relative_to(REPO) else path
    return Markdown(
        f"**Run by hand.** The rows are new: `{folder}/requests/{files.rows.name}`. The figures, "
        f"the verdicts and `{folder}/index.html` are not: `make figures FROM={folder}` makes them "
        "again from the rows. The executed copy of this notebook is that of the run: the next "
        "`make reproduce` runs this cell again, and renews everything."
    )
