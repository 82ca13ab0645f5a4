"""Masters that are stored compressed, in host memory or on a disk tier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from djinn_lib.engine.memory.compressed.compress import Index, compress_model, estimated_bytes
from djinn_lib.engine.memory.compressed.page import CompressedPage
from djinn_lib.engine.memory.devices.base import Source
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES, Fill, Layout, Report, say_nothing
from djinn_lib.engine.memory.masters import MasterBytes, Store
from djinn_lib.errors import ConfigError

WORTHWHILE = 0.95  # "auto" compresses a model to at most this share of its bytes, or not at all


class CompressedMasters:
    """`Masters` that a store keeps compressed, page by page; pages that do not shrink stay plain.

    Args:
        store: keeps the compressed bytes.
        page_bytes: size of a page of the pager.
        if_worthwhile: leave models plain that get smaller by less than 5%.

    Raises:
        ConfigError: pages of that size cannot be compressed.
    """

    def __init__(self, store: Store, page_bytes: int, if_worthwhile: bool = False) -> None:
        if page_bytes % ALIGNMENT_BYTES:  # so each page has bytes of a tensor
            raise ConfigError(
                f"expected pages of a multiple of {ALIGNMENT_BYTES} bytes for compressed masters, "
                f"got {page_bytes}: choose another page size, or masters='plain'"
            )
        self._store, self._page_bytes = store, page_bytes
        self._if_worthwhile = if_worthwhile
        self._compressed: dict[str, Index] = {}  # of those that are

    @property
    def n_bytes(self) -> int:
        """Host memory of all masters in bytes."""
        return self._store.n_bytes

    def add(self, model: str, layout: Layout, fill: Fill, report: Report = say_nothing) -> None:
        """Make and compress the master of `model`; see `Masters.add`.

        Until it is compressed, it takes its plain bytes.
        """
        made: list[Index] = []

        def shrink(buffer: torch.Tensor) -> int:
            if self._if_worthwhile:
                estimate = estimated_bytes(buffer, layout, self._page_bytes)
                if estimate > WORTHWHILE * layout.n_bytes:
                    return layout.n_bytes
            made.append(compress_model(buffer, layout, self._page_bytes, report))
            self._compressed[model] = made[0]  # before others can read it from the store
            return made[0].n_bytes

        try:
            self._store.add(model, layout, fill, report, shrink)
        except BaseException:
            if made:
                del self._compressed[model]
            raise

    def discard(self, model: str) -> None:
        """Free the master of `model`, if there is one."""
        self._store.discard(model)
        self._compressed.pop(model, None)

    def layout(self, model: str) -> Layout:
        """Return how the tensors of `model` are packed in its decoded pages."""
        return self._store.layout(model)

    def hold(self, model: str, lasting: bool = False) -> None:
        """Read all bytes of `model` into host memory; see `Masters.hold`."""
        self._store.hold(model, lasting)

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Undo one `hold` of the same kind."""
        self._store.let_go(model, lasting)

    def read(self, model: str, begin: int, end: int) -> Source:
        """Return the page of a held model that consists of bytes `begin` to `end`.

        Raises:
            ConfigError: these bytes are not one page.
        """
        if (index := self._compressed.get(model)) is None:
            return self._store.read(model, begin, end)
        number, offset = divmod(begin, self._page_bytes)
        if offset or end != min(begin + self._page_bytes, index.paged_bytes):
            raise ConfigError(
                f"expected one page of {self._page_bytes} bytes of {model!r}, got bytes {begin} to "
                f"{end}: read compressed masters by the page size that they were opened with"
            )
        page = index.pages[number]
        pieces = self._store.pieces(model, page.begin, page.begin + page.n_bytes)
        if page.compression is None and len(pieces) == 1:
            return pieces[0]
        return CompressedPage(model, number, pieces, page.compression)

    def tables(self, model: str, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the lookup tables of `model`, which are never compressed."""
        index = self._compressed.get(model)
        return self._store.tables(model, device, index.moved_by if index else 0)

    def when_reused(self, block_until_copied: Callable[[str], None]) -> None:
        """Register a function to call before memory of a model gets other content."""
        self._store.when_reused(block_until_copied)

    def sha256(self, model: str) -> str:
        """Return the hash of the decoded bytes, which equals that of a plain master.

        Raises:
            DjinnError: compressed bytes have changed.
        """
        if (index := self._compressed.get(model)) is None:
            return self._store.sha256(model)
        digest, decoded = hashlib.sha256(), torch.empty(self._page_bytes, dtype=torch.uint8)
        first_table = index.paged_bytes - index.moved_by
        self.hold(model)
        try:
            for begin in range(0, index.paged_bytes, self._page_bytes):
                end = min(begin + self._page_bytes, index.paged_bytes)
                page = self.read(model, begin, end)
                if isinstance(page, CompressedPage):
                    page.copy_to(plain := decoded[: end - begin])
                    page = plain
                digest.update(page.numpy().data)
            if first_table < index.n_bytes:
                for piece in self._store.pieces(model, first_table, index.n_bytes):
                    digest.update(piece.numpy().data)
        finally:
            self.let_go(model)
        return digest.hexdigest()

    def sizes(self) -> dict[str, MasterBytes]:
        """Return the size of each master, plain and as it is stored."""
        return self._store.sizes()

    def close(self) -> None:
        """Free all masters."""
        self._store.close()
        self._compressed.clear()
