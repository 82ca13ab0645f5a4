"""Host memory for master copies, as the kernel sees it."""

import ctypes
import mmap
import resource
from pathlib import Path

import psutil
import pytest
import torch
from forked import in_a_child

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.devices.cpu import CpuAddressSpace
from djinn_lib.engine.memory.disk_tier import DiskTier
from djinn_lib.errors import CapacityError

_MIB = 1 << 20


def kernel_flags(address: int) -> set[str]:
    """Flags of the mapping that holds an address, see `VmFlags` in proc_pid_smaps(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError("no such mapping")


def test_a_child_that_collects_its_parents_memory_keeps_its_own():
    parents = [host.allocate(_MIB).fill_(5)]

    def collect():
        libc = ctypes.CDLL(None)
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, libc_mmap
        rw, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        own = libc.mmap(parents[0].data_ptr(), _MIB, rw, private, -1, 0)  # there, if that is free
        ctypes.memset(own, 7, _MIB)
        parents.clear()
        return ctypes.string_at(own + _MIB - 1, 1)[0]

    libc_mmap = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    assert in_a_child(collect) == ("7", 0)
    assert parents[0].eq(5).all()


def test_memory_is_zeroed_exact_and_aligned():
    memory = host.allocate(3 * _MIB + 5)
    assert memory.dtype == torch.uint8 and memory.shape == (3 * _MIB + 5,)
    assert memory.data_ptr() % 4096 == 0
    assert not memory.any()
    before = psutil.Process().memory_info().rss
    memory = host.allocate(64 * _MIB, now=True)
    assert psutil.Process().memory_info().rss - before >= 60 * _MIB


def test_children_get_no_copy_and_huge_pages_are_asked_for():
    memory = host.allocate(8 * _MIB)
    flags = kernel_flags(memory.data_ptr())
    assert flags & {"wf", "dc"}  # not copied by fork
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_more_than_there_is_is_refused_with_what_else_to_do(monkeypatch):
    monkeypatch.setattr(host, "host_bytes_available", lambda: 5 * _MIB)
    host.allocate(5 * _MIB)
    with pytest.raises(CapacityError, match=r"6.0 MiB of host memory for a master copy, got 5.0"):
        host.allocate(6 * _MIB)
    with pytest.raises(CapacityError, match=r"for the ring, got 5.0 MiB .*: .* lower the capacity"):
        CpuAddressSpace(3, 2 * _MIB)
    with pytest.raises(CapacityError, match=r"for host_capacity, got .* lower host_capacity"):
        DiskTier(6 * _MIB, _MIB, "nowhere")


def test_a_limit_of_addresses_is_a_limit():
    def allocate():
        limit = psutil.Process().memory_info().vms + 100 * _MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        assert host.host_bytes_available() <= 100 * _MIB
        host.allocate(200 * _MIB)

    said, _ = in_a_child(allocate)
    assert said.startswith("CapacityError: expected 200.0 MiB of host memory for a master copy, ")
