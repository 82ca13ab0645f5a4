"""Track the copies of consecutive pages of a model, queued a few at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from djinn_lib.engine.memory.devices.base import Copier, Page, PageCopy, Stalls
from djinn_lib.errors import DjinnError


class Load:
    """Copies of pages of a model, from byte `first_byte` on.

    A computation waits only for the bytes that it needs, so the first layers compute while later
    ones are copied. If the copy of a page fails, the load ends: earlier pages are valid, later ones
    are not used.

    Attributes:
        stalls: how long callers of `wait` had to wait.
    """

    def __init__(self, copier: Copier, first_byte: int) -> None:
        self.first_byte, self.stalls = first_byte, Stalls()
        self._copier = copier
        self._copies: list[PageCopy] = []
        self._ends: list[int] = []  # the byte after each page
        self._n_good = 0  # pages known to be loaded

    def copy(self, pages: Sequence[Page]) -> None:
        """Queue the copies of the next pages, which must be mapped; none after a failed copy."""
        for target, source in pages:
            if self.error:
                return
            begin = self._ends[-1] if self._ends else self.first_byte
            self._copies.append(self._copier.submit(target, source))
            self._ends.append(begin + target.numel())

    def wait(self, end_byte: int) -> None:
        """Make the caller's computation wait until bytes up to `end_byte` are on the device.

        Call it after all pages are queued. Bytes past the end of this load are ignored.

        Raises:
            DjinnError: the copy of an earlier page failed; the cause is chained.
        """
        if end_byte <= self.first_byte or self._n_good == len(self._copies):
            return
        page = min(bisect_left(self._ends, end_byte), len(self._copies) - 1)
        self._copies[page].wait(self.stalls)  # those before it have ended by then
        if (error := self.error) and self.good_bytes < end_byte:
            raise copy_failed(f"weights up to byte {end_byte}", str(self.good_bytes), error)

    def block_until_ended(self) -> None:
        """Block the host until all queued copies have ended; never raise their errors."""
        if self._copies:
            self._copies[-1].block_until_ended()

    @property
    def arrived(self) -> bool:
        """Whether all queued pages are on the device."""
        return self._count_good() == len(self._copies)

    @property
    def error(self) -> BaseException | None:
        """The error of the first failed copy that is known; reliable when none is in flight."""
        n_good = self._count_good()
        return self._copies[n_good].error if n_good < len(self._copies) else None

    @property
    def good_bytes(self) -> int:
        """Number of bytes from the start of the model that are known to be loaded."""
        n_good = self._count_good()
        return self._ends[n_good - 1] if n_good else self.first_byte

    def _count_good(self) -> int:
        """Count the pages that are loaded; safe for several threads at once."""
        n_good = self._n_good
        while n_good < len(self._copies):
            if not self._copies[n_good].ended or self._copies[n_good].error:
                break
            n_good += 1
        self._n_good = n_good
        return n_good


def copy_failed(expected: str, got: str, cause: BaseException) -> DjinnError:
    """Return the error to raise for bytes whose copy failed."""
    error = DjinnError(
        f"expected {expected}, got {got}: the copy failed ({cause}); try the request again"
    )
    error.__cause__ = cause
    return error
