"""A page of a compressed master, as copiers get it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from djinn_lib.engine.memory.compressed.form import Form
from djinn_lib.errors import DjinnError


@dataclass(frozen=True, slots=True)
class Compression:
    """How a page was compressed.

    Attributes:
        form: form of its compressed bytes.
        checksum: CRC-32 of its compressed bytes.
    """

    form: Form
    checksum: int


@dataclass(frozen=True, slots=True)
class CompressedPage:
    """The stored bytes of one page.

    Attributes:
        model, number: identify the page.
        pieces: its bytes, in order (1-d uint8, host); on a disk tier they may be in several frames.
        compression: how it is compressed; None for plain bytes.
    """

    model: str
    number: int
    pieces: tuple[torch.Tensor, ...]
    compression: Compression | None

    @property
    def n_bytes(self) -> int:
        """Number of stored bytes."""
        return sum(piece.numel() for piece in self.pieces)

    @property
    def stored(self) -> CompressedPage:
        """The same bytes, to be copied without decoding."""
        return replace(self, compression=None)

    def ensure_intact(self) -> None:
        """Compare compressed bytes with their checksum; plain bytes have none.

        Raises:
            DjinnError: they have changed.
        """
        checksum = 0
        for piece in self.pieces if self.compression else ():
            checksum = zlib.crc32(piece.numpy().data, checksum)
        if self.compression and checksum != self.compression.checksum:
            raise DjinnError(
                f"page {self.number} of {self.model!r} has changed in host memory (its checksum "
                "differs), so its weights are lost: remove the model and add it again; if it "
                "happens again, test the host's memory"
            )

    def copy_to(self, target: torch.Tensor) -> None:
        """Decode the page into CPU memory; or copy plain bytes to any device.

        Args:
            target: tensor of the size of the page; of `n_bytes` for plain bytes.

        Raises:
            DjinnError: the compressed bytes have changed.
        """
        if self.compression:
            # Here, because numba takes a second to import, and only compressed pages need it.
            from djinn_lib.engine.memory.compressed.decode import decode

            self.ensure_intact()
            words = target.view(torch.int16).numpy().view(np.uint16)
            decode(self._joined().numpy(), self.compression.form, words)
            return
        begin = 0
        for piece in self.pieces:
            target[begin : begin + piece.numel()].copy_(piece, non_blocking=True)
            begin += piece.numel()

    def _joined(self) -> torch.Tensor:
        first, *others = self.pieces
        return torch.cat(self.pieces) if others else first
