"""A master copy on disk.

The file's name is removed as soon as it is open, so that nothing is left behind whatever happens to
the process, and nobody can replace it. Pages are read past the page cache (`O_DIRECT`), and their
checksums are compared.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path

import torch

from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.swap_pool import Fill, Layout
from djinn_lib.units import format_bytes

BLOCK_BYTES = 4096  # what O_DIRECT asks offsets, lengths and addresses to be multiples of


class SwapFile:
    """A master on disk, without a name; its pages can be read and nothing else.

    Args:
        folder: where it is written.
        layout: how the tensors are packed.
        page_bytes: size of a page; the last one is padded.
        fill: writes all tensors.

    Raises:
        ConfigError: the folder cannot be written to.
        CapacityError: the disk is full.
    """

    def __init__(self, folder: Path, layout: Layout, page_bytes: int, fill: Fill) -> None:
        self.layout, self._page_bytes = layout, page_bytes
        n_pages = -(-layout.n_bytes // page_bytes)
        path = _new_file(folder)
        try:
            _allocate(path, n_pages * page_bytes)
            packed = torch.from_file(
                str(path), shared=True, size=n_pages * page_bytes, dtype=torch.uint8
            )
            fill(layout.views(packed))
            self._checksums = [
                zlib.crc32(page.numpy().data) for page in packed.view(n_pages, page_bytes)
            ]
            del packed
            self._fd = _open_direct(path)
        finally:
            path.unlink()
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # or it would stay in memory

    def read(self, first_page: int, frames: list[torch.Tensor]) -> None:
        """Read consecutive pages into frames of their size.

        Raises:
            OSError: they cannot be read, or are cut short.
            ValueError: they are not what was written.
        """
        buffers = [frame.numpy().data for frame in frames]
        got = os.preadv(self._fd, buffers, first_page * self._page_bytes)
        if got != len(frames) * self._page_bytes:
            raise OSError(f"expected {len(frames) * self._page_bytes} bytes, got {got}")
        for page, buffer in enumerate(buffers, start=first_page):
            if zlib.crc32(buffer) != self._checksums[page]:
                raise ValueError(f"page {page} has changed on disk (its checksum differs)")

    def close(self) -> None:
        """Give the disk space back."""
        os.close(self._fd)


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
    """Reserve the disk space now: writing through a mapping to a full disk ends the process."""
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of disk space in {path.parent}, got "
            f"{error.strerror}: free space or choose another folder with swap_dir="
        ) from error


def _open_direct(path: Path) -> int:
    """Open for reading past the page cache; through it where the file system cannot do that."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)
