"""Digests of the inputs of executions: an execution is current while no input has changed.

Digests are computed before an execution starts, and stored with its status. So if a file is edited
while a cell runs, the next command runs the cell again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from djinn_lib.experiment.manifest import Status, read_execution, read_manifest
from djinn_lib.experiment.profile import Cell, Profile
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.paths import REFERENCE, REPO
from djinn_lib.systems import KERNELS, SYSTEMS

LIBRARY = REPO / "djinn_lib"
# Beside the engine and the system's own module: what sends requests and writes rows.
_OF_EVERY_CELL = ("engine", "experiment/cells/arrivals.py", "experiment/cells/cell.py",
                  "experiment/cells/running.py")  # fmt: skip
# Modules of systems that not every cell needs.
_OF_SOME_CELLS = {"accelerate", "stable_weights"}  # 07_large_models measures the first
_ON_THE_FLEET = ("djinn_vllm", "vllm_sleep", "vllm_sleep_readonly")  # engines of djinn_lib.fleet
_BUILDS_ON = {  # of these, and of other systems
    "pytorch": ("stable_weights",),
    "djinn_vllm": ("vllm_recreate",),
    "vllm_sleep": ("vllm_recreate",),
    "vllm_sleep_readonly": ("vllm_recreate", "vllm_sleep"),
}


def digest(value: Any) -> str:
    """Return a digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_files(paths: Iterable[Path], root: Path = REPO) -> str:
    """Return one digest of the names and contents of files, and of those below folders.

    A missing or unreadable file changes the digest too. Names are relative to `root`, so a moved
    checkout has the same digest.
    """
    return digest([(_name(path, root), _content(path)) for path in sorted(set(_files(paths)))])


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        else:
            yield path


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path.name)


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"not read: {error.strerror}"


def cell_inputs(run: RunFolder, profile: Profile, cell: Cell) -> dict[str, str]:
    """Return digests of all inputs of a cell."""
    return {
        "profile": digest(_part_of(profile, cell)),
        "trace": _content(run.trace(cell.trace)),
        "weights": digest(recorded_digests(run.machine)),
        "code": digest_files(code_of(profile.systems[cell.system].system)),
    }


def _part_of(profile: Profile, cell: Cell) -> dict[str, Any]:
    """Return the part of a profile that a cell reads."""
    apart = {"cells", "systems", "capacities", "traces", "large"}
    return {
        "cell": cell.model_dump(),
        "system": profile.systems[cell.system].model_dump(),
        "capacity": profile.capacities[cell.capacity_label],
        "trace": profile.traces[cell.trace].model_dump(),
        "kernel": kernel_name(profile, cell),
        **profile.model_dump(exclude=apart),
    }


def code_of(system: str) -> list[Path]:
    """Return the files and folders of the code that affects the rows of a system.

    Modules of other systems are not among them, unless the system builds on them.
    """
    own, _ = SYSTEMS[system]
    others = {module for module, _ in SYSTEMS.values()} | _OF_SOME_CELLS
    others -= {own, *_BUILDS_ON.get(own, ())}
    modules = (LIBRARY / "systems").glob("*.py")
    return [
        *(LIBRARY / part for part in _OF_EVERY_CELL),
        *([LIBRARY / "fleet"] if system in _ON_THE_FLEET else []),
        *(path for path in modules if path.stem not in others),
    ]


def kernel_name(profile: Profile, cell: Cell) -> str | None:
    """Return the kernel of the separate environment that a cell needs, if it is installed."""
    wanted = KERNELS.get(profile.systems[cell.system].system)
    if profile.device != "cpu" or wanted is None:
        return None
    from jupyter_client.kernelspec import KernelSpecManager  # only where it matters

    return wanted if wanted in KernelSpecManager().find_kernel_specs() else None


def recorded_digests(machine_json: Path) -> dict[str, dict[str, str]]:
    """Return the digests of files that the set-up stored, by model; none without a set-up."""
    try:
        models = json.loads(machine_json.read_text())["models"]
        return {name: dict(files["digests"]) for name, files in models.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_current(run: RunFolder, profile: Profile, cell: Cell) -> bool:
    """Whether a cell is current: its latest execution succeeded, with the current inputs."""
    files = run.cell(cell.id)
    status = read_execution(files.manifest)
    return (
        status is not None
        and status.settled
        and status.begun_with == cell_inputs(run, profile, cell)
        and files.rows.exists()
        and files.notebook.exists()
    )


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of inputs that differ."""
    return [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]


def expected_s(
    run: RunFolder, profile: Profile, cell: Cell, reference: Path = REFERENCE
) -> float | None:
    """Return the duration of a cell in seconds, from here or from the reference run."""
    status: Status | None = read_execution(run.cell(cell.id).manifest)
    if status and status.settled:
        return status.seconds
    try:
        manifest = read_manifest(RunFolder(reference).cell(cell.id).manifest)
    except ValueError:
        return None
    return manifest["wall_s"] if manifest["profile"] == profile.name else None


def duration(seconds: float | None) -> str:
    """Return an expected duration as text: "about 40 s", "about 2.5 min"."""
    if seconds is None:
        return "duration unknown"
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.1f} min"
