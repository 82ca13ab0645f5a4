"""Read the cells of a part of a larger run, and check whether parts match."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from djinn_lib.analysis.run import REPLICATES, read_machine
from djinn_lib.errors import RecordError
from djinn_lib.experiment import large_results
from djinn_lib.experiment.execution.notebook_logs import copy_with_log
from djinn_lib.experiment.manifest import read_manifest, write_manifest
from djinn_lib.metrics import attempted
from djinn_lib.rows import read_rows
from djinn_lib.validation import place_in_words

_RAN_IN = "ran in the part "
# Parameters that differ between cells.
_OF_A_CELL = ("repeats", "requests", "page_bytes", "mode", "speed", "start")
_SHOWN_ENTRIES, _SHOWN_CHARACTERS = 3, 80  # of a difference, and of each of its values
_ABSENT = "absent"
_OF_OTHER_CELLS = ("traces", "capacities")  # lists of what all cells use; compared by name


@dataclass(frozen=True)
class PartCell:
    """One measurement of a cell in a part, with the paths of its rows and notebook."""

    part: str
    rows_path: Path
    notebook_path: Path
    manifest: dict[str, Any]
    n_rows: int
    n_failed: int

    @property
    def name(self) -> str:
        """The cell's id."""
        return self.manifest["cell"]

    @property
    def rank(self) -> tuple[bool, bool, bool, str]:
        """Sort key, the best last: available, without failures, alone on its host, later."""
        alone = not self.manifest["busy_neighbours"]
        return self.n_rows > 0, self.n_failed == 0, alone, self.manifest["started_at_utc"]

    @property
    def notes(self) -> list[str]:
        """Its notes, including the name of its part."""
        notes = list(self.manifest["notes"])
        if not any(note.startswith(_RAN_IN) for note in notes):  # a merged part has one
            notes.append(f"{_RAN_IN}{self.part}")
        return notes

    def write(self, rows_path: Path, notebook_path: Path, notes: Sequence[str]) -> None:
        """Copy rows, manifest and notebook to another run."""
        shutil.copy(self.rows_path, rows_path)
        manifest = {**self.manifest, "notes": [*notes]}
        write_manifest(manifest, _manifest_of(rows_path))
        if self.notebook_path.exists():
            copy_with_log(self.notebook_path, notebook_path)

    def __str__(self) -> str:
        failed = f", {self.n_failed} of {self.n_rows} requests failed" if self.n_failed else ""
        return f"{self.part} ({self.manifest['started_at_utc'][:16]}{failed})"


def read_part(folder: Path, label: str) -> list[PartCell]:
    """Read every cell of a run folder, replicates included.

    A part may have only rows of models larger than the ring.

    Raises:
        RecordError: it has no rows, or rows, a manifest or machine.json are missing or broken.
    """
    read_machine(folder)
    notebooks = folder / "notebooks"
    found = {path: notebooks / f"02_run_system.{path.stem}.ipynb"
             for path in sorted((folder / "requests").glob("*.parquet"))}  # fmt: skip
    found |= {p: p.with_suffix(".ipynb") for p in sorted((folder / REPLICATES).glob("*.parquet"))}
    if not found and not (folder / large_results.ROWS).exists():
        raise RecordError(
            f"expected rows in {folder / 'requests'}, got none: a part is a run folder with at "
            f"least one cell, or with {large_results.ROWS}"
        )
    cells = []
    for path, notebook in found.items():
        rows = attempted(read_rows(path))
        manifest, n_failed = read_manifest(_manifest_of(path)), int((~rows["ok"]).sum())
        cells.append(PartCell(label, path, notebook, manifest, len(rows), n_failed))
    return cells


def _manifest_of(rows_path: Path) -> Path:
    return rows_path.with_suffix(".manifest.json")


def differences(cells: Sequence[PartCell], allow_commits: bool = False) -> list[str]:
    """Return a line for each difference that prevents merging, once for each part and value.

    A package that is missing in one place was not used there, so it is no difference.
    """
    lines: dict[tuple[str, str, str], str] = {}
    first: dict[str, tuple[PartCell, Any]] = {}
    for cell in cells:
        for what, value in _must_agree(cell.manifest, allow_commits):
            where, known = first.setdefault(what, (cell, value))
            if value != known:
                line = _in_words(what, known, value, str(where), str(cell))
                lines.setdefault((what, repr(value), cell.part), line)
    return list(lines.values())


def _in_words(what: str, known: object, value: object, where: str, cell: str) -> str:
    """Describe how two values differ: of mappings and lists, only the entries that differ."""
    found = list(_unequal((), known, value))
    lines = [
        f"{', '.join(filter(None, (what, place_in_words(keys))))}: {_short(a)} in {where}, "
        f"{_short(b)} in {cell}"
        for keys, a, b in found[:_SHOWN_ENTRIES]
    ]
    if more := len(found) - len(lines):
        lines.append(f"{what}: {more} more differ")
    return "\n  ".join(lines)


def _unequal(keys: tuple[Any, ...], a: Any, b: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Yield the entries of two values that differ, each with the keys that lead to it."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            yield from _unequal((*keys, key), a.get(key, _ABSENT), b.get(key, _ABSENT))
    elif isinstance(a, list) and isinstance(b, list):
        for i, (one, other) in enumerate(zip_longest(a, b, fillvalue=_ABSENT)):
            yield from _unequal((*keys, i), one, other)
    elif a != b:
        yield keys, a, b


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _must_agree(manifest: Mapping[str, Any], allow_commits: bool) -> Iterator[tuple[str, Any]]:
    """Yield values that must be equal, each with a name that says among which cells.

    Package versions are compared for each system, options and device bytes for each label of the
    profile's systems, and a trace or a capacity among cells that use it. So a profile may get more
    of them between two parts.
    """
    machine = manifest["machine"]
    trace, capacity, label, *_ = manifest["cell"].split("-")
    yield "profile", manifest["profile"]
    for name, value in manifest["parameters"].items():
        if name not in (*_OF_A_CELL, *_OF_OTHER_CELLS):
            yield f"parameter {name}", value
    if (capacities := manifest["parameters"].get("capacities")) is not None:
        yield f"capacity {capacity}", capacities.get(capacity)
    for model, facts in manifest["models"].items():
        for name, value in facts.items():
            among = f", {label}" if name == "device_bytes" else ""
            yield f"{name} of the weights of {model}{among}", value
    yield "device", machine.get("device")
    yield "device_name", machine.get("device_name")
    for package, version in machine["versions"].items():
        yield f"version of {package}, set-up", version
    for package, version in manifest["versions"].items():
        yield f"version of {package}, {manifest['system']}", version
    yield f"options of {label}", manifest["options"]
    yield f"sha256 of the trace {trace}", manifest["trace_sha256"]
    if not allow_commits:
        yield "commit", manifest["git_commit"]
        yield "uncommitted changes", manifest["git_dirty"]
