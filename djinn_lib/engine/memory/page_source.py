"""What the pager asks of the place where master copies of weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class PageSource(Protocol):
    """Master copies of packed models: in host memory (`SwapPool`), or on disk behind it."""

    def hold(self, model: str, lasting: bool = False) -> None:
        """Have all bytes of `model` in host memory, and keep them there until `let_go`.

        May take as long as reading them from disk does. Every call needs a `let_go`. `lasting` says
        that it will come at somebody else's will, not as soon as the caller is done.

        Raises:
            CapacityError: host memory does not allow it.
            DjinnError: they cannot be read.
        """
        ...

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Undo one `hold` of the same kind.

        Bytes that a copy still reads are guarded by `when_reused`.
        """
        ...

    def read(self, model: str, begin: int, end: int) -> torch.Tensor:
        """Bytes `begin` to `end` of a held model (1-d uint8, host), within one page of the pager.

        To be read only.
        """
        ...

    def when_reused(self, finish_copies: Callable[[str], None]) -> None:
        """Have `finish_copies(model)` called before memory of a model gets other content."""
        ...
