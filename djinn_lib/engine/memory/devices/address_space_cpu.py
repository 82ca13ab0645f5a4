"""The address space of the CPU: frames in one `memfd`, ranges and pages by `mmap`.

The frames are one anonymous file in memory (`memfd_create(2)`), a range is `mmap(PROT_NONE)`, and
mapping a page is `mmap(MAP_FIXED | MAP_SHARED)` of the frame's offset in that file. An access to an
unmapped page ends in SIGSEGV, just as it faults on a GPU. Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from djinn_lib.engine.memory.devices import host_memory
from djinn_lib.engine.memory.devices.address_space import (
    AddressSpace,
    Range,
    not_mapped,
    not_reserved,
)
from djinn_lib.errors import CapacityError, PlatformError
from djinn_lib.units import format_bytes

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0, 0x10, 0x4000, 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value


class CpuAddressSpace(AddressSpace):
    """Frames in one `memfd`, ranges by `mmap`. Linux only.

    Args:
        n_frames, page_bytes: how many frames of which size.
        frames: the exported descriptor of another process's frames; default is to make new ones.

    Raises:
        PlatformError: not Linux, or the kernel allows too few mappings for that many frames.
        CapacityError: the frames need more than `host_memory.host_bytes_available`.
    """

    device = torch.device("cpu")

    def __init__(self, n_frames: int, page_bytes: int, frames: Sequence[int] | None = None) -> None:
        self._fd = -1
        self._areas: dict[int, Range] = {}
        _require_memfd()
        super().__init__(n_frames, page_bytes)
        _require_mappings(n_frames)
        self._libc = _libc()
        if frames is None:
            self._make_frames()
        else:
            self._fd = os.dup(frames[0])

    def _make_frames(self) -> None:
        n_bytes = self.n_frames * self.page_bytes
        host_memory.require(n_bytes, "the ring", "lower the capacity")
        self._fd = os.memfd_create("djinn-frames", os.MFD_CLOEXEC)
        try:  # allocated now, so that no load pays for it and a lack of memory shows here
            os.posix_fallocate(self._fd, 0, n_bytes)
        except OSError as error:
            self.close()
            raise CapacityError(
                f"expected {format_bytes(n_bytes)} of host memory for the ring, got "
                f" {error.strerror}: free memory or lower the capacity"
            ) from error

    def granularity_bytes(self) -> int:
        """The page size of the operating system."""
        return mmap.PAGESIZE

    def reserve(self, n_pages: int) -> Range:
        """Reserve inaccessible addresses (`PROT_NONE`)."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        n_bytes = n_pages * self.page_bytes
        try:
            address = self._mmap(None, n_bytes, _PROT_NONE, flags, -1, 0)
        except OSError as error:
            raise not_reserved(n_bytes, error.strerror) from error
        area = self._areas[address] = Range(address, n_pages)
        return area

    def release(self, area: Range) -> None:
        """Unmap the whole range from the process."""
        if self._areas.pop(area.address, None):
            self._libc.munmap(area.address, area.n_pages * self.page_bytes)

    def map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map frames, one call for each run of neighbours."""
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        # Populated at once: otherwise the copy that follows takes a page fault every 4 KiB.
        flags = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE
        try:
            for index, frame, n_frames in _runs(frames):
                address = area.address + (first_page + index) * self.page_bytes
                n_bytes, offset = n_frames * self.page_bytes, frame * self.page_bytes
                self._mmap(address, n_bytes, prot, flags, self._fd, offset)
        except OSError as error:
            self.unmap(area, first_page, len(frames))
            raise not_mapped(len(frames), self.page_bytes, error.strerror) from error

    def unmap(self, area: Range, first_page: int, n_pages: int) -> None:
        """Put inaccessible memory in the place of the pages; the range stays reserved."""
        if not n_pages:
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        address = area.address + first_page * self.page_bytes
        try:
            self._mmap(address, n_pages * self.page_bytes, _PROT_NONE, flags, -1, 0)
        except OSError as error:  # a hole in a mapping makes two of it, and may be one too many
            raise PlatformError(
                f"expected {n_pages} pages of {format_bytes(self.page_bytes)} to be unmapped, got "
                f"{error.strerror}: use fewer, larger pages, or raise vm.max_map_count"
            ) from error

    def bytes_view(self, area: Range) -> torch.Tensor:
        """A tensor over the addresses; making it touches none of them."""
        buffer = (ctypes.c_uint8 * (area.n_pages * self.page_bytes)).from_address(area.address)
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def export(self) -> list[int]:
        """Return one descriptor, of the file that holds all frames."""
        return [os.dup(self._fd)]

    def close(self) -> None:
        """Unmap all ranges and close the file that holds the frames."""
        for area in list(self._areas.values()):
            self.release(area)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _mmap(
        self, address: int | None, n_bytes: int, prot: int, flags: int, fd: int, offset: int
    ) -> int:
        got = self._libc.mmap(address, n_bytes, prot, flags, fd, offset)
        if got == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return got


def _runs(frames: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, first frame, length) of each run of consecutive frame numbers."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or frames[i] != frames[i - 1] + 1:
            yield start, frames[start], i - start
            start = i


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size_t, c_int, void_p = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    libc.mmap.argtypes = [void_p, size_t, c_int, c_int, c_int, ctypes.c_int64]
    libc.mmap.restype = void_p
    libc.munmap.argtypes = [void_p, size_t]
    return libc


def _require_memfd() -> None:
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        raise PlatformError(
            f"expected Linux with memfd_create for the CPU backend, got {sys.platform}: "
            "run on Linux, or on a machine with an NVIDIA GPU use device='cuda'"
        )


def _require_mappings(n_frames: int) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if 2 * n_frames > limit:  # a mapped page may stand between two unmapped ones: two areas each
        raise PlatformError(
            f"expected at most {limit // 2} frames (half of vm.max_map_count), got {n_frames}: "
            "choose larger pages"
        )
