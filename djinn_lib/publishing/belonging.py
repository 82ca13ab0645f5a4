"""Whether cells of several machines may stand in one table: what must be equal, and is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Of the parameters, these belong to a cell, not to a run.
_OF_A_CELL = ("repeats", "page_bytes", "mode", "speed")
_OF_A_MACHINE = ("device", "device_name")
Origin = tuple[str, str, Mapping[str, Any]]  # where a cell comes from, its name, its manifest


def differences(origins: Sequence[Origin], allow_commits: bool = False) -> list[str]:
    """Return a line for each thing in which cells differ that must not; none: they fit together.

    Compared are the profile, its parameters, the weights (bytes, dtype, hash), the kind of device,
    the versions of the set-up's packages and driver, the commit and whether the tree was changed;
    among the cells of a system the versions of packages, for it may have an environment of its own;
    among those of a label of the profile's systems its options and the bytes of weights that it
    keeps on the device; and a trace's hash among the cells that use it. A package that is not
    installed in one place was not used there, and is no difference.
    """
    lines: dict[str, None] = {}  # in order, each once
    first: dict[str, tuple[str, Any]] = {}
    for where, cell, manifest in origins:
        for what, value in _facts(cell, manifest, allow_commits):
            known_where, known = first.setdefault(what, (where, value))
            if value != known:
                lines[f"{what}: {known} in {known_where}, {value} in {where}"] = None
    return list(lines)


def _facts(
    cell: str, manifest: Mapping[str, Any], allow_commits: bool
) -> Iterator[tuple[str, Any]]:
    """What must be equal, under a name that says among which cells."""
    machine, parameters = manifest["machine"], manifest["parameters"]
    trace, _, label, *_ = cell.split("-")
    yield "profile", manifest["profile"]
    for name, value in parameters.items():
        if name not in _OF_A_CELL:
            yield f"parameter {name}", value
    for model, facts in manifest["models"].items():
        for name, value in facts.items():
            among = f", {label}" if name == "device_bytes" else ""
            yield f"{name} of the weights of {model}{among}", value
    for name in _OF_A_MACHINE:
        yield name, machine.get(name)
    for package, version in machine["versions"].items():
        yield f"version of {package}, set-up", version
    for package, version in manifest["versions"].items():
        yield f"version of {package}, {manifest['system']}", version
    yield f"options of {label}", manifest["options"]
    yield f"sha256 of the trace {trace}", manifest["trace_sha256"]
    if not allow_commits:
        yield "commit", manifest["git_commit"]
        yield "changes beside the commit", manifest["git_dirty"]
