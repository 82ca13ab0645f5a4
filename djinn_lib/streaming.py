"""Running a model that is larger than the ring: its layers take turns in a window of frames.

The first pages of the model, its *prefix*, stay like those of any other model. The frames of the
*window* are mapped many times, at every page of the rest that may come to lie in them: page `p` of
the rest is at home in slot `p mod n_slots`, whatever pass it is. So nothing is mapped while the
model runs; pages are copied in the order of execution, each as soon as the layers that read the
last page of its slot have been computed, and the link is never idle while the device computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from djinn_lib.copier import Arrival, Copier, Stalls
from djinn_lib.errors import CapacityError
from djinn_lib.units import format_bytes


@dataclass(frozen=True, slots=True)
class Window:
    """How `n_pages` pages share fewer frames: `n_prefix` stay, the rest takes turns in `n_slots`.

    `ends` are the first bytes after each unit of the model, in ascending order.
    """

    n_pages: int
    n_prefix: int
    n_slots: int
    page_bytes: int
    ends: tuple[int, ...]

    @classmethod
    def plan(cls, ends: Sequence[int], n_frames: int, page_bytes: int) -> Window:
        """Use all of `n_frames`: a window for two units that follow each other, and a prefix.

        Raises:
            CapacityError: two units that follow each other do not fit together.
        """
        marks = tuple(sorted(set(ends)))
        bounds = (0, *marks)
        n_slots = max(
            -(-bounds[min(i + 2, len(marks))] // page_bytes) - bounds[i] // page_bytes
            for i in range(len(marks))
        )
        if n_slots > n_frames:
            raise CapacityError(
                f"expected room for the two largest layers in a row, "
                f"{format_bytes(n_slots * page_bytes)}, got a ring of "
                f"{format_bytes(n_frames * page_bytes)}: raise the capacity or choose smaller pages"
            )
        n_pages = -(-marks[-1] // page_bytes)
        return cls(n_pages, n_frames - n_slots, n_slots, page_bytes, marks)

    @property
    def n_frames(self) -> int:
        """How many frames the model takes when it runs."""
        return self.n_prefix + self.n_slots

    @property
    def n_tail(self) -> int:
        """How many pages are copied in each forward pass."""
        return self.n_pages - self.n_prefix

    def pages_of(self, end_byte: int) -> tuple[int, int]:
        """First page, and the page after the last, of the unit that ends at or after a byte."""
        end = next((mark for mark in self.ends if mark >= end_byte), self.ends[-1])
        begin = max((mark for mark in self.ends if mark < end), default=0)
        return begin // self.page_bytes, -(-end // self.page_bytes)

    def homes(self, first_slot: int, n_slots: int) -> list[tuple[int, int]]:
        """Where frames of the window are mapped, as (first page, number of pages)."""
        first = range(self.n_prefix + first_slot, self.n_pages, self.n_slots)
        return [(page, min(n_slots, self.n_pages - page)) for page in first]


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
        loaded_bytes: copied since the model was added.
        stalls: how long computations waited; may be replaced.
        rotation: which pages are in the window.

    Args:
        window: of the model.
        n_bytes: of the model.
        view: its range of addresses (1-d uint8, device).
        read: gives bytes of its master copy (see `PageSource.read`).
        copier: of the device.
    """

    def __init__(
        self,
        window: Window,
        n_bytes: int,
        view: torch.Tensor,
        read: Callable[[int, int], torch.Tensor],
        copier: Copier,
    ) -> None:
        self._window, self._n_bytes, self._view, self._read = window, n_bytes, view, read
        self._copier = copier
        self.rotation = Rotation(window.n_tail, window.n_slots)
        self._arrivals: dict[int, Arrival] = {}
        self._last: tuple[int, int] = (0, 0)  # positions of the unit that is being computed
        self.stalls = Stalls()
        self.loaded_bytes = 0

    def wait(self, end_byte: int) -> None:
        """Hold the caller's computation until the unit that ends at `end_byte` is in its place.

        Raises:
            DjinnError: a copy failed; the request can be tried again.
        """
        first, last = self._window.pages_of(end_byte)
        n_prefix = self._window.n_prefix
        if last <= n_prefix:  # needs nothing of the window, but what was needed is done with
            self.rotation.skip_to(self._last[1])
            self._last = (self.rotation.begin, self.rotation.begin)
        else:
            self._last = self.rotation.need(max(first - n_prefix, 0), last - n_prefix)
        try:
            self._submit()
            for position in range(*self._last):
                self._arrivals[position].wait(self.stalls)
        except BaseException:
            self.reset()
            raise

    def _submit(self) -> None:
        for position in [q for q in self._arrivals if q < self.rotation.begin]:
            del self._arrivals[position]
        mark = self._copier.mark()
        while (position := self.rotation.take()) is not None:
            page = self._window.n_prefix + position % self._window.n_tail
            begin = page * self._window.page_bytes
            end = min(begin + self._window.page_bytes, self._n_bytes)
            source = self._read(begin, end)
            self._arrivals[position] = self._copier.submit(self._view[begin:end], source, mark)
            self.loaded_bytes += end - begin

    def finish(self) -> None:
        """Block until no copy is in flight; never raises a copy's error."""
        for arrival in self._arrivals.values():
            arrival.finish()

    def reset(self) -> None:
        """Finish, and forget what is in the window, whose frames may go to another model."""
        self.finish()
        self._arrivals.clear()
        self.rotation.reset()
        self._last = (0, 0)
