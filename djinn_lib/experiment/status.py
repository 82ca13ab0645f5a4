"""Statuses of executed notebooks.

The status of a cell is in its manifest; that of any other notebook is in the metadata of its copy.
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
    """Status of an execution.

    Args:
        task: name of the executed notebook.
        state: "unavailable" if a cell's system cannot run on this machine.
        seconds: its duration, with the start of its kernel.
        error_kind: as in rows; "" if it succeeded.
        error: the error message.
        begun_with: digests of its inputs, before it started.
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
        """Whether it succeeded, so only changed inputs require another execution."""
        return self.state != "failed"


def read_status(notebook: Path) -> Status | None:
    """Return the status of a notebook; None if its copy has none or is not a notebook."""
    try:
        kept = json.loads(notebook.read_text())["metadata"][_KEY]
        return Status(**{**kept, "task": notebook.stem})  # a copy may have another name
    except (OSError, ValueError, TypeError, LookupError):
        return None


def keep_status(status: Status, notebook: Path) -> None:
    """Store the status of an execution in its executed copy.

    Raises:
        OSError: the disk is full, or there is no copy.
        ValueError: the copy is not a notebook.
    """
    content = json.loads(notebook.read_text())
    content.setdefault("metadata", {})[_KEY] = asdict(status)
    write_text(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_statuses(run_dir: Path) -> list[Status]:
    """Return the known statuses of a run, by name."""
    run = RunFolder(run_dir)
    found: Iterable[Status | None] = [
        *(read_status(path) for path in run.executed()),
        *(read_execution(cell.manifest) for cell in run.manifests()),
    ]
    return sorted((status for status in found if status), key=lambda status: status.task)


def read_execution(manifest: Path) -> Status | None:
    """Return the status of a cell's latest execution; None if its manifest has none."""
    try:
        execution: dict[str, Any] | None = read_manifest(manifest)["execution"]
        return Status(**execution) if execution else None
    except (RecordError, TypeError):
        return None
