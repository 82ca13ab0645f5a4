"""Running a model that is larger than the ring: its layers take turns in a window of frames.

The first pages of the model, its *prefix*, stay like those of any other model. The frames of the
*window* are mapped many times, at every page of the rest that may come to lie in them: page `p` of
the rest is at home in slot `p mod n_slots`, whatever pass it is. So nothing is mapped while the
model runs; pages are copied in the order of execution, each as soon as the layers that read the
last page of its slot have been computed, and the link is never idle while the device computes.

What several layers share comes first in a packed model. It has to lie in the prefix: a layer finds
all its pages in place then, wherever its own weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from djinn_lib.engine.memory.devices.base import Copier, PageCopy, Source
from djinn_lib.engine.memory.layout import Extents
from djinn_lib.engine.memory.lease import Tally
from djinn_lib.engine.memory.load import copy_failed
from djinn_lib.errors import CapacityError, ConfigError
from djinn_lib.units import format_bytes


@dataclass(frozen=True, slots=True)
class Window:
    """How a model of `n_pages` uses fewer frames: a prefix stays, the rest takes turns in slots."""

    n_pages: int
    n_prefix: int
    n_slots: int
    page_bytes: int

    @classmethod
    def plan(cls, n_bytes: int, units: Sequence[Extents], n_frames: int, page_bytes: int) -> Window:
        """Use all of `n_frames`: for the longest prefix that leaves room for two units in a row.

        Args:
            n_bytes: of the model.
            units: the bytes that each of its units needs.
            n_frames: in the ring; fewer than the model has pages.
            page_bytes: size of a page and a frame.

        Raises:
            CapacityError: what units share and two that follow each other do not fit together.
        """
        # With a shorter prefix no window is smaller. So a prefix that leaves too few slots can only
        # be replaced by one that leaves as many as it asks for, or by an even shorter one.
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
        """How many frames the model takes when it runs."""
        return self.n_prefix + self.n_slots

    @property
    def n_tail(self) -> int:
        """How many pages are copied in each forward pass."""
        return self.n_pages - self.n_prefix

    def turn(self, extents: Extents) -> tuple[int, int] | None:
        """First page of the rest, and the page after the last, that a unit needs; None for none.

        Raises:
            ConfigError: more than the window holds; no unit that was planned for needs as much.
        """
        pages = _beyond(extents, self.n_prefix, self.page_bytes)
        if pages and pages[1] - pages[0] > self.n_slots:
            raise ConfigError(
                f"expected weights within {self.n_slots} pages, as the window has, got "
                f"{pages[1] - pages[0]}: raise the capacity, so that the whole model fits"
            )
        return pages and (pages[0] - self.n_prefix, pages[1] - self.n_prefix)

    def homes(self, first_slot: int, n_slots: int) -> list[tuple[int, int]]:
        """Where frames of the window are mapped, as (first page, number of pages)."""
        first = range(self.n_prefix + first_slot, self.n_pages, self.n_slots)
        return [(page, min(n_slots, self.n_pages - page)) for page in first]


def _beyond(extents: Extents, n_prefix: int, page_bytes: int) -> tuple[int, int] | None:
    """First page, and the page after the last, that extents need beyond a prefix."""
    pages = [(begin // page_bytes, -(-end // page_bytes)) for begin, end in extents]
    if not (rest := [(first, last) for first, last in pages if last > n_prefix]):
        return None
    return max(n_prefix, rest[0][0]), rest[-1][1]


def _n_slots(units: Sequence[Extents], n_prefix: int, page_bytes: int) -> int:
    """How many slots units need beyond a prefix, alone and with the one that follows."""
    turns = sorted({pages for unit in units if (pages := _beyond(unit, n_prefix, page_bytes))})
    alone = [last - first for first, last in turns]
    in_a_row = [max(a[1], b[1]) - a[0] for a, b in pairwise(turns)]
    return max(alone + in_a_row, default=1)


def _prefixes(units: Sequence[Extents], page_bytes: int) -> list[int]:
    """Prefixes, in pages, after which units need a smaller window."""
    return [0, *{-(-end // page_bytes) for unit in units for _, end in unit}]


class Rotation:
    """Which pages of the rest are in the window, and which are to be copied next.

    Positions count pages of the rest for ever: position `q` is page `q mod n_tail` of it. The
    window holds positions from `begin` (still needed) to `end` (submitted last). Pure bookkeeping.
    """

    def __init__(self, n_tail: int, n_slots: int) -> None:
        self.n_tail, self.n_slots = n_tail, n_slots
        self.begin = self.end = 0

    def need(self, first: int, last: int) -> tuple[int, int]:
        """Turn to a unit of pages `first` up to `last` of the rest; returns their positions.

        What came before it has been computed, and so may be overwritten.
        """
        position = self.begin + (first - self.begin) % self.n_tail
        self.begin = position
        self.end = max(self.end, position)
        return position, position + last - first

    def skip_to(self, position: int) -> None:
        """Everything before `position` has been computed."""
        self.begin = max(self.begin, position)
        self.end = max(self.end, self.begin)

    def take(self) -> int | None:
        """Return the next position that can be copied, as its slot is free; None if there is none.

        The page that lay in the slot before is the one `n_slots` pages earlier in the same pass, or
        the last one of the pass before that is at home there.
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
    """The rest of one model on its way through the window.

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
        """Hold the caller's computation until the bytes of a unit are in their places.

        What the unit before needed may be overwritten from now on.

        Raises:
            DjinnError: a copy failed; the request can be tried again.
        """
        if turn := self._window.turn(extents):
            self._last = self.rotation.need(*turn)
        else:  # it needs nothing of the window, but what was needed is done with
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
        """Block the host until no copy is in flight; never raises a copy's error."""
        for page_copy in tuple(self._copies.values()):  # another thread may let go of some
            page_copy.block_until_ended()

    def reset(self) -> None:
        """Forget what is in the window, when no copy is in flight: others may get its frames."""
        self.block_until_ended()
        self._copies.clear()
        self.rotation.reset()
        self._last = (0, 0)
