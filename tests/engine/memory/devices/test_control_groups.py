"""Limits of control groups: both versions, groups in groups, containers; one that is real."""

import os
from pathlib import Path

import pytest
from forked import in_a_child

import djinn_lib as dj
from djinn_lib.engine.memory.devices import control_groups
from djinn_lib.engine.memory.devices.control_groups import bytes_left, groups_of, limits_of
from djinn_lib.engine.memory.devices.host import allocate, host_bytes_available

MIB = 1 << 20
UNLIMITED = {1: str((1 << 63) - 4096), 2: "max"}  # as the kernel writes it


class Machine:
    """The files of /proc and of mounted control groups, in a folder."""

    def __init__(self, root):
        self.root, self.process = root, root / "proc"
        self.process.mkdir()
        self.lines, self.mounts = [], ["22 1 0:21 / /proc rw - proc proc rw"]

    def be_in(self, *lines):
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, version, name, top="/"):
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        kind = {1: "cgroup cgroup rw,memory", 2: "cgroup2 cgroup2 rw,nsdelegate"}[version]
        escaped = str(folder).replace(" ", r"\040")
        self.mounts.append(f"35 31 0:32 {top} {escaped} rw,relatime shared:9 - {kind}")
        (self.process / "mountinfo").write_text("".join(f"{line}\n" for line in self.mounts))
        return folder

    @property
    def left_mib(self):
        return sorted(n // MIB for n in limits_of(self.process))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def limit(version, folder, limit_mib, used_mib=0, cached_mib=0, shared_mib=0, **more):
    """Write what the kernel shows of a group."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_text = UNLIMITED[version] if limit_mib is None else str(limit_mib * MIB)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
             2: ("memory.max", "memory.current", "file", "shmem")}[version]  # fmt: skip
    (folder / names[0]).write_text(limit_text + "\n")
    (folder / names[1]).write_text(f"{used_mib * MIB}\n")
    stat = {"anon": 0, names[2]: cached_mib * MIB, names[3]: shared_mib * MIB, **more}
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_leaves_its_limit_less_what_cannot_be_given_up(version, tmp_path):
    limit(version, tmp_path, 700, used_mib=300, cached_mib=120, shared_mib=20)
    assert bytes_left(tmp_path) == 500 * MIB
    assert host_bytes_available(tmp_path) == 500 * MIB
    limit(version, tmp_path, 100, used_mib=300)
    assert bytes_left(tmp_path) == -200 * MIB
    assert host_bytes_available(tmp_path) == 0
    (tmp_path / "memory.stat").write_text("nonsense")
    assert bytes_left(tmp_path) == -200 * MIB


def test_no_limit(tmp_path):
    assert bytes_left(tmp_path) is None
    limit(2, tmp_path, None, used_mib=300)
    assert bytes_left(tmp_path) is None
    assert host_bytes_available(tmp_path) > 0


def test_what_throttles_is_a_limit_too(tmp_path):
    limit(2, tmp_path, 700, used_mib=100)
    (tmp_path / "memory.high").write_text(f"{400 * MIB}\n")
    assert bytes_left(tmp_path) == 300 * MIB


def test_version_1_tells_of_limits_above_that_cannot_be_seen(tmp_path):
    limit(1, tmp_path, None, used_mib=100, hierarchical_memory_limit=250 * MIB)
    assert bytes_left(tmp_path) == 150 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_groups_above_count(machine, version):
    """As with a batch system's job, or a service in a slice, seen from the machine itself."""
    tree = machine.mount(version, "sys/fs cgroup")
    line = {1: "4:cpu,memory:/jobs/7/step", 2: "0::/jobs/7/step"}[version]
    machine.be_in("3:cpuset:/elsewhere", line)
    limit(version, tree / "jobs" / "7" / "step", 900, used_mib=100)
    limit(version, tree / "jobs" / "7", None, used_mib=100)
    limit(version, tree / "jobs", 700, used_mib=400)
    limit(version, tree / "others", 1)
    assert [left for left in machine.left_mib if left < 1 << 20] == [300, 800]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("top", "path"),
    [("/docker/abc", path) for path in ("/docker/abc", "/docker/abc/worker", "/pods/1", "/../up")]
    + [("/", "/")],
)
def test_a_container_whose_tree_begins_at_its_group(machine, version, top, path):
    """Docker with version 1: the machine's path, and a tree of which that group is the top.

    With version 2 the group is "/", and its files are at the top of the tree.
    """
    tree = machine.mount(version, "sys", top=top)
    machine.be_in({1: f"9:memory:{path}", 2: f"0::{path}"}[version])
    limit(version, tree, 512, used_mib=12)
    limit(version, tree / "worker", 100)
    assert machine.left_mib == ([100, 500] if path.endswith("worker") else [500])


def test_both_versions_at_once(machine):
    """systemd's hybrid: memory is limited by version 1, while version 2 only tracks processes."""
    one, two = machine.mount(1, "memory"), machine.mount(2, "unified")
    machine.be_in("4:memory:/user", "0::/user")
    (two / "user").mkdir()
    limit(1, one / "user", 64)
    assert machine.left_mib == [64]
    assert groups_of(machine.process) == [one / "user", one, two / "user", two]


@pytest.mark.parametrize("text", ["", "nonsense", "1:2:3:4", "\x00"])
def test_a_proc_that_says_nothing_limits_nothing(machine, text):
    assert limits_of(machine.process) == []
    machine.mount(2, "sys")
    (machine.process / "cgroup").write_text(text)
    assert limits_of(machine.process) == []
    (machine.process / "mountinfo").write_text(text)
    assert limits_of(machine.process) == []


def tree_that_limits_memory(version):
    """The folder of a mounted tree in which a new group can limit memory."""
    for kind, _, folder in control_groups._mounts(Path("/proc/self")):
        if kind == version and os.access(folder, os.W_OK):
            if version == 1:
                return folder
            controllers = (folder / "cgroup.subtree_control").read_text().split()
            return folder if "memory" in controllers else None
    return None


@pytest.fixture(params=[1, 2], ids=["version-1", "version-2"])
def group(request):
    """A real group in a real group, the outer one with a limit of 1 GiB."""
    if (tree := tree_that_limits_memory(request.param)) is None:
        pytest.skip("needs control groups that limit memory, and the right to make one")
    outer = tree / f"djinn-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        name = {1: "memory.limit_in_bytes", 2: "memory.max"}[request.param]
        (outer / name).write_text(str(1 << 30))
        yield inner
    finally:
        for folder in (inner, outer):
            if folder.exists():
                folder.rmdir()


def test_a_process_in_a_group_is_refused_and_not_killed(group, tmp_path):
    uses = {
        "the ring": lambda: dj.Djinn("2GiB", "cpu"),
        "a master copy": lambda: allocate(2 << 30),
        "host_capacity": lambda: dj.Djinn("1MiB", "cpu", host_capacity="2GiB", swap_dir=tmp_path),
    }
    for name, use in uses.items():

        def inside(use=use):
            (group / "cgroup.procs").write_text(str(os.getpid()))
            use()

        said, status = in_a_child(inside)
        assert said.startswith(f"CapacityError: expected 2.0 GiB of host memory for {name}, got ")
        assert "MiB available: free memory or " in said and status == 0
