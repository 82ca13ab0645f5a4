"""Decide which rows of a cell are kept after an execution, so failures lose no measurements.

A complete measurement replaces the rows on disk. An execution that died replaces them only if it
served more requests, or if they are for other inputs. Replaced rows that served more requests are
kept in another folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.errors import RecordError
from djinn_lib.experiment.manifest import read_manifest, write_manifest
from djinn_lib.experiment.run_folder import CellFiles
from djinn_lib.rows import COLUMNS, failed_row, no_rows, read_rows, rows_frame, write_rows

DIED = "the process of this cell died: "  # begins a note of rows that failures complete
_KEYS = (*COLUMNS[: COLUMNS.index("queue_ms")], "note")  # say which request a row is about


def keep(files: CellFiles, rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Store the rows and the manifest of an execution, unless the existing ones are kept.

    There is a row for every request of the cell. A note that begins with `DIED` says that the
    execution died.

    Returns:
        The rows that are now on disk.

    Raises:
        RecordError: rows or manifest break their schema.
        OSError: the disk is full; the existing files are unchanged.
    """
    earlier, its_manifest = _on_disk(files)
    more = int(earlier["ok"].sum()) - int(rows["ok"].sum())
    if (
        _died(manifest)
        and its_manifest
        and _questions(its_manifest) == _questions(manifest)
        and (more > 0 or (more == 0 and not _died(its_manifest)))
    ):
        return earlier
    if more > 0:
        _keep_beside(files, str(earlier["run_id"].iloc[0]))
    write_rows(rows, files.rows)
    write_manifest(manifest, files.manifest)
    return rows


def whole_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as `rows_frame` does, with a failed row for each that breaks the schema.

    So a bug of a system that breaks one row does not lose the others. The error of the failed row
    has its content.
    """
    return rows_frame(_mended(list(rows)))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal that fit the schema, in its order.

    Incomplete lines, and lines without the keys of a request, are left out.
    """
    rows: list[Mapping[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError):
            rows.append({**json.loads(line)})
    return _mended(rows)


def set_aside(files: CellFiles) -> None:
    """Move the journal of an interrupted execution to a folder that only people read.

    Raises:
        OSError: it cannot be moved.
    """
    if files.journal.exists():
        files.earlier.mkdir(exist_ok=True)
        os.replace(files.journal, files.earlier / files.journal.name)


def _on_disk(files: CellFiles) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the readable existing rows and their manifest; without it their inputs are unknown."""
    rows = no_rows()
    with suppress(RecordError):
        rows = read_rows(files.rows)
        manifest = read_manifest(files.manifest)
        if manifest["run_id"] in set(rows["run_id"]):
            return rows, manifest
    return rows, {}


def _died(manifest: Mapping[str, Any]) -> bool:
    return any(note.startswith(DIED) for note in manifest["notes"])


def _questions(manifest: Mapping[str, Any]) -> str:
    """Return what an execution had to measure, and with which weights, regardless of the code."""
    weights = {
        name: [facts.get(key) for key in ("bytes", "dtype", "sha256")]
        for name, facts in manifest["models"].items()
    }
    asked = [manifest[key] for key in ("cell", "system", "options", "trace_sha256", "parameters")]
    return json.dumps([asked, weights], sort_keys=True, default=str)


def _keep_beside(files: CellFiles, run_id: str) -> None:
    """Copy rows and manifest to another name, before others replace them."""
    files.earlier.mkdir(exist_ok=True)
    for source in (files.rows, files.manifest):
        if source.exists():
            shutil.copy(source, files.earlier / source.name.replace(files.id, run_id, 1))


def _mended(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with a failed one for each that breaks the schema.

    A row without the keys of a request is left out.
    """
    try:
        return rows_frame(rows).to_dict("records") if rows else []
    except (RecordError, TypeError) as error:
        if len(rows) > 1:
            return [mended for row in rows for mended in _mended([row])]
        return _failed_instead(rows[0], error)


def _failed_instead(row: Mapping[str, Any], error: Exception) -> list[dict[str, Any]]:
    said = json.dumps({key: row[key] for key in row if key not in _KEYS}, default=str)
    why = f"the system gave a row that breaks the schema ({error}); the row: {said}"
    with suppress(RecordError, TypeError, KeyError):
        failed = failed_row(**{key: row[key] for key in _KEYS}, error_kind="other", error=why)
        return rows_frame([failed]).to_dict("records")
    return []
