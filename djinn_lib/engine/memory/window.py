"""Run a model that is larger than the ring: its layers take turns in a window of frames.

The first pages of the model, its *prefix*, stay resident, as those of any other model. The other
pages, the *tail*, share the frames of the *window*. Page `p` of the tail always uses slot
`p mod n_slots`, so the frame of a slot is mapped at the addresses of all pages that use it, and
nothing is mapped while the model runs. Pages are copied in the order of execution. Each copy starts
as soon as the layers that read the previous page of its slot have been computed, so the link is
never idle while the device computes.

Weights that several layers share come first in a packed model. They must lie in the prefix, so
every layer finds them loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from djinn_lib.engine.memory.devices.base import Copier, PageCopy, Source
from djinn_lib.engine.memory.interrupts import held_back
from djinn_lib.engine.memory.layout import Extents
from djinn_lib.engine.memory.lease import Tally
from djinn_lib.engine.memory.load import copy_failed
from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.units import format_bytes


@dataclass(frozen=True, slots=True)
class Window:
    """Plan for a model of `n_pages` in fewer frames: a prefix stays, the tail uses slots."""

    n_pages: int
    n_prefix: int
    n_slots: int
    page_bytes: int

    @classmethod
    def plan(cls, n_bytes: int, units: Sequence[Extents], n_frames: int, page_bytes: int) -> Window:
        """Plan for `n_frames`: the longest prefix that leaves room for two consecutive units.

        Args:
            n_bytes: size of the model.
            units: the bytes that each of its units needs.
            n_frames: frames in the ring; fewer than the model has pages.
            page_bytes: size of a page and a frame.

        Raises:
            CapacityError: shared weights and two consecutive units do not fit together.
        """
        # A shorter prefix never needs fewer slots. So if a prefix leaves too few slots, the next
        # candidate is the one that leaves as many as this one needs.
        n_prefix = n_frames - 1
        while n_prefix >= 0:
            n_slots = _n_slots(units, n_prefix, page_bytes)
            if n_prefix + n_slots <= n_frames:
                n_pages = -(-n_bytes // page_bytes)
                return cls(n_pages, n_prefix, n_frames - n_prefix, page_bytes)
            n_prefix = n_frames - n_slots
        needed = min(p + _n_slots(units, p, page_bytes) for p in _prefixes(units, page_bytes))
        raise CapacityError(
            f"expected room for the two largest layers in a row and for what layers share, "
            f"{format_bytes(needed * page_bytes)}, got a ring of "
            f"{format_bytes(n_frames * page_bytes)}: raise the capacity or choose smaller pages"
        )

    @property
    def n_frames(self) -> int:
        """Number of frames that the model uses when it runs."""
        return self.n_prefix + self.n_slots

    @property
    def n_tail(self) -> int:
        """Number of pages that each forward pass copies."""
        return self.n_pages - self.n_prefix

    def turn(self, extents: Extents) -> tuple[int, int] | None:
        """Return the tail pages that a unit needs, as (first, after the last), or None.

        Raises:
            ConfigError: it needs more pages than the window holds, so it was not planned for.
        """
        pages = _beyond(extents, self.n_prefix, self.page_bytes)
        if pages and pages[1] - pages[0] > self.n_slots:
            raise ConfigError(
                f"expected weights within {self.n_slots} pages, as the window has, got "
                f"{pages[1] - pages[0]}: raise the capacity, so that the whole model fits"
            )
        return pages and (pages[0] - self.n_prefix, pages[1] - self.n_prefix)

    def homes(self, first_slot: int, n_slots: int) -> list[tuple[int, int]]:
        """Return where frames of the window are mapped, as (first page, number of pages)."""
        first = range(self.n_prefix + first_slot, self.n_pages, self.n_slots)
        return [(page, min(n_slots, self.n_pages - page)) for page in first]


def _beyond(extents: Extents, n_prefix: int, page_bytes: int) -> tuple[int, int] | None:
    """Return the first page that extents need beyond a prefix, and the page after the last."""
    pages = [(begin // page_bytes, -(-end // page_bytes)) for begin, end in extents]
    if not (rest := [(first, last) for first, last in pages if last > n_prefix]):
        return None
    return max(n_prefix, rest[0][0]), rest[-1][1]


def _n_slots(units: Sequence[Extents], n_prefix: int, page_bytes: int) -> int:
    """Return how many slots units need beyond a prefix, alone and with the next unit."""
    turns = sorted({pages for unit in units if (pages := _beyond(unit, n_prefix, page_bytes))})
    alone = [last - first for first, last in turns]
    in_a_row = [max(a[1], b[1]) - a[0] for a, b in pairwise(turns)]
    return max(alone + in_a_row, default=1)


def _prefixes(units: Sequence[Extents], page_bytes: int) -> list[int]:
    """Return the lengths of prefixes, in pages, at which units may need a smaller window."""
    return [0, *{-(-end // page_bytes) for unit in units for _, end in unit}]


class Rotation:
    """Track which pages of the tail are in the window, and which to copy next.

    Positions count pages over all forward passes: position `q` is page `q mod n_tail` of the tail.
    The window holds positions from `begin` (the first still needed) to `end` (after the last one
    submitted). This is only bookkeeping.
    """

    def __init__(self, n_tail: int, n_slots: int) -> None:
        self.n_tail, self.n_slots = n_tail, n_slots
        self.begin = self.end = 0

    def need(self, first: int, last: int) -> tuple[int, int]:
        """Move to a unit of pages `first` up to `last` of the tail; return their positions.

        Earlier units have been computed, so their pages may be overwritten.
        """
        position = self.begin + (first - self.begin) % self.n_tail
        self.begin = position
        self.end = max(self.end, position)
        return position, position + last - first

    def skip_to(self, position: int) -> None:
        """Note that everything before `position` has been computed."""
        self.begin = max(self.begin, position)
        self.end = max(self.end, self.begin)

    def take(self) -> int | None:
        """Return the next position whose slot is free; None if there is none.

        The previous page in the slot is the one `n_slots` pages earlier in the same pass, or else
        the last page of the previous pass that uses the slot.
        """
        page = self.end % self.n_tail
        if page >= self.n_slots:
            before = self.end - self.n_slots
        else:
            last_page = page + (self.n_tail - 1 - page) // self.n_slots * self.n_slots
            before = self.end - page - self.n_tail + last_page
        if before >= self.begin:
            return None
        self.end += 1
        return self.end - 1

    def reset(self) -> None:
        """Forget what is in the window."""
        self.begin = self.end = 0

    def check(self) -> None:
        """Audit the state; raises `AssertionError` when two needed pages share a slot."""
        slots = [q % self.n_tail % self.n_slots for q in range(self.begin, self.end)]
        if len(set(slots)) != len(slots):
            raise AssertionError(f"rotation broken: positions {self.begin} to {self.end} collide")


class Streamed:
    """Copies the tail of one model through the window.

    Attributes:
        tally: what is copied and waited for; replaced with each lease.
        rotation: which pages are in the window.

    Args:
        window: of the model.
        n_bytes: of the model.
        view: its range of addresses (1-d uint8, device).
        read: gives bytes of its master copy (see `Masters.read`).
        copier: of the device.
    """

    def __init__(
        self,
        window: Window,
        n_bytes: int,
        view: torch.Tensor,
        read: Callable[[int, int], Source],
        copier: Copier,
    ) -> None:
        self._window, self._n_bytes, self._view, self._read = window, n_bytes, view, read
        self._copier = copier
        self.rotation = Rotation(window.n_tail, window.n_slots)
        self._copies: dict[int, PageCopy] = {}
        self._last: tuple[int, int] = (0, 0)  # positions of the unit that is being computed
        self.tally = Tally()

    def wait(self, extents: Extents) -> None:
        """Make the caller's computation wait until the bytes of a unit are loaded.

        The pages of the previous unit may be overwritten from now on.

        Raises:
            DjinnError: a copy failed; the request can be tried again.
        """
        if turn := self._window.turn(extents):
            self._last = self.rotation.need(*turn)
        else:  # it needs no page of the window, but the previous unit is done
            self.rotation.skip_to(self._last[1])
            self._last = (self.rotation.begin, self.rotation.begin)
        try:
            self._submit()
            for position in range(*self._last):
                self._copies[position].wait(self.tally.stalls)
                if error := self._copies[position].error:
                    raise copy_failed("a page of weights", "none", error)
        except BaseException:
            self.reset()
            raise

    @held_back()
    def _submit(self) -> None:
        for position in [q for q in self._copies if q < self.rotation.begin]:
            del self._copies[position]
        mark = self._copier.mark()
        while (position := self.rotation.take()) is not None:
            page = self._window.n_prefix + position % self._window.n_tail
            begin = page * self._window.page_bytes
            end = min(begin + self._window.page_bytes, self._n_bytes)
            source = self._read(begin, end)
            self._copies[position] = self._copier.submit(self._view[begin:end], source, mark)
            self.tally.loaded_bytes += end - begin

    def block_until_ended(self) -> None:
        """Block the host until no copy is in flight; never raise the error of a copy."""
        for page_copy in tuple(self._copies.values()):  # another thread may remove some
            page_copy.block_until_ended()

    @held_back()
    def reset(self) -> None:
        """Wait for copies, then forget the content of the window; its frames are free to use."""
        self.block_until_ended()
        self._copies.clear()
        self.rotation.reset()
        self._last = (0, 0)
