"""The CPU backend: real mappings, real faults."""

import faulthandler
import os
import signal
from enum import Enum
from pathlib import Path

import psutil
import pytest
import torch
from forked import in_a_child
from open_files import n_open

from djinn_lib.engine.memory.devices import cpu as module
from djinn_lib.engine.memory.devices import cuda, open_address_space
from djinn_lib.engine.memory.devices.base import Refused
from djinn_lib.engine.memory.devices.cpu import CpuAddressSpace
from djinn_lib.engine.memory.devices.cuda import CudaAddressSpace
from djinn_lib.errors import CapacityError, ConfigError, PlatformError

PAGE = 64 << 10


@pytest.fixture
def space():
    space = CpuAddressSpace(n_frames=8, page_bytes=PAGE)
    yield space
    space.close()


def test_a_tensor_keeps_its_address_over_remapping(space):
    area = space.reserve(2)
    view = space.bytes_view(area)
    tensor = view[PAGE:].view(torch.float32)
    space.map(area, 0, [0, 1])
    tensor.fill_(1.5)
    pointer = tensor.data_ptr()
    space.unmap(area, 1, 1)
    space.map(area, 1, [6])
    tensor.fill_(2.5)
    space.unmap(area, 1, 1)
    space.map(area, 1, [1])
    assert tensor.data_ptr() == pointer == area.address + PAGE
    assert bool((tensor == 1.5).all())


@pytest.mark.parametrize("touched", [None, 0, 1], ids=["reserved", "first", "second"])
def test_touching_an_unmapped_page_faults(touched):
    """In a child of its own, which maps two pages, unmaps one of them and touches that."""

    def touch():
        faulthandler.disable()
        space = CpuAddressSpace(4, PAGE)
        area = space.reserve(2)
        view = space.bytes_view(area)
        if touched is not None:
            space.map(area, 0, [0, 1])
            view.fill_(3)
            space.unmap(area, touched, 1)
            assert int(view[(1 - touched) * PAGE]) == 3  # the other page is still there
        return int(view[(touched or 0) * PAGE])

    said, status = in_a_child(touch)
    assert not said and status in (-signal.SIGSEGV, -signal.SIGBUS)


def test_a_failed_map_leaves_nothing_mapped(space, monkeypatch):
    area = space.reserve(4)
    real, calls = space._mmap, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Refused("Cannot allocate memory")
        return real(*arguments)

    monkeypatch.setattr(space, "_mmap", failing)
    with pytest.raises(PlatformError, match=r"got none \(Cannot allocate memory\)"):
        space.map(area, 0, [0, 2, 4, 6])
    assert calls[-1][:3] == (area.address, PAGE, 0)  # what was mapped is inaccessible again
    assert not space.mapped_pages(area)


class FakeDriver:
    """CUDA's driver as far as mapping goes; its calls fail from the nth `cuMemMap` on."""

    class CUresult(Enum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_OUT_OF_MEMORY = 2

    def __init__(self, fail_at):
        self.mapped, self.fail_at, self.n_maps = set(), fail_at, 0

    def cuCtxGetCurrent(self):
        return self.CUresult.CUDA_SUCCESS, 1

    def cuMemAddressReserve(self, *_):
        failed = self.fail_at == 0
        return list(self.CUresult)[failed], 1 << 40

    def cuMemMap(self, address, *_):
        self.n_maps += 1
        if self.n_maps >= self.fail_at:
            return (self.CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        self.mapped.add(address)
        return (self.CUresult.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, _):
        self.mapped.remove(address)
        return (self.CUresult.CUDA_SUCCESS,)


def test_a_gpu_that_refuses_says_so_in_the_same_words(monkeypatch):
    fake = FakeDriver(fail_at=3)
    monkeypatch.setattr(cuda, "driver", fake)
    space = CudaAddressSpace.__new__(CudaAddressSpace)
    space.page_bytes, space._areas, space._mapped, space._frames = 2 << 20, {}, {}, [0] * 4
    area = space.reserve(4)
    with pytest.raises(PlatformError, match=r"got none \(cuMemMap failed with CUDA_ERROR_OUT_OF"):
        space.map(area, 0, [3, 1, 2, 0])
    assert fake.mapped == set() == space.mapped_pages(area)
    fake.fail_at = 0
    with pytest.raises(PlatformError, match=r"8.0 MiB of virtual addresses, got none \(cuMemAddr"):
        space.reserve(4)


def test_pages_that_cannot_be_had_or_unmapped_are_said(space, monkeypatch):
    def refuse(*_):
        raise Refused("Cannot allocate memory")

    with pytest.raises(PlatformError, match=r"of virtual addresses, got none \(Cannot allocate"):
        space.reserve(1 << 40)
    area = space.reserve(2)
    space.map(area, 0, [0, 1])
    monkeypatch.setattr(space, "_mmap", refuse)
    with pytest.raises(PlatformError, match=r"1 pages of 64.0 KiB to be unmapped.*max_map_count"):
        space.unmap(area, 0, 1)


def test_neighbouring_frames_are_mapped_by_one_call(space, monkeypatch):
    area, calls = space.reserve(6), []
    monkeypatch.setattr(space, "_mmap", lambda *arguments: calls.append(arguments))
    space.map(area, 0, [3, 4, 5, 0, 7])
    assert [(call[1] // PAGE, call[5] // PAGE) for call in calls] == [(3, 3), (1, 0), (1, 7)]


def test_close_gives_everything_back_and_can_be_repeated():
    process = psutil.Process()
    before, n_cycles = (n_open(), len(process.memory_maps(grouped=False))), 40
    for _ in range(n_cycles):
        space = CpuAddressSpace(16, PAGE)
        area = space.reserve(16)
        space.map(area, 0, range(16))
        space.bytes_view(area).fill_(1)
        space.close()
        space.close()
    assert n_open() == before[0]
    # Other threads of this process may map memory meanwhile, but not once a cycle.
    assert len(process.memory_maps(grouped=False)) < before[1] + n_cycles


@pytest.mark.parametrize("page_bytes", [0, 1000, 4097])
def test_pages_are_multiples_of_the_granularity(page_bytes):
    with pytest.raises(ConfigError, match="expected pages of a multiple"):
        CpuAddressSpace(4, page_bytes)


def test_more_than_the_free_memory_is_refused_before_anything_is_taken():
    n_frames = psutil.virtual_memory().total // (1 << 30) + 1
    before = n_open()
    with pytest.raises(CapacityError, match="lower the capacity"):
        CpuAddressSpace(n_frames, 1 << 30)
    assert n_open() == before


def test_a_full_memory_at_allocation_is_reported(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = n_open()
    with pytest.raises(CapacityError, match="No space left"):
        CpuAddressSpace(4, PAGE)
    assert n_open() == before


def test_too_many_mappings_are_refused():
    n_frames = int(Path("/proc/sys/vm/max_map_count").read_text())
    with pytest.raises(PlatformError, match=r"vm\.max_map_count"):
        CpuAddressSpace(n_frames, 4096)


def test_a_platform_without_memfd_is_refused(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(PlatformError, match="memfd_create"):
        CpuAddressSpace(4, PAGE)
    monkeypatch.undo()
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(PlatformError, match="got darwin"):
        CpuAddressSpace(4, PAGE)


def test_a_gpu_that_cannot_be_used_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlatformError, match="device 'cuda'"):
        open_address_space(torch.device("cuda"), 2, 2 << 20)
    with pytest.raises(ConfigError, match="'cpu' or 'cuda'"):
        open_address_space(torch.device("meta"), 2, 4096)
