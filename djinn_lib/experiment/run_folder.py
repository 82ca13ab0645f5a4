"""Define the paths of all files in a run's folder.

run = RunFolder(Path("data/runs/cpu"))
run.machine, run.trace("paper"), run.cell("paper-25-djinn").rows, run.page
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CELL_NOTEBOOK = "02_run_system"  # executed once for each cell, as `02_run_system.<cell>.ipynb`
_ROWS, _MANIFEST = ".parquet", ".manifest.json"


@dataclass(frozen=True)
class CellFiles:
    """Paths of the files of one cell, whether or not they exist."""

    run: Path
    id: str

    @property
    def task(self) -> str:
        """Name of the cell's executed notebook, which is also the name of its status."""
        return f"{CELL_NOTEBOOK}.{self.id}"

    @property
    def rows(self) -> Path:
        """The rows, one for each request."""
        return self.run / "requests" / f"{self.id}{_ROWS}"

    @property
    def manifest(self) -> Path:
        """Origin of the rows, and status of the cell's latest execution."""
        return self.run / "requests" / f"{self.id}{_MANIFEST}"

    @property
    def journal(self) -> Path:
        """Rows while the cell runs, one on each line."""
        return self.run / "requests" / f"{self.id}.journal.jsonl"

    @property
    def notebook(self) -> Path:
        """The executed notebook."""
        return self.run / "notebooks" / f"{self.task}.ipynb"

    @property
    def log(self) -> Path:
        """Output of the executed notebook; see `djinn_lib.experiment.notebook_logs`."""
        return self.notebook.with_suffix(".log")

    @property
    def earlier(self) -> Path:
        """Folder of replaced rows and journals, which no program reads."""
        return self.run / "requests" / "earlier"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, whether or not they exist."""

    path: Path

    def cell(self, cell_id: str) -> CellFiles:
        """Return the files of a cell."""
        return CellFiles(self.path, cell_id)

    def cells(self) -> list[CellFiles]:
        """Return the cells that have rows, by name."""
        return [self.cell(path.stem) for path in sorted(self.requests.glob(f"*{_ROWS}"))]

    def manifests(self) -> list[CellFiles]:
        """Return the cells that have a manifest, by name."""
        paths = sorted(self.requests.glob(f"*{_MANIFEST}"))
        return [self.cell(path.name.removesuffix(_MANIFEST)) for path in paths]

    def trace(self, name: str) -> Path:
        """Return the file of a trace."""
        return self.traces / f"{name}.jsonl"

    def notebook(self, name: str) -> Path:
        """Return the executed copy of a notebook other than a cell's."""
        return self.notebooks / f"{name}.ipynb"

    def executed(self) -> list[Path]:
        """Return the executed notebooks other than the cells', by name."""
        paths = sorted(self.notebooks.glob("*.ipynb"))
        return [p for p in paths if not p.name.startswith(f"{CELL_NOTEBOOK}.")]

    @property
    def requests(self) -> Path:
        """Folder of the cells' rows, manifests and journals."""
        return self.path / "requests"

    @property
    def traces(self) -> Path:
        """Folder of the traces."""
        return self.path / "traces"

    @property
    def notebooks(self) -> Path:
        """Folder of the executed notebooks, also as HTML."""
        return self.path / "notebooks"

    @property
    def figures(self) -> Path:
        """Folder of the figures, as PDF and PNG."""
        return self.path / "figures"

    @property
    def replicates(self) -> Path:
        """Folder of further measurements of cells."""
        return self.path / "replicates"

    @property
    def machine(self) -> Path:
        """Facts of the machine and of the models' files, from the set-up."""
        return self.path / "machine.json"

    @property
    def claims(self) -> Path:
        """Verdicts on all claims."""
        return self.path / "claims.json"

    @property
    def comparison(self) -> Path:
        """Comparison of the systems, in the form of the paper's summary."""
        return self.path / "comparison_summary.json"

    @property
    def page(self) -> Path:
        """The page that shows the whole run."""
        return self.path / "index.html"

    @property
    def lock(self) -> Path:
        """Lock file of the one run that may write here."""
        return self.path / ".lock"
