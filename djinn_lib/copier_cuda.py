"""The copier of a GPU: a CUDA stream of its own, and an event after each page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from djinn_lib import copier
from djinn_lib.copier import Arrival, Copier, Load, Read, Stalls


class StreamLoad(Load):
    """A load on a CUDA stream, with an event after each page.

    Waiting is the device's business: the caller's stream waits for an event, and the host goes on.
    """

    def __init__(self, first_byte: int, end_byte: int, page_bytes: int) -> None:
        super().__init__(first_byte, end_byte)
        self._page_bytes = page_bytes
        self._arrivals: list[torch.cuda.Event] = []
        self._done = False

    def add(self, good_bytes: int, arrival: torch.cuda.Event) -> None:
        """Note that bytes up to `good_bytes` are there when the event has happened."""
        self.good_bytes = good_bytes
        self._arrivals.append(arrival)

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
            page = -(-(end_byte - self.first_byte) // self._page_bytes) - 1
            self.stalls.hold(self._arrivals[page])

    def finish(self) -> None:
        """Block until the last page is there."""
        if self._arrivals:
            self._arrivals[-1].synchronize()


class StreamArrival(Arrival):
    """A page that a CUDA stream copies."""

    def __init__(self, arrival: torch.cuda.Event) -> None:
        self._arrival = arrival

    def wait(self, stalls: Stalls) -> None:
        """Make the current stream wait for the page; the host does not wait."""
        stalls.hold(self._arrival)

    def finish(self) -> None:
        """Block until the page is there."""
        self._arrival.synchronize()


class StreamCopier(Copier):
    """Copies on a CUDA stream of its own, from pinned memory at the rate of the link."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(
        self,
        read: Read,
        target: torch.Tensor,
        first_byte: int,
        end_byte: int,
        page_bytes: int,
        mapped: Iterable[int],
    ) -> StreamLoad:
        """Submit copies as pages are mapped, and return; the host waits for none of them."""
        load = StreamLoad(first_byte, end_byte, page_bytes)
        begin = first_byte
        try:
            with torch.cuda.stream(self._stream):
                for n_pages in mapped:
                    for _ in range(n_pages):
                        end = min(begin + page_bytes, end_byte)
                        copier.copy_page(target[begin:end], read(begin, end))
                        load.add(end, _event(self._stream))
                        begin = end
        except Exception as error:
            load.error = error
        return load

    def submit(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> StreamArrival:
        """Submit the copy of a page; the host does not wait for it."""
        self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            copier.copy_page(target, source)
            return StreamArrival(_event(self._stream))

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
