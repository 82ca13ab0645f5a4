"""What becomes of a cell's rows when an execution of it ends: nothing measured is lost to failures.

A measurement that came to its end replaces what was there. An execution that died does not: rows on
disk that answer the same questions stay, unless it had served more requests itself. The manifest
then says that something failed after they were measured. Rows that served more than those that take
their place are kept in a folder beside them, which nothing reads but people.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.errors import RecordError
from djinn_lib.rows import (
    COLUMNS,
    failed_row,
    read_manifest,
    read_rows,
    rows_frame,
    write_manifest,
)

DIED = "the process of this cell died: "  # begins a note of rows that failures complete
FAILED_LATER = "after these rows were measured an execution failed: "
EARLIER = "earlier"  # folder, beside the rows
_KEYS = (*COLUMNS[: COLUMNS.index("queue_ms")], "note")  # say which request a row is about
_SAME_REQUESTS = ["mode", "capacity_bytes", "trace", "repeat", "request", "model"]


def rows_that_stay(
    path: Path, rows: pd.DataFrame, manifest: Mapping[str, Any]
) -> pd.DataFrame | None:
    """Return the rows on disk if they stay; None if those of an execution are to be written there.

    If they stay, their manifest says what failed; if they go though more requests were served among
    them, they are kept beside the others.

    Args:
        path: of the cell's rows. The manifest lies beside them.
        rows: of the execution, one for every request of the cell.
        manifest: of the execution; a note that begins with `DIED` says that it did.

    Raises:
        OSError: the disk is full; what was there is still there.
    """
    earlier = _OnDisk.read(path)
    if earlier is None:
        return None
    if _died(manifest) and earlier.outweighs(rows, manifest):
        earlier.note_failure(manifest, path)
        return earlier.rows
    if _n_served(earlier.rows) > _n_served(rows):
        _keep_beside(path, str(earlier.rows["run_id"].iloc[0]))
    return None


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


def set_aside(path: Path) -> None:
    """Move a file of rows to the folder beside it whose files nothing but people read."""
    if path.exists():
        (path.parent / EARLIER).mkdir(exist_ok=True)
        os.replace(path, path.parent / EARLIER / path.name)


@dataclass(frozen=True)
class _OnDisk:
    """Rows of a cell that are there already; `manifest` is None where none belongs to them."""

    rows: pd.DataFrame
    manifest: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> _OnDisk | None:
        """Read them; None where there are none that can be read."""
        try:
            rows = read_rows(path)
        except RecordError:
            return None
        with suppress(RecordError):
            manifest = read_manifest(_manifest_path(path))
            if manifest["run_id"] in set(rows["run_id"]):
                return cls(rows, manifest)
        return cls(rows, None)

    def outweighs(self, rows: pd.DataFrame, manifest: Mapping[str, Any]) -> bool:
        """Whether these answer what the rows of an execution that died were to answer, and more."""
        if self.manifest and _questions(self.manifest) != _questions(manifest):
            return False
        if _requests(self.rows) != _requests(rows):
            return False
        n_served, n_others = _n_served(self.rows), _n_served(rows)
        finished = self.manifest is None or not _died(self.manifest)
        return n_served > n_others or (finished and n_served == n_others)

    def note_failure(self, manifest: Mapping[str, Any], path: Path) -> None:
        """Say in the manifest of these rows that an execution failed after they were measured."""
        cause = next(n.removeprefix(DIED) for n in manifest["notes"] if n.startswith(DIED))
        if self.manifest is None:  # the process died between writing the rows and their manifest
            notes = [note for note in manifest["notes"] if not note.startswith(DIED)]
            own = {**manifest, "run_id": str(self.rows["run_id"].iloc[0])}
            write_manifest({**own, "notes": [*notes, FAILED_LATER + cause]}, _manifest_path(path))
            return
        notes = [note for note in self.manifest["notes"] if not note.startswith(FAILED_LATER)]
        with suppress(OSError):  # a full disk: the status says it too
            content = {**self.manifest, "notes": [*notes, FAILED_LATER + cause]}
            write_manifest(content, _manifest_path(path))


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".manifest.json")


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


def _keep_beside(path: Path, run_id: str) -> None:
    """Keep rows and manifest under another name as well, before others take their place."""
    folder = path.parent / EARLIER
    folder.mkdir(exist_ok=True)
    for source in (path, _manifest_path(path)):
        target = folder / source.name.replace(path.stem, run_id, 1)
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
