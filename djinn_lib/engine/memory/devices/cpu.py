"""The backend of the CPU: frames in one `memfd`, mappings by `mmap`, copies by a thread.

The frames are one anonymous file in memory (`memfd_create(2)`), a range is `mmap(PROT_NONE)`, and
mapping a page is `mmap(MAP_FIXED | MAP_SHARED)` of the frame's offset in that file. An access to an
unmapped page causes SIGSEGV, as it causes a fault on a GPU. Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from djinn_lib.engine.memory.devices import base, host
from djinn_lib.engine.memory.devices.base import (
    AddressSpace,
    Copier,
    PageCopy,
    Range,
    Refused,
    Source,
    Stalls,
)
from djinn_lib.errors import CapacityError, PlatformError
from djinn_lib.units import format_bytes

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0, 0x10, 0x4000, 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value
_INACCESSIBLE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class CpuAddressSpace(AddressSpace):
    """Frames in one `memfd`, ranges by `mmap`. Linux only.

    Args:
        n_frames, page_bytes: number and size of the frames.
        frames: the exported descriptor of another process's frames; default is to make new ones.

    Raises:
        PlatformError: not Linux, or the kernel allows too few mappings for that many frames.
        CapacityError: the frames need more than `host.host_bytes_available`.
    """

    device = torch.device("cpu")

    def __init__(self, n_frames: int, page_bytes: int, frames: Sequence[int] | None = None) -> None:
        self._fd = -1
        _require_memfd()
        super().__init__(n_frames, page_bytes)
        if frames is None:  # first, because larger pages do not help here
            host.require(n_frames * page_bytes, "the ring", "lower the capacity")
        _require_mappings(n_frames)
        self._libc = _libc()
        if frames is None:
            self._make_frames()
        else:
            self._fd = os.dup(frames[0])

    def _make_frames(self) -> None:
        n_bytes = self.n_frames * self.page_bytes
        self._fd = os.memfd_create("djinn-frames", os.MFD_CLOEXEC)
        try:  # allocate now, so loads are not slower and a lack of memory is an error here
            os.posix_fallocate(self._fd, 0, n_bytes)
        except OSError as error:
            self.close()
            raise CapacityError(
                f"expected {format_bytes(n_bytes)} of host memory for the ring, got "
                f"{error.strerror}: free memory or lower the capacity"
            ) from error

    def granularity_bytes(self) -> int:
        """The page size of the operating system."""
        return mmap.PAGESIZE

    def _reserve(self, n_bytes: int) -> int:
        return self._mmap(None, n_bytes, _PROT_NONE, _INACCESSIBLE, -1, 0)

    def _release(self, area: Range, pages: Sequence[int]) -> None:
        self._libc.munmap(area.address, area.n_pages * self.page_bytes)

    def _map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map frames, with one call for each run of consecutive frames."""
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        # Populate at once: otherwise the copy causes a page fault every 4 KiB.
        flags = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE
        for index, frame, n_frames in _runs(frames):
            page = first_page + index
            address, offset = area.address + page * self.page_bytes, frame * self.page_bytes
            self._mmap(address, n_frames * self.page_bytes, prot, flags, self._fd, offset)
            self._mapped[area.address].update(range(page, page + n_frames))

    def _unmap(self, area: Range, pages: Sequence[int]) -> None:
        """Replace the pages by inaccessible memory; the range stays reserved."""
        for _, page, n_pages in _runs(pages):
            address, n_bytes = area.address + page * self.page_bytes, n_pages * self.page_bytes
            try:
                self._mmap(address, n_bytes, _PROT_NONE, _INACCESSIBLE | _MAP_FIXED, -1, 0)
            except Refused as error:  # a hole splits a mapping in two, which may be one too many
                raise PlatformError(
                    f"expected {n_pages} pages of {format_bytes(self.page_bytes)} to be unmapped, "
                    f"got {error}: use fewer, larger pages, or raise vm.max_map_count"
                ) from error
            self._mapped[area.address].difference_update(range(page, page + n_pages))

    def bytes_view(self, area: Range) -> torch.Tensor:
        """Return a tensor over the addresses, without an access to them."""
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
            raise Refused(os.strerror(ctypes.get_errno()))
        return got


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, first number, length) of each run of consecutive numbers."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield start, numbers[start], i - start
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
    if 2 * n_frames > limit:  # mapped and unmapped pages may alternate: two mappings a page
        raise PlatformError(
            f"expected at most {limit // 2} frames (half of vm.max_map_count), got {n_frames}: "
            "choose larger pages"
        )


class ThreadCopy(PageCopy):
    """A copy by a host thread."""

    def __init__(self, copied: Future[None]) -> None:
        self._copied = copied

    @property
    def ended(self) -> bool:
        """Whether the thread has finished the page."""
        return self._copied.done()

    @property
    def error(self) -> BaseException | None:
        """Why it failed; known once the thread has finished the page."""
        return self._copied.exception() if self._copied.done() else None

    def wait(self, stalls: Stalls) -> None:
        """Block: on the CPU the computation runs in the calling thread."""
        if not self._copied.done():
            begin_s = time.perf_counter()
            self._copied.exception()
            stalls.add(time.perf_counter() - begin_s)

    def block_until_ended(self) -> None:
        """Block until the thread has finished the page."""
        self._copied.exception()


class ThreadCopier(Copier):
    """Copies with one background thread; torch and numpy release the interpreter lock meanwhile."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="djinn-copier")

    def submit(self, target: torch.Tensor, source: Source, after: Any = None) -> ThreadCopy:
        """Queue the page for the thread; computations before this call have ended."""
        return ThreadCopy(self._thread.submit(base.copy_page, target, source))

    def mark(self) -> None:
        """Do nothing: on the CPU a computation ends with its call."""

    def fence(self) -> Callable[[], None]:
        """Return a function that does nothing."""
        return lambda: None

    def close(self) -> None:
        """Finish queued copies and end the thread."""
        self._thread.shutdown()
