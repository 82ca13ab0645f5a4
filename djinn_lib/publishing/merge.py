"""Merge the cells of several run folders into one: `djinn merge RUN_DIR PART...`.

A run may be done in parts, on several machines of one kind. Parts must have the same profile and
parameters, traces, weights, packages, driver, kind of GPU and commit; otherwise the differences are
listed and nothing is merged. `--allow-commits` accepts different commits, which the notes of the
cells then name. `machine.json` lists all machines with their measurements and cells. If several
parts have the same cell, one measurement is taken and the others are kept as replicates.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from djinn_lib.analysis.run import REPLICATES, read_machine
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment import large_results
from djinn_lib.experiment.execution.notebook_logs import copy_with_log
from djinn_lib.experiment.locks import run_locks
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.profile import Profile, load_profile
from djinn_lib.files import ensure_writable, replace_folders, write_json
from djinn_lib.publishing.parts import PartCell, differences, read_part

_PER_PART = ("00_setup", "01_trace")  # notebooks that every part has, about its own machine


def merge_parts(
    run_dir: Path,
    parts: Sequence[Path],
    allow_commits: bool = False,
    replace: bool = False,
    newest_of: Collection[str] = (),
) -> int:
    """Do as `merge`, and print the cells that are missing; return 1 if there are any, else 0."""
    folders = [part.expanduser() for part in parts]
    cells = merge(run_dir.expanduser(), folders, allow_commits, replace, newest_of)
    missing = missing_cells(load_profile(cells[0].manifest["profile"]), run_dir.expanduser())
    print(f"{len(cells)} cells of {len(parts)} parts in {run_dir}", flush=True)
    if missing:
        print("still to be run: " + " ".join(f"cell:{name}" for name in missing))
    return 1 if missing else 0


def missing_cells(profile: Profile, run_dir: Path) -> list[str]:
    """Return the cells of a profile that a run folder lacks, in the profile's order."""
    present = {path.stem for path in (run_dir / "requests").glob("*.parquet")}
    return [cell.id for cell in profile.all_cells() if cell.id not in present]


def merge(
    run_dir: Path,
    parts: Sequence[Path],
    allow_commits: bool = False,
    replace: bool = False,
    newest_of: Collection[str] = (),
) -> list[PartCell]:
    """Merge the cells of several parts into a run folder; return its cells.

    If several parts have the same cell, the latest one is taken, preferably without failed
    requests, and from a time when no other GPU of the host was in use. The others are printed. They
    are kept as replicates if all their requests were served; otherwise they are only noted in the
    manifest. Of the cells in `newest_of` only the latest one is read, so that a system can be
    measured again in another form. A replaced folder is always complete: either the old or the new
    one.

    Raises:
        ConfigError: the folder exists, is one of the parts, is in use by a run, or cannot be made.
        RecordError: the parts do not match, or one of them cannot be read.
        OSError: writing failed, for example on a full disk; the folder is unchanged.
    """
    run_dir, parts = run_dir.resolve(), [part.resolve() for part in parts]
    if run_dir in parts or len(set(parts)) < len(parts):
        raise ConfigError(
            f"expected the folder to make and parts that all differ, got {run_dir} and "
            f"{', '.join(map(str, parts))}: name each part once, and another folder for the result"
        )
    if run_dir.exists() and any(run_dir.iterdir()) and not replace:
        raise ConfigError(
            f"expected {run_dir} to be absent or empty, got a folder with files: name another, or "
            "replace it with --replace"
        )
    labels = _labels(parts)
    found = [cell for label, part in labels.items() for cell in read_part(part, label)]
    found = _without_older(found, newest_of)
    if problems := differences(found, allow_commits):
        raise RecordError(
            "expected parts that belong together, got:\n  " + "\n  ".join(problems)
            + "\nrun the cells again that differ, leave their part out, or take only the newest of "
            "a cell with --newest-of CELL"
        )  # fmt: skip
    if not found:
        raise RecordError("expected parts with at least one cell among them, got none: add one")
    chosen, others = _choose(found)
    ensure_writable(run_dir.parent)
    # Lock the folder: a run that uses it would lose its results.
    unused = run_locks(run_dir, "cpu") if (run_dir / ".lock").exists() else nullcontext()
    with unused, TemporaryDirectory(prefix=f".{run_dir.name}-", dir=run_dir.parent) as scratch:
        made = Path(scratch) / "run"
        for name in ("requests", "traces", "notebooks", "figures"):
            (made / name).mkdir(parents=True)
        _write_cells(made, chosen, others)
        _write_rest(made, {cell.part: labels[cell.part] for cell in found}, found, chosen)
        _copy_large(made, parts)
        replace_folders({run_dir: made})
    return chosen


def _labels(parts: Sequence[Path]) -> dict[str, Path]:
    """Return short names of folders: only the parts of their paths that differ."""
    if len(parts) == 1:
        return {parts[0].name: parts[0]}
    common = Path(os.path.commonpath(parts))
    return {part.relative_to(common).as_posix(): part for part in parts}


def _without_older(found: Sequence[PartCell], names: Collection[str]) -> list[PartCell]:
    """Leave out all but the latest measurement of each named cell, and note in it what was left."""
    for name in names:
        of_name = [cell for cell in found if cell.name == name]
        if not of_name:
            known = ", ".join(sorted({cell.name for cell in found}))
            raise ConfigError(f"expected a cell of the parts, got {name!r}: choose from {known}")
        newest = max(of_name, key=lambda cell: cell.manifest["started_at_utc"])
        begun = newest.manifest["started_at_utc"]
        older = [cell for cell in of_name if cell.manifest["started_at_utc"] != begun]
        if older:
            note = f"also run in another form, and left out: {'; '.join(map(str, older))}"
            newest.manifest["notes"].append(note)
        found = [cell for cell in found if not any(cell is other for other in older)]
    return list(found)


def _choose(found: Sequence[PartCell]) -> tuple[list[PartCell], list[PartCell]]:
    """Choose one measurement of each cell, and the replicates to keep; print the choice."""
    chosen, kept = [], []
    for name in sorted({cell.name for cell in found}):
        # If one part was merged from another, both have the same measurement.
        of_name = {(cell.manifest["run_id"], cell.manifest["started_at_utc"]): cell
                   for cell in found if cell.name == name}  # fmt: skip
        *others, best = sorted(of_name.values(), key=lambda cell: cell.rank)
        chosen.append(best)
        if not others:
            continue
        print(f"{name}: taken from {best}; also run: {'; '.join(map(str, others))}", flush=True)
        kept += [cell for cell in others if cell.n_rows and not cell.n_failed]
        if left_out := [str(cell) for cell in others if cell not in kept]:
            best.manifest["notes"].append(f"also run, and left out: {'; '.join(left_out)}")
    return chosen, kept


def _write_cells(made: Path, chosen: Sequence[PartCell], others: Sequence[PartCell]) -> None:
    commits = {cell.manifest["git_commit"] for cell in chosen}
    for cell in chosen:
        notes = cell.notes
        commit = f"ran at the commit {cell.manifest['git_commit'][:12]}, others did not"
        if len(commits) > 1 and commit not in notes:
            notes.append(commit)
        notebook = f"02_run_system.{cell.name}"
        cell.write(made / "requests" / f"{cell.name}.parquet",
                   made / "notebooks" / f"{notebook}.ipynb", notes)  # fmt: skip
    for cell in others:
        path = made / REPLICATES / f"{cell.manifest['run_id']}.parquet"
        path.parent.mkdir(exist_ok=True)
        cell.write(path, path.with_suffix(".ipynb"), cell.notes)


def _write_rest(
    made: Path, parts: Mapping[str, Path], found: Sequence[PartCell], chosen: Sequence[PartCell]
) -> None:
    """Copy traces and the notebooks about each machine, and write machine.json."""
    newest = max(found, key=lambda cell: cell.manifest["started_at_utc"]).part
    states = {label: read_machine(part) for label, part in parts.items()}
    for label, part in parts.items():
        for path in (part / "traces").glob("*.jsonl"):
            shutil.copy(path, made / "traces")
        own = _newest_machine(part, states[label].get("machines", [])) or label
        suffix = "" if label == newest else "." + own.replace("/", "-")
        for name in _PER_PART:
            _copy_notebook(part, made, name, f"{name}{suffix}")
            for path in (part / "notebooks").glob(f"{name}.*.ipynb"):  # from a merged part
                _copy_notebook(part, made, path.stem, path.stem)
    write_json(made / "machine.json", _machines(states, chosen, newest))


def _newest_machine(part: Path, listed: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the newest machine of a part that was itself merged."""
    begun = {
        read_manifest(part / "requests" / f"{cell}.manifest.json")["started_at_utc"]: entry["part"]
        for entry in listed
        for cell in entry["cells"]
    }
    return begun[max(begun)] if begun else None


def _machines(
    states: Mapping[str, Mapping[str, Any]], chosen: Sequence[PartCell], newest: str
) -> dict[str, Any]:
    """Return machine.json of all parts: facts of the newest, best rates, and a list of machines.

    Measured rates are upper limits, so the best one of any machine is used for all. A part that
    was itself merged contributes the machines that it lists.
    """
    machines = []
    for label, state in states.items():
        cells = [cell.name for cell in chosen if cell.part == label]
        alone = [{"part": label, "cells": cells, "machine": state["machine"]}]
        for entry in state.get("machines", alone):
            machines.append({**entry, "cells": [c for c in entry["cells"] if c in cells]})
    facts = dict(states[newest]["machine"])
    for name in facts:
        best = max if name.endswith("_rate_bytes_per_s") else min
        if best is max or name == "eager_operator_us":
            found = [v for entry in machines if (v := entry["machine"].get(name)) is not None]
            facts[name] = best(found, default=None)
    return {"machine": facts, "models": states[newest]["models"], "machines": machines}


def _copy_large(made: Path, parts: Sequence[Path]) -> None:
    """Copy the newest rows of models larger than the ring, which are measured together."""
    having = {
        json.loads((part / large_results.MANIFEST).read_text())["started_at_utc"]: part
        for part in parts
        if (part / large_results.ROWS).exists()
    }
    if having:
        newest = having[max(having)]
        for name in large_results.FILES:
            shutil.copy(newest / name, made / name)
        _copy_notebook(newest, made, large_results.NOTEBOOK, large_results.NOTEBOOK)


def _copy_notebook(part: Path, made: Path, name: str, new: str) -> None:
    """Copy an executed notebook, if a part has it."""
    if (notebook := part / "notebooks" / f"{name}.ipynb").exists():
        copy_with_log(notebook, made / "notebooks" / f"{new}.ipynb")
