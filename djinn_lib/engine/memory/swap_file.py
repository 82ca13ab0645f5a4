"""Keep a master on disk.

The file is unlinked as soon as it is open. So it disappears with the process, and nobody can
replace it. Pages are read with `O_DIRECT`, bypassing the page cache, and their checksums are
compared.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch

from djinn_lib.engine.memory.layout import Fill, Layout, Shrink
from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.units import format_bytes

BLOCK_BYTES = 4096  # O_DIRECT needs offsets, lengths and addresses aligned to this
_MOST_BUFFERS = os.sysconf("SC_IOV_MAX")  # per call of preadv


class SwapFile:
    """A master on disk, in an unlinked file; its pages can only be read.

    Args:
        folder: folder of the file.
        layout: how the tensors are packed.
        page_bytes: size of a page; the last one is padded.
        fill: writes all tensors.
        shrink: compresses them in place; the file is cut to the result, and pages are those of
            the compressed bytes.

    Attributes:
        n_bytes: size of the stored bytes.

    Raises:
        ConfigError: the folder cannot be written to.
        CapacityError: the disk is full, or writing failed.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        page_bytes: int,
        fill: Fill,
        shrink: Shrink | None = None,
    ) -> None:
        self.layout, self.n_bytes, self._page_bytes = layout, layout.n_bytes, page_bytes
        path = _new_file(folder)
        try:
            size = self.n_pages * page_bytes
            _allocate(path, size)
            packed = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            fill(layout.views(packed))
            if shrink:
                self.n_bytes = shrink(packed)
            pages = packed.split(page_bytes)[: self.n_pages]
            self._checksums = [zlib.crc32(page.numpy().data) for page in pages]
            del packed, pages
            os.truncate(path, self.n_pages * page_bytes)
            self._fd = _open_direct(path)
        finally:
            path.unlink()
        try:
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # else it stays cached
        except OSError as error:
            self.close()
            raise CapacityError(
                f"expected {format_bytes(self.n_pages * page_bytes)} to be written to {folder}, "
                f"got {error.strerror}: check the disk, or choose another folder with swap_dir="
            ) from error

    @property
    def n_pages(self) -> int:
        """Number of stored pages."""
        return -(-self.n_bytes // self._page_bytes)

    def read(self, first_page: int, frames: list[torch.Tensor]) -> None:
        """Read consecutive pages into frames of their size.

        Raises:
            OSError: they cannot be read, or the file is too short.
            ValueError: they differ from what was written.
        """
        buffers = [frame.numpy().data for frame in frames]
        read_all(self._fd, buffers, first_page * self._page_bytes)
        for page, buffer in enumerate(buffers, start=first_page):
            if zlib.crc32(buffer) != self._checksums[page]:
                raise ValueError(f"page {page} has changed on disk (its checksum differs)")

    def close(self) -> None:
        """Free the disk space."""
        os.close(self._fd)


def read_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill buffers completely, with as many reads as needed.

    Raises:
        OSError: the file cannot be read, or is too short.
    """
    n_bytes, done, left = sum(map(len, buffers)), 0, deque(buffers)
    with ExitStack() as opened:
        source = fd
        while left:
            n_read = os.preadv(source, list(islice(left, _MOST_BUFFERS)), offset + done)
            if not n_read:
                raise OSError(f"expected {n_bytes} bytes, got {done}: the file was cut short")
            done += n_read
            while left and n_read >= len(left[0]):
                n_read -= len(left.popleft())
            if n_read:
                left[0] = left[0][n_read:]
            if done % BLOCK_BYTES and source == fd:  # O_DIRECT cannot read an unaligned rest
                source = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
                opened.callback(os.close, source)


def _new_file(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix="djinn-", suffix=".swap", dir=folder)
    except OSError as error:
        raise ConfigError(
            f"expected a swap folder that can be written to, got {folder} ({error.strerror}): "
            "choose another one with swap_dir="
        ) from error
    os.close(fd)
    return Path(name)


def _allocate(path: Path, n_bytes: int) -> None:
    """Reserve the disk space: writing to a full disk through a mapping kills the process."""
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of disk space in {path.parent}, got "
            f"{error.strerror}: free space or choose another folder with swap_dir="
        ) from error


def _open_direct(path: Path) -> int:
    """Open for direct reads; through the page cache if the file system lacks O_DIRECT."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)
