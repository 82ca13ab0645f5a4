"""Manifests: origin of the rows of a cell, and status of its latest execution.

A cell has no other state. Its manifest alone decides whether it must run again; see
`djinn_lib.experiment.inputs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from djinn_lib.errors import RecordError
from djinn_lib.files import write_text


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
    batches: bool | None = None
    peak_device_bytes: int | None = None
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
    checked = _manifest(manifest, str(path)).model_dump()
    try:
        text = json.dumps(checked, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path}: expected plain data in the manifest, got: {error}") from error
    write_text(path, text)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        RecordError: it is missing, not JSON, or breaks the schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"expected a manifest in {path}, got {error}") from error
    return _manifest(content, str(path)).model_dump()


def note_execution(path: Path, execution: Mapping[str, Any]) -> None:
    """Store the status of the latest execution of a cell in its manifest.

    Raises:
        RecordError: the manifest is missing or broken.
        OSError: the disk is full.
    """
    write_manifest({**read_manifest(path), "execution": dict(execution)}, path)


def _manifest(content: Mapping[str, Any], where: str) -> Manifest:
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise RecordError(f"{where}: expected a manifest of the schema, got:\n{error}") from error
