"""The copier of a GPU: a CUDA stream of its own, and an event after each page."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from djinn_lib.engine.memory.devices import copier
from djinn_lib.engine.memory.devices.copier import Arrival, Copier, Load, Page, Stalls


class StreamLoad(Load):
    """A load on a CUDA stream, with an event after each page.

    Waiting is the device's business: the caller's stream waits for an event, and the host goes on.
    """

    def __init__(self, stream: torch.cuda.Stream, first_byte: int, end_byte: int) -> None:
        super().__init__(first_byte, end_byte)
        self._stream = stream
        self._ends: list[int] = []  # first bytes after the pages that were submitted
        self._arrivals: list[torch.cuda.Event] = []
        self._done = False

    def copy(self, pages: Sequence[Page]) -> None:
        """Submit the pages to the stream; the host waits for none of them."""
        try:
            with torch.cuda.stream(self._stream):
                for target, source in pages if self.error is None else ():
                    copier.copy_page(target, source)
                    self._arrivals.append(_event(self._stream))
                    self.good_bytes += target.numel()
                    self._ends.append(self.good_bytes)
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception):  # an interrupt of the caller
                raise

    @property
    def ended(self) -> bool:
        """Whether the last page that was submitted is there."""
        self._done = self._done or not self._arrivals or self._arrivals[-1].query()
        return self._done

    def wait(self, end_byte: int) -> None:
        """Make the current stream wait for the bytes; the host does not wait."""
        end_byte = min(end_byte, self.end_byte)
        if end_byte > self.good_bytes:
            raise copier.incomplete(end_byte, self)
        if end_byte > self.first_byte and not self.ended:
            self.stalls.hold(self._arrivals[bisect_left(self._ends, end_byte)])

    def finish(self) -> None:
        """Block until the last page is there."""
        if self.error:  # perhaps of a copy that was submitted and has no event
            self._stream.synchronize()
        elif self._arrivals:
            self._arrivals[-1].synchronize()


class StreamArrival(Arrival):
    """A page that a CUDA stream copies, or why it could not be submitted."""

    def __init__(self, arrival: torch.cuda.Event | Exception) -> None:
        self._arrival = arrival

    def wait(self, stalls: Stalls) -> None:
        """Make the current stream wait for the page; the host does not wait."""
        if isinstance(self._arrival, Exception):
            raise copier.no_page(self._arrival)
        stalls.hold(self._arrival)

    def finish(self) -> None:
        """Block until the page is there."""
        if not isinstance(self._arrival, Exception):
            self._arrival.synchronize()


class StreamCopier(Copier):
    """Copies on a CUDA stream of its own, from pinned memory at the rate of the link."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def begin(self, first_byte: int, end_byte: int) -> StreamLoad:
        """Begin a load whose pages the stream copies."""
        return StreamLoad(self._stream, first_byte, end_byte)

    def submit(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> StreamArrival:
        """Submit the copy of a page; the host does not wait for it."""
        try:
            self._stream.wait_event(mark)
            with torch.cuda.stream(self._stream):
                copier.copy_page(target, source)
                return StreamArrival(_event(self._stream))
        except Exception as error:
            return StreamArrival(error)

    def mark(self) -> torch.cuda.Event:
        """Mark the current stream."""
        return _event(torch.cuda.current_stream(self._stream.device))

    def fence(self) -> Callable[[], None]:
        """Mark the current stream."""
        return self.mark().synchronize

    def close(self) -> None:
        """Wait for the copies in flight."""
        self._stream.synchronize()


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind the work that the stream has been given so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event
