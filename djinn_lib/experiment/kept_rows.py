"""What becomes of a cell's rows when an execution of it ends: nothing measured is lost to failures.

A measurement that came to its end replaces what was there. An execution that died does not: rows on
disk that answer the same questions stay, unless it had served more requests itself. Rows that
served more than those that take their place are kept in a folder beside them.
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
from djinn_lib.rows import COLUMNS, failed_row, read_rows, rows_frame, write_rows

DIED = "the process of this cell died: "  # begins a note of rows that failures complete
_KEYS = (*COLUMNS[: COLUMNS.index("queue_ms")], "note")  # say which request a row is about
_SAME_REQUESTS = ["mode", "capacity_bytes", "trace", "repeat", "request", "model"]


def keep(files: CellFiles, rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Put the rows and the manifest of an execution in their place, unless those there stay.

    Args:
        files: of the cell.
        rows: of the execution, one for every request of the cell.
        manifest: of the execution; a note that begins with `DIED` says that it did.

    Returns:
        The rows that are there now.

    Raises:
        RecordError: rows or manifest break their schema.
        OSError: the disk is full; what was there is still there.
    """
    earlier = _on_disk(files)
    if earlier is not None:
        of_earlier, its_manifest = earlier
        if _died(manifest) and _outweighs(of_earlier, its_manifest, rows, manifest):
            return of_earlier
        if _n_served(of_earlier) > _n_served(rows):
            _keep_beside(files, str(of_earlier["run_id"].iloc[0]))
    write_rows(rows, files.rows)
    write_manifest(manifest, files.manifest)
    return rows


def whole_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as `rows_frame` does, with a failed row for each that breaks the schema.

    So a mistake in one row, which is one of its system, costs no other. What the row said is in its
    error.
    """
    return rows_frame(_mended(list(rows)))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal, in its order, each of which fits the schema.

    A line that was cut short, or that does not say which request it is about, is left out.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return _mended([row for line in lines if (row := _parsed(line))])


def set_aside(files: CellFiles) -> None:
    """Move the journal of an execution that was interrupted to where only people read it.

    Raises:
        OSError: it cannot be moved.
    """
    if files.journal.exists():
        files.earlier.mkdir(exist_ok=True)
        os.replace(files.journal, files.earlier / files.journal.name)


def _on_disk(files: CellFiles) -> tuple[pd.DataFrame, dict[str, Any] | None] | None:
    """The rows that are there and can be read, and their manifest if it is theirs."""
    try:
        rows = read_rows(files.rows)
    except RecordError:
        return None
    with suppress(RecordError):
        manifest = read_manifest(files.manifest)
        if manifest["run_id"] in set(rows["run_id"]):
            return rows, manifest
    return rows, None


def _outweighs(
    earlier: pd.DataFrame,
    its_manifest: Mapping[str, Any] | None,
    rows: pd.DataFrame,
    manifest: Mapping[str, Any],
) -> bool:
    """Whether earlier rows answer what those of an execution that died were to answer, and more.

    Rows without a manifest tell nothing of what they answer.
    """
    if its_manifest is None or _questions(its_manifest) != _questions(manifest):
        return False
    if _requests(earlier) != _requests(rows):
        return False
    more = _n_served(earlier) - _n_served(rows)
    return more > 0 or (more == 0 and not _died(its_manifest))


def _died(manifest: Mapping[str, Any]) -> bool:
    return any(note.startswith(DIED) for note in manifest["notes"])


def _n_served(rows: pd.DataFrame) -> int:
    return int(rows["ok"].sum())


def _requests(rows: pd.DataFrame) -> set[tuple[Any, ...]]:
    return set(rows[_SAME_REQUESTS].itertuples(index=False, name=None))


def _questions(manifest: Mapping[str, Any]) -> str:
    """What an execution was asked to measure, and with which weights; not by which code."""
    weights = {
        name: [facts.get(key) for key in ("bytes", "dtype", "sha256")]
        for name, facts in manifest["models"].items()
    }
    asked = [manifest[key] for key in ("cell", "system", "options", "trace_sha256", "parameters")]
    return json.dumps([asked, weights], sort_keys=True, default=str)


def _keep_beside(files: CellFiles, run_id: str) -> None:
    """Keep rows and manifest under another name as well, before others take their place."""
    files.earlier.mkdir(exist_ok=True)
    for source in (files.rows, files.manifest):
        target = files.earlier / source.name.replace(files.id, run_id, 1)
        target.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            try:
                os.link(source, target)
            except OSError:  # a file system without links
                shutil.copy(source, target)


def _mended(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that the schema takes, and failed ones in the place of those that it refuses.

    A row that does not say which request it is about is left out.
    """
    try:
        return rows_frame(rows).to_dict("records") if rows else []
    except (RecordError, TypeError) as error:
        if len(rows) == 1:
            return _failed_instead(rows[0], error)
        half = len(rows) // 2  # few rows are wrong, and looking at each by itself takes long
        return [*_mended(rows[:half]), *_mended(rows[half:])]


def _failed_instead(row: Mapping[str, Any], error: Exception) -> list[dict[str, Any]]:
    said = json.dumps({key: row[key] for key in row if key not in _KEYS}, default=str)
    why = f"the system gave a row that breaks the schema ({error}); the row: {said}"
    with suppress(RecordError, TypeError, KeyError):
        failed = failed_row(**{key: row[key] for key in _KEYS}, error_kind="other", error=why)
        return rows_frame([failed]).to_dict("records")
    return []


def _parsed(line: str) -> dict[str, Any] | None:
    """The row of a journal's line; None for one that was cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
