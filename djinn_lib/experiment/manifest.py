"""Manifests of cells, with the origin of their rows, and statuses of executed notebooks.

The status of a cell is in its manifest, which alone decides whether it must run again; see
`djinn_lib.experiment.cells.inputs`. That of any other notebook is in the metadata of its copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from djinn_lib.errors import RecordError
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.files import write_text

State = Literal["ok", "failed", "unavailable"]
_KEY = "djinn"  # of a notebook's metadata


class Manifest(BaseModel):
    """Origin of the rows of a cell."""

    model_config = ConfigDict(extra="forbid")

    run_id: str
    cell: str
    system: str
    options: dict[str, Any]
    profile: str
    git_commit: str
    git_dirty: bool
    other_gpu_processes: list[str]
    versions: dict[str, str]
    machine: dict[str, Any]
    trace_sha256: str
    models: dict[str, dict[str, Any]]
    parameters: dict[str, Any]
    started_at_utc: str
    wall_s: float
    setup_s: float
    # Of the host, and not in older manifests: the share of its processors' time that others had,
    # and its pace before each request, a list a repeat.
    stolen_share: float | None = None
    host_loop_us: list[list[float]] = []
    notes: list[str]
    # Not in older manifests either: the GPU's UUID, whether the system was free to batch requests
    # that wait, and the most device memory that was in use, less what was before the system started
    # (contexts, graphs and caches are in it, which no capacity limits).
    gpu_uuid: str | None = None
    # The host's other GPUs that were in use when the cell began or ended.
    busy_neighbours: list[str] = []
    batches: bool | None = None
    peak_device_bytes: int | None = None
    # The same without the start of the system, which can take more than serving does.
    serving_device_bytes: int | None = None
    # How each model decoded, where Djinn's decoders did: `mode`, and `logits_distance`, how far its
    # logits were from transformers' when it was made (a share of their norm).
    decoding: dict[str, dict[str, Any]] | None = None
    # The cell that the system was started for, if it went on running after an earlier one.
    running_since: str | None = None
    # How the latest execution ended (a `Status`), which may be a later one than that of the rows.
    # None while it goes on, where the cell was run by hand, and in older manifests.
    execution: dict[str, Any] | None = None


def write_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Write a checked manifest as JSON; the file appears whole or not at all.

    Raises:
        RecordError: a field is missing, unknown, of the wrong type, or not valid in JSON.
        OSError: the disk is full or the folder cannot be written to.
    """
    try:
        checked = Manifest.model_validate(manifest).model_dump()
        text = json.dumps(checked, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:  # a ValidationError is a ValueError
        raise RecordError(f"{path}: expected a manifest of plain data, got: {error}") from error
    write_text(path, text)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        RecordError: it is missing, not JSON, or breaks the schema.
    """
    try:
        return Manifest.model_validate_json(path.read_bytes()).model_dump()
    except (OSError, ValueError) as error:
        raise RecordError(f"expected a manifest in {path}, got {error}") from error


def note_execution(path: Path, execution: Mapping[str, Any]) -> None:
    """Store the status of the latest execution of a cell in its manifest.

    Raises:
        RecordError: the manifest is missing or broken.
        OSError: the disk is full.
    """
    write_manifest({**read_manifest(path), "execution": dict(execution)}, path)


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
        *(read_status(path) for path in run.notebooks.glob("*.ipynb")),
        *(read_execution(path) for path in run.requests.glob("*.manifest.json")),
    ]
    return sorted((status for status in found if status), key=lambda status: status.task)


def read_execution(manifest: Path) -> Status | None:
    """Return the status of a cell's latest execution; None if its manifest has none."""
    try:
        execution: dict[str, Any] | None = read_manifest(manifest)["execution"]
        return Status(**execution) if execution else None
    except (RecordError, TypeError):
        return None
