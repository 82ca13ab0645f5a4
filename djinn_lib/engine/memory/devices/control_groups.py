"""Read the memory limits of this process's control groups, in both versions of the interface.

Containers, services and jobs of batch systems are control groups. Each group may have a limit,
which also holds for the groups below it. The kernel kills processes that exceed it.
See cgroups(7), and https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def limits_of(process: Path = Path("/proc/self")) -> list[int]:
    """Return how many bytes each group leaves that limits the memory of a process.

    Args:
        process: its folder in /proc.
    """
    return [left for group in groups_of(process) if (left := bytes_left(group)) is not None]


def groups_of(process: Path) -> list[Path]:
    """Return the folders of a process's groups, as far as they are visible from here.

    A container sees the tree from its own group on, or the tree of the whole machine.
    """
    try:
        paths = dict(_paths(process))
        mounts = list(_mounts(process))
    except (OSError, ValueError):  # no /proc, or not as cgroups(7) and proc_pid_mountinfo(5) say
        return []
    found: list[Path] = []
    for version, top, folder in mounts:
        if path := paths.get(version):
            group = folder / path.relative_to(top) if path.is_relative_to(top) else folder
            found += [group, *(above for above in group.parents if above.is_relative_to(folder))]
    return found


def _paths(process: Path) -> Iterator[tuple[int, Path]]:
    """Yield the group that limits a process's memory, for each version."""
    for line in (process / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield 2, Path(path)
        elif "memory" in controllers.split(","):
            yield 1, Path(path)


def _mounts(process: Path) -> Iterator[tuple[int, Path, Path]]:
    """Yield each mounted tree of groups: its version, the group at its top, and its folder."""
    for line in (process / "mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        _, _, _, top, folder, *_ = (_unescaped(field) for field in mount.split())
        kind, _, options = file_system.split(maxsplit=2)
        if kind == "cgroup2":
            yield 2, Path(top), Path(folder)
        elif kind == "cgroup" and "memory" in options.split(","):
            yield 1, Path(top), Path(folder)


def _unescaped(field: str) -> str:
    """Decode a path of mountinfo, where blanks and backslashes are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def bytes_left(group: Path) -> int | None:
    """Return how many bytes a group leaves; None without a limit.

    The page cache counts as free, because the kernel drops it when memory is short. Shared memory
    counts as cache, but cannot be dropped.

    Args:
        group: its folder.
    """
    stat = _stat(group)
    limits = [_number(group, "memory.max"), _number(group, "memory.high")]
    used, cached = _number(group, "memory.current"), stat.get("file", 0) - stat.get("shmem", 0)
    if used is None:
        limits = [_number(group, "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used = _number(group, "memory.usage_in_bytes")
        cached = stat.get("total_cache", 0) - stat.get("total_shmem", 0)
    limits = [limit for limit in limits if limit is not None]
    return min(limits) - used + cached if limits and used is not None else None


def _number(group: Path, name: str) -> int | None:
    """Return the number in a file of a group; None for "max" or a missing file."""
    try:
        return int((group / name).read_text())
    except (OSError, ValueError):
        return None


def _stat(group: Path) -> dict[str, int]:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return {name: int(number) for name, number in map(str.split, lines)}
    except (OSError, ValueError):
        return {}
