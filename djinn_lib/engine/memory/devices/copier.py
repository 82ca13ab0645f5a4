"""Copying pages from a master to mapped device memory, in page order and in the background.

A `Load` is the copy of consecutive pages, queued a few at a time as they are mapped. Whoever needs
the first `n` bytes of a model waits for just those, so that the first layers compute while later
ones are still on their way. An `Arrival` is the copy of a single page into a frame that is used
over and over (see `streaming`).

A copy that fails is never an error of whoever queues it: all that wait for its bytes are told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from djinn_lib.errors import DjinnError

Page = tuple[torch.Tensor, torch.Tensor]  # where on the device, and from where on the host


Reading = tuple[float, int]  # of `Stalls`: seconds of the host, and hold-ups of streams


class Stalls:
    """How long computations were held up: on the host, or on a CUDA stream."""

    def __init__(self) -> None:
        self._host_s = 0.0
        self._on_streams: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, seconds: float) -> None:
        """Add a hold-up of the host."""
        self._host_s += seconds

    def hold(self, arrival: torch.cuda.Event) -> None:
        """Make the current stream wait for an event, and time that; the host goes on."""
        if arrival.query():
            return
        stream = torch.cuda.current_stream(arrival.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(arrival)
        after.record(stream)
        self._on_streams.append((before, after))

    def reading(self) -> Reading:
        """Return where this stands now, without waiting for streams; see `until_s`."""
        return self._host_s, len(self._on_streams)

    def until_s(self, reading: Reading) -> float:
        """Seconds up to a reading, summed; waits for streams to get past its last hold-up."""
        host_s, n_on_streams = reading
        held_up = self._on_streams[:n_on_streams]
        if held_up:
            held_up[-1][1].synchronize()
        return host_s + sum(before.elapsed_time(after) for before, after in held_up) / 1e3

    @property
    def total_s(self) -> float:
        """Seconds up to now, summed; waits for streams to get past the last hold-up."""
        return self.until_s(self.reading())


class Load(ABC):
    """A copy in flight, of the bytes from `first_byte` to `end_byte` of a model.

    Attributes:
        good_bytes: how many bytes from the start of the model are on the device, or will be as far
            as is known.
        error: what ended the copy early, or None.
        stalls: how long callers of `wait` were held up.
    """

    def __init__(self, first_byte: int, end_byte: int) -> None:
        self.first_byte, self.end_byte = first_byte, end_byte
        self.good_bytes = first_byte
        self.error: BaseException | None = None
        self.stalls = Stalls()

    @abstractmethod
    def copy(self, pages: Sequence[Page]) -> None:
        """Queue the copies of the next pages, which are mapped; returns at once.

        After a page that failed no other is copied.
        """

    @abstractmethod
    def wait(self, end_byte: int) -> None:
        """Hold the caller's computation until bytes up to `end_byte` are on the device.

        Called when all pages are queued. Bytes past the end of this load are ignored.

        Raises:
            DjinnError: the copy failed before it got that far; its cause is chained.
        """

    @abstractmethod
    def finish(self) -> None:
        """Block until what is queued has ended, well or badly; never raises its error."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether the copy has ended, well or badly."""


class Arrival(ABC):
    """The copy of one page."""

    @abstractmethod
    def wait(self, stalls: Stalls) -> None:
        """Hold the caller's computation until the page is there, and note for how long.

        Raises:
            DjinnError: the copy failed; its cause is chained.
        """

    @abstractmethod
    def finish(self) -> None:
        """Block until the copy has ended, well or badly; never raises its error."""


class Copier(ABC):
    """Starts copies; one at a time is in flight, later ones queue behind it."""

    @abstractmethod
    def begin(self, first_byte: int, end_byte: int) -> Load:
        """Begin the copy of consecutive bytes of a model, of which no page is queued yet."""

    @abstractmethod
    def submit(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> Arrival:
        """Copy one mapped page, after the computations that `mark` stands for."""

    @abstractmethod
    def mark(self) -> Any:
        """Stand for the computations that the caller has submitted so far."""

    @abstractmethod
    def fence(self) -> Callable[[], None]:
        """Return a function that waits for the computation that the caller has submitted so far.

        Pages that it reads may be unmapped after that.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish the copies in flight and free what the copier holds."""


def copy_page(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy one page; apart so that tests can make it fail."""
    target.copy_(source, non_blocking=True)


def incomplete(end_byte: int, load: Load) -> DjinnError:
    """The error of a caller that waits for bytes that will not come."""
    error = DjinnError(
        f"expected weights up to byte {end_byte}, got {load.good_bytes}: the copy failed "
        f"({load.error}); try the request again"
    )
    error.__cause__ = load.error
    return error


def no_page(cause: BaseException) -> DjinnError:
    """The error of a caller that waits for a page that will not come."""
    error = DjinnError(
        f"expected a page of weights, got none: the copy failed ({cause}); try the request again"
    )
    error.__cause__ = cause
    return error


def open_copier(device: torch.device) -> Copier:
    """Return the copier of a device."""
    if device.type == "cuda":
        from djinn_lib.engine.memory.devices.copier_cuda import StreamCopier

        return StreamCopier(device)
    from djinn_lib.engine.memory.devices.copier_cpu import ThreadCopier

    return ThreadCopier()
