"""Host memory for master copies, as the kernel sees it."""

from pathlib import Path

import torch

from djinn_lib import host_memory

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


def test_memory_is_zeroed_exact_and_aligned():
    memory = host_memory.allocate(3 * _MIB + 5)
    assert memory.dtype == torch.uint8 and memory.shape == (3 * _MIB + 5,)
    assert memory.data_ptr() % 4096 == 0
    assert not memory.any()


def test_children_get_no_copy_and_huge_pages_are_asked_for():
    memory = host_memory.allocate(8 * _MIB)
    flags = kernel_flags(memory.data_ptr())
    assert "dc" in flags  # not copied by fork
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
