"""Define the paths of all files in a run's folder, whether or not they exist.

run = RunFolder(Path("data/runs/cpu"))
run.machine, run.trace("paper"), run.cell("paper-25-djinn").rows, run.page
"""

from __future__ import annotations

from pathlib import Path

CELL_NOTEBOOK = "02_run_system"  # executed once for each cell, as `02_run_system.<cell>.ipynb`
_ROWS, _MANIFEST = ".parquet", ".manifest.json"


class CellFiles:
    """Paths of the files of one cell, whose id is the stem of their names."""

    def __init__(self, run: Path, id: str) -> None:
        self.run, self.id = run, id
        # The name of the executed notebook, which is also the name of its status.
        self.task = f"{CELL_NOTEBOOK}.{id}"
        self.rows = run / "requests" / f"{id}{_ROWS}"
        # Origin of the rows, and status of the cell's latest execution.
        self.manifest = run / "requests" / f"{id}{_MANIFEST}"
        # Rows while the cell runs, one on each line.
        self.journal = run / "requests" / f"{id}.journal.jsonl"
        self.notebook = run / "notebooks" / f"{self.task}.ipynb"
        # Printed output of the executed notebook; see `execution.notebook_logs`.
        self.log = self.notebook.with_suffix(".log")
        # Folder of replaced rows and journals, which no program reads.
        self.earlier = run / "requests" / "earlier"


class RunFolder:
    """Paths of a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests = path / "requests"  # rows, manifests and journals of cells
        self.traces = path / "traces"
        self.notebooks = path / "notebooks"  # executed ones, also as HTML
        self.figures = path / "figures"  # as PDF and PNG
        self.machine = path / "machine.json"  # of the set-up, with the models' files
        self.claims = path / "claims.json"  # verdicts
        self.page = path / "index.html"
        self.lock = path / ".lock"  # of the one run that may write here

    def cell(self, cell_id: str) -> CellFiles:
        """Return the files of a cell."""
        return CellFiles(self.path, cell_id)

    def trace(self, name: str) -> Path:
        """Return the file of a trace."""
        return self.traces / f"{name}.jsonl"

    def notebook(self, name: str) -> Path:
        """Return the executed copy of a notebook other than a cell's."""
        return self.notebooks / f"{name}.ipynb"
