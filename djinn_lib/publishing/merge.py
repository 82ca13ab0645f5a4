"""Cells of several run folders put into one.

    python -m djinn_lib.publishing.merge RUN_DIR PART...

A run may be done in parts, on machines of one kind that are lent one after another. Parts belong
together when their cells had the same profile and parameters, traces, weights, packages, driver,
GPU and commit; anything else is refused, and said. `--allow-commits` takes different commits, and
the notes of each cell then tell its own. What differs from machine to machine, what was measured,
is kept: `machine.json` lists all machines with their cells, and each manifest has those of its own.
A cell that several parts have is in the run once, and its other measurements are kept beside it, as
replicates.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from djinn_lib.analysis import replicates
from djinn_lib.analysis.run import read_machine
from djinn_lib.errors import ConfigError, DjinnError, RecordError
from djinn_lib.experiment import large_results
from djinn_lib.experiment.locks import run_locks
from djinn_lib.experiment.profile import Profile, load_profile
from djinn_lib.files import write_json
from djinn_lib.metrics import attempted
from djinn_lib.paths import user_path
from djinn_lib.publishing.belonging import differences
from djinn_lib.replacing import recover, replace_folders
from djinn_lib.rows import read_manifest, read_rows, write_manifest

_PER_PART = ("00_setup", "01_trace")  # notebooks that every part has, about its own machine
_RAN_IN = "ran in the part "


def main(arguments: list[str] | None = None) -> int:
    """Merge; returns the exit status: 0 when all cells are there, 1 when some miss, 2: refused."""
    parser = argparse.ArgumentParser(prog="djinn_lib.publishing.merge", description=__doc__)
    parser.add_argument("run_dir", type=user_path, help="the folder to make")
    parser.add_argument("parts", type=user_path, nargs="+", help="run folders, in any order")
    parser.add_argument(
        "--allow-commits", action="store_true", help="parts may come from different commits"
    )
    parser.add_argument("--replace", action="store_true", help="replace RUN_DIR, if it is there")
    options = parser.parse_args(arguments)
    try:
        cells = merge(options.run_dir, options.parts, options.allow_commits, options.replace)
        missing = missing_cells(load_profile(cells[0].manifest["profile"]), options.run_dir)
    except (DjinnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(cells)} cells of {len(options.parts)} parts in {options.run_dir}", flush=True)
    if missing:
        print("still to be run: " + " ".join(f"cell:{name}" for name in missing))
    return 1 if missing else 0


@dataclass(frozen=True)
class PartCell:
    """A cell in one part, with what is needed to choose among several of the same name.

    `rows_path` and `notebook_path` are where its rows and its executed notebook are.
    """

    part: str
    folder: Path
    name: str
    rows_path: Path
    notebook_path: Path
    manifest: dict[str, Any]
    n_rows: int
    n_failed: int

    @property
    def measurement(self) -> tuple[str, str]:
        """What two cells share that are the same one, wherever they are kept."""
        return self.manifest["run_id"], self.manifest["started_at_utc"]

    @property
    def rank(self) -> tuple[bool, bool, str]:
        """What could run before what could not, whole ones before others, later before earlier."""
        return self.n_rows > 0, self.n_failed == 0, self.manifest["started_at_utc"]

    def __str__(self) -> str:
        failed = f", {self.n_failed} of {self.n_rows} requests failed" if self.n_failed else ""
        return f"{self.part} ({self.manifest['started_at_utc'][:16]}{failed})"


def merge(
    run_dir: Path, parts: Sequence[Path], allow_commits: bool = False, replace: bool = False
) -> list[PartCell]:
    """Make a run folder out of the cells of several; returns the cells that are in it.

    Of a cell that several parts have, the later one is taken, whole ones before those with failed
    requests. The others are printed, and kept as replicates if every request was served; else the
    manifest of the one taken notes them.

    A folder that is replaced is whole, the old one or the new one, whatever ends this on its way.

    Raises:
        ConfigError: the folder is there already, or is itself one of the parts, or a run uses it.
        RecordError: the parts do not belong together, or one of them cannot be read.
        OSError: the disk is full, or refuses; the folder is as it was.
    """
    run_dir, parts = run_dir.resolve(), [part.resolve() for part in parts]
    if run_dir in parts or len(set(parts)) < len(parts):
        raise ConfigError(
            f"expected the folder to make and parts that all differ, got {run_dir} and "
            f"{', '.join(map(str, parts))}: name each part once, and another folder for the result"
        )
    recover(run_dir)
    if run_dir.exists() and any(run_dir.iterdir()) and not replace:
        raise ConfigError(
            f"expected {run_dir} to be absent or empty, got a folder with files: name another, or "
            "replace it with --replace"
        )
    found = _found(parts, allow_commits)
    chosen, others = _choose(found)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    # A run that goes on in the folder would lose what it writes from now on.
    unused = run_locks(run_dir, "cpu") if (run_dir / ".lock").exists() else nullcontext()
    with unused, TemporaryDirectory(prefix=f".{run_dir.name}-", dir=run_dir.parent) as scratch:
        made = Path(scratch) / "run"
        _write(made, chosen, found)
        for cell in others:
            rows, manifest = read_rows(cell.rows_path), {**cell.manifest, "notes": _notes(cell)}
            replicates.write_replicate(rows, manifest, made, cell.notebook_path)
        _copy_large(parts, made)
        replace_folders({run_dir: made})
    return chosen


def _found(parts: Sequence[Path], allow_commits: bool) -> list[PartCell]:
    """All cells of the parts, at least one, which belong together."""
    found = [cell for label, part in _labels(parts).items() for cell in read_part(part, label)]
    if problems := differences([(str(c), c.name, c.manifest) for c in found], allow_commits):
        raise RecordError(
            "expected parts that belong together, got:\n  " + "\n  ".join(problems)
            + "\nrun the cells again that differ, or leave their part out"
        )  # fmt: skip
    if not found:
        raise RecordError("expected parts with at least one cell among them, got none: add one")
    return found


def read_part(folder: Path, label: str) -> list[PartCell]:
    """Read every cell of a run folder, replicates included.

    It may have none beside models larger than the ring.

    Raises:
        RecordError: it has neither, or rows, a manifest or machine.json are missing or broken.
    """
    read_machine(folder)
    cells = [
        _part_cell(label, folder, path, notebook)
        for path, notebook in [
            *((path, folder / "notebooks" / f"02_run_system.{path.stem}.ipynb")
              for path in sorted((folder / "requests").glob("*.parquet"))),
            *((path, path.with_suffix(".ipynb"))
              for path in sorted((folder / replicates.FOLDER).glob("*.parquet"))),
        ]
    ]  # fmt: skip
    if not cells and not (folder / large_results.ROWS).exists():
        raise RecordError(
            f"expected rows in {folder / 'requests'}, got none: a part is a run folder with at "
            f"least one cell, or with {large_results.ROWS}"
        )
    return cells


def _part_cell(label: str, folder: Path, rows_path: Path, notebook_path: Path) -> PartCell:
    rows = attempted(read_rows(rows_path))
    manifest = read_manifest(rows_path.with_suffix(".manifest.json"))
    n_failed = int((~rows["ok"]).sum())
    return PartCell(
        label, folder, manifest["cell"], rows_path, notebook_path, manifest, len(rows), n_failed
    )


def missing_cells(profile: Profile, run_dir: Path) -> list[str]:
    """Return the cells of a profile that a run folder lacks, in the profile's order."""
    present = {path.stem for path in (run_dir / "requests").glob("*.parquet")}
    return [cell.id for cell in profile.all_cells() if cell.id not in present]


def _labels(parts: Sequence[Path]) -> dict[str, Path]:
    """Short names of folders: what differs in their paths, so that no machine's path is kept."""
    if len(parts) == 1:
        return {parts[0].name: parts[0]}
    common = Path(os.path.commonpath(parts))
    return {part.relative_to(common).as_posix(): part for part in parts}


def _choose(found: Sequence[PartCell]) -> tuple[list[PartCell], list[PartCell]]:
    """Return the one to take of each cell and the replicates to keep, and say which there are."""
    chosen, kept = [], []
    for name in sorted({cell.name for cell in found}):
        # Two parts may have the very same measurement, if one was merged from the other.
        of_name = {cell.measurement: cell for cell in found if cell.name == name}
        *others, best = sorted(of_name.values(), key=lambda cell: cell.rank)
        chosen.append(best)
        if not others:
            continue
        print(f"{name}: taken from {best}; also run: {'; '.join(map(str, others))}", flush=True)
        kept += [cell for cell in others if cell.n_rows and not cell.n_failed]
        if left_out := [str(cell) for cell in others if cell not in kept]:
            best.manifest["notes"].append(f"also run, and left out: {'; '.join(left_out)}")
    return chosen, kept


def _notes(cell: PartCell) -> list[str]:
    """A cell's notes, which part it is from among them."""
    notes = list(cell.manifest["notes"])
    if not any(note.startswith(_RAN_IN) for note in notes):  # which a merged part has said
        notes.append(f"{_RAN_IN}{cell.part}")
    return notes


def _write(folder: Path, chosen: Sequence[PartCell], found: Sequence[PartCell]) -> None:
    for name in ("requests", "traces", "notebooks", "status", "figures"):
        (folder / name).mkdir(parents=True)
    commits = {cell.manifest["git_commit"] for cell in chosen}
    for cell in chosen:
        shutil.copy(cell.rows_path, folder / "requests" / f"{cell.name}.parquet")
        notes = _notes(cell)
        commit = f"ran at the commit {cell.manifest['git_commit'][:12]}, others did not"
        if len(commits) > 1 and commit not in notes:
            notes.append(commit)
        manifest = {**cell.manifest, "notes": notes}
        write_manifest(manifest, folder / "requests" / f"{cell.name}.manifest.json")
        _copy_notebook(cell.folder, f"02_run_system.{cell.name}", folder)
    parts = {cell.part: cell.folder for cell in found}
    newest = max(found, key=lambda cell: cell.manifest["started_at_utc"]).part
    for label, part in parts.items():
        for path in (part / "traces").glob("*.jsonl"):
            shutil.copy(path, folder / "traces")
        for name in _PER_PART:
            suffix = "" if label == newest else "." + _own_label(label, part).replace("/", "-")
            _copy_notebook(part, name, folder, suffix)
            for path in (part / "notebooks").glob(f"{name}.*.ipynb"):  # of a part merged before
                _copy_notebook(part, path.stem, folder)
    write_json(folder / "machine.json", _machines(parts, chosen, newest))


def _copy_large(parts: Sequence[Path], folder: Path) -> None:
    """Copy the newest rows of models larger than the ring, which are measured all at once."""
    having = [part for part in parts if (part / large_results.ROWS).exists()]
    if not having:
        return
    manifests = {p: json.loads((p / large_results.MANIFEST).read_text()) for p in having}
    newest = max(having, key=lambda part: manifests[part]["started_at_utc"])
    for name in large_results.FILES:
        shutil.copy(newest / name, folder / name)
    _copy_notebook(newest, large_results.NOTEBOOK, folder)


def _own_label(label: str, part: Path) -> str:
    """What the newest of a part's machines is called: a part that was merged has several."""
    entries = json.loads((part / "machine.json").read_text()).get("machines", [])
    if not entries:
        return label
    begun = {
        name: read_manifest(part / "requests" / f"{name}.manifest.json")["started_at_utc"]
        for entry in entries
        for name in entry["cells"]
    }
    newest = max(begun, key=lambda name: begun[name])
    return next(entry["part"] for entry in entries if newest in entry["cells"])


def _copy_notebook(source: Path, name: str, target: Path, suffix: str = "") -> None:
    """Copy an executed notebook and its status, where a part has them."""
    notebook = source / "notebooks" / f"{name}.ipynb"
    if notebook.exists():
        shutil.copy(notebook, target / "notebooks" / f"{name}{suffix}.ipynb")
    status = source / "status" / f"{name}.json"
    if status.exists():
        content = {**json.loads(status.read_text()), "task": f"{name}{suffix}"}
        write_json(target / "status" / f"{name}{suffix}.json", content)


def _machines(parts: dict[str, Path], chosen: Sequence[PartCell], newest: str) -> dict[str, Any]:
    """machine.json of all: the newest part's facts, the best of each measure, then each machine.

    A measure is a ceiling: what one machine of a kind reaches is what the others are held against.

    A machine is listed with its part, its rates and the cells that were run on it. A part that was
    merged itself brings those that it lists.
    """
    states = {
        label: json.loads((part / "machine.json").read_text()) for label, part in parts.items()
    }
    machines = []
    for label, state in states.items():
        cells = [cell.name for cell in chosen if cell.part == label]
        alone = [{"part": label, "cells": cells, "machine": state["machine"]}]
        for entry in state.get("machines", alone):
            machines.append({**entry, "cells": [c for c in entry["cells"] if c in cells]})
    facts = dict(states[newest]["machine"])
    for name in [name for name in facts if name.endswith("_rate_bytes_per_s")]:
        rates = [r for entry in machines if (r := entry["machine"].get(name)) is not None]
        facts[name] = max(rates, default=None)
    if found := [us for entry in machines if (us := entry["machine"].get("eager_operator_us"))]:
        facts["eager_operator_us"] = min(found)
    return {"machine": facts, "models": states[newest]["models"], "machines": machines}


if __name__ == "__main__":
    sys.exit(main())
