"""How executions of notebooks ended. Each is kept with what it left, and nowhere else.

That of a cell is in its manifest; that of any other notebook in the metadata of its executed copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from djinn_lib.errors import RecordError
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.files import write_text

State = Literal["ok", "failed", "unavailable"]
_KEY = "djinn"  # of a notebook's metadata


@dataclass(frozen=True)
class Status:
    """How an execution ended.

    Args:
        task: name of the executed notebook.
        state: "unavailable" where a cell's system cannot run on this machine.
        seconds: that it took, with the start of its kernel.
        error_kind: as in rows; "" when it is ok.
        error: what happened, in words.
        begun_with: digests of all that it was made from, before it began.
        left: files that it wrote, by their path in the run's folder.
    """

    task: str
    state: State
    seconds: float
    error_kind: str = ""
    error: str = ""
    begun_with: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cause = f" ({self.error_kind}: {self.error})" if self.error else ""
        return f"{self.task}: {self.state} in {self.seconds:.1f} s{cause}"

    @property
    def settled(self) -> bool:
        """Whether it need not be run again for its own sake."""
        return self.state != "failed"


def read_status(notebook: Path) -> Status | None:
    """Return how a notebook's execution ended; None where its copy does not say, or is none."""
    try:
        kept = json.loads(notebook.read_text())["metadata"][_KEY]
        return Status(**{**kept, "task": notebook.stem})  # a copy may have another name
    except (OSError, ValueError, TypeError, LookupError):
        return None


def keep_status(status: Status, notebook: Path) -> None:
    """Write into an executed copy how its execution ended.

    Raises:
        OSError: the disk is full, or the copy is not there.
        ValueError: the copy is no notebook.
    """
    content = json.loads(notebook.read_text())
    content.setdefault("metadata", {})[_KEY] = asdict(status)
    write_text(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_statuses(run_dir: Path) -> list[Status]:
    """Return how the executions of a run ended, by name, of those that say so."""
    run = RunFolder(run_dir)
    found: Iterable[Status | None] = [
        *(read_status(path) for path in run.executed()),
        *(read_execution(cell.manifest) for cell in run.manifests()),
    ]
    return sorted((status for status in found if status), key=lambda status: status.task)


def read_execution(manifest: Path) -> Status | None:
    """Return how the latest execution of a cell ended; None where its manifest does not say."""
    try:
        execution: dict[str, Any] | None = read_manifest(manifest)["execution"]
        return Status(**execution) if execution else None
    except (RecordError, TypeError):
        return None
