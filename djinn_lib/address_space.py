"""Virtual addresses for weights: reserve a range once, then map and unmap frames under it.

This is the only file that knows how a backend does it. A tensor over a range keeps its address for
life, whichever frames lie under it, so parameters are bound once and never again.

On the CPU the frames are one anonymous file in memory (`memfd_create(2)`), a range is
`mmap(PROT_NONE)`, and mapping a page is `mmap(MAP_FIXED | MAP_SHARED)` of the frame's offset in
that file. An access to an unmapped page ends in SIGSEGV, just as it faults on a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from djinn_lib.errors import CapacityError, ConfigError, PlatformError
from djinn_lib.units import format_bytes


@dataclass(frozen=True, slots=True)
class Range:
    """A reserved range of virtual addresses: `n_pages` pages from `address` on."""

    address: int
    n_pages: int


class AddressSpace(ABC):
    """`n_frames` physical frames of `page_bytes` each, and ranges to map them into."""

    device: torch.device

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        granularity = self.granularity_bytes()
        if page_bytes < granularity or page_bytes % granularity:
            raise ConfigError(
                f"expected pages of a multiple of {granularity} bytes on this device, "
                f"got {page_bytes}"
            )
        self.n_frames = n_frames
        self.page_bytes = page_bytes

    @staticmethod
    @abstractmethod
    def granularity_bytes() -> int:
        """The smallest page size; every page size is a multiple of it."""

    @abstractmethod
    def reserve(self, n_pages: int) -> Range:
        """Reserve addresses for `n_pages` pages; nothing is mapped."""

    @abstractmethod
    def release(self, area: Range) -> None:
        """Give a range back, mapped or not. Tensors over it must not be used any more."""

    @abstractmethod
    def map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map `frames[i]` at page `first_page + i`. A failure leaves those pages unmapped."""

    @abstractmethod
    def unmap(self, area: Range, first_page: int, n_pages: int) -> None:
        """Unmap pages; the caller has made sure that nothing on the device still reads them."""

    @abstractmethod
    def bytes_view(self, area: Range) -> torch.Tensor:
        """The whole range as a 1-d uint8 tensor; valid for life, readable where mapped."""

    @abstractmethod
    def close(self) -> None:
        """Release every range and frame; closing twice is harmless."""


_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0, 0x10, 0x4000, 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value


class CpuAddressSpace(AddressSpace):
    """Frames in one `memfd`, ranges by `mmap`. Linux only.

    Raises:
        PlatformError: not Linux, or the kernel allows too few mappings for that many frames.
        CapacityError: less memory is free than the frames need.
    """

    device = torch.device("cpu")

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        self._fd = -1
        self._areas: dict[int, Range] = {}
        _require_memfd()
        super().__init__(n_frames, page_bytes)
        _require_mappings(n_frames)
        _require_free_memory(n_frames * page_bytes)
        self._libc = _libc()
        self._fd = os.memfd_create("djinn-frames", os.MFD_CLOEXEC)
        try:  # allocated now, so that no load pays for it and a lack of memory shows here
            os.posix_fallocate(self._fd, 0, n_frames * page_bytes)
        except OSError as error:
            self.close()
            raise CapacityError(
                f"expected {format_bytes(n_frames * page_bytes)} of memory for the frames, "
                f"got {error.strerror}: lower the capacity"
            ) from error

    @staticmethod
    def granularity_bytes() -> int:
        """The page size of the operating system."""
        return mmap.PAGESIZE

    def reserve(self, n_pages: int) -> Range:
        """Reserve inaccessible addresses (`PROT_NONE`)."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = self._mmap(None, n_pages * self.page_bytes, _PROT_NONE, flags, -1, 0)
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
        except PlatformError:
            self.unmap(area, first_page, len(frames))
            raise

    def unmap(self, area: Range, first_page: int, n_pages: int) -> None:
        """Put inaccessible memory in the place of the pages; the range stays reserved."""
        if n_pages:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
            address = area.address + first_page * self.page_bytes
            self._mmap(address, n_pages * self.page_bytes, _PROT_NONE, flags, -1, 0)

    def bytes_view(self, area: Range) -> torch.Tensor:
        """A tensor over the addresses; making it touches none of them."""
        buffer = (ctypes.c_uint8 * (area.n_pages * self.page_bytes)).from_address(area.address)
        return torch.frombuffer(buffer, dtype=torch.uint8)

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
            raise PlatformError(
                f"expected mmap of {format_bytes(n_bytes)} to succeed, got "
                f"{os.strerror(ctypes.get_errno())}: free memory or use fewer, larger pages"
            )
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


def _require_free_memory(n_bytes: int) -> None:
    import psutil  # not needed on a GPU

    available = psutil.virtual_memory().available
    if n_bytes > available:
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of free memory for the ring, got "
            f"{format_bytes(available)}: lower the capacity or end other programs"
        )


def open_address_space(device: torch.device, n_frames: int, page_bytes: int) -> AddressSpace:
    """Return the address space of a device.

    Raises:
        ConfigError: no backend for that kind of device.
    """
    if device.type == "cpu":
        return CpuAddressSpace(n_frames, page_bytes)
    raise ConfigError(f"expected device 'cpu', got {str(device)!r}")
