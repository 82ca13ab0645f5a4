"""The copies of consecutive pages of a model, queued a few at a time as they are mapped."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from djinn_lib.engine.memory.devices.base import Copier, Page, PageCopy, Stalls
from djinn_lib.errors import DjinnError


class Load:
    """Pages of a model on their way, from byte `first_byte` on.

    Computations wait for the first `n` bytes only, so the first layers compute while later ones are
    still copied. A page whose copy fails ends the load: pages before it are good, and those after
    it are of no use.

    Attributes:
        stalls: how long callers of `wait` were held up.
    """

    def __init__(self, copier: Copier, first_byte: int) -> None:
        self.first_byte, self.stalls = first_byte, Stalls()
        self._copier = copier
        self._copies: list[PageCopy] = []
        self._ends: list[int] = []  # the byte after each page
        self._n_good = 0  # pages known to be there

    def copy(self, pages: Sequence[Page]) -> None:
        """Queue the copies of the next pages, which are mapped; of none after one that failed."""
        for target, source in pages:
            if self.error:
                return
            begin = self._ends[-1] if self._ends else self.first_byte
            self._copies.append(self._copier.submit(target, source))
            self._ends.append(begin + target.numel())

    def wait(self, end_byte: int) -> None:
        """Hold the caller's computation until bytes up to `end_byte` are on the device.

        Called when all pages are queued. Bytes past the end of this load are ignored.

        Raises:
            DjinnError: the copy failed before it got that far; its cause is chained.
        """
        if end_byte <= self.first_byte or self._n_good == len(self._copies):
            return
        page = min(bisect_left(self._ends, end_byte), len(self._copies) - 1)
        self._copies[page].wait(self.stalls)  # those before it have ended by then
        if (error := self.error) and self.good_bytes < end_byte:
            raise copy_failed(f"weights up to byte {end_byte}", str(self.good_bytes), error)

    def block_until_ended(self) -> None:
        """Block the host until what is queued has ended, well or badly; never raises its error."""
        if self._copies:
            self._copies[-1].block_until_ended()

    @property
    def arrived(self) -> bool:
        """Whether all that is queued is on the device."""
        return self._count_good() == len(self._copies)

    @property
    def error(self) -> BaseException | None:
        """What ended it early, as far as is known; for certain when nothing is in flight."""
        n_good = self._count_good()
        return self._copies[n_good].error if n_good < len(self._copies) else None

    @property
    def good_bytes(self) -> int:
        """How many bytes from the start of the model are known to be on the device."""
        n_good = self._count_good()
        return self._ends[n_good - 1] if n_good else self.first_byte

    def _count_good(self) -> int:
        """Look how far the copies have come. Two threads that look at once find the same."""
        n_good = self._n_good
        while n_good < len(self._copies):
            if not self._copies[n_good].ended or self._copies[n_good].error:
                break
            n_good += 1
        self._n_good = n_good
        return n_good


def copy_failed(expected: str, got: str, cause: BaseException) -> DjinnError:
    """Return the error of a caller that waits for bytes that will not come."""
    error = DjinnError(
        f"expected {expected}, got {got}: the copy failed ({cause}); try the request again"
    )
    error.__cause__ = cause
    return error
