"""Copying pages from a master to mapped device memory, in page order and in the background.

A `Load` is one such copy. Whoever needs the first `n` bytes of a model waits for just those, so
that the first layers compute while later ones are still on their way.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from djinn_lib.errors import DjinnError


class Load(ABC):
    """A copy in flight.

    Attributes:
        stall_s: seconds that callers of `wait` were held up, summed.
        good_bytes: how many bytes from the start of the model are known to be on the device.
        error: what ended the copy early, or None.
    """

    def __init__(self, first_byte: int) -> None:
        self.stall_s = 0.0
        self.good_bytes = first_byte
        self.error: BaseException | None = None

    @abstractmethod
    def wait(self, end_byte: int) -> None:
        """Hold the caller's computation until bytes up to `end_byte` are on the device.

        Raises:
            DjinnError: the copy failed before it got that far; its cause is chained.
        """

    @abstractmethod
    def finish(self) -> None:
        """Block until the copy has ended, well or badly; never raises its error."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether the copy has ended, well or badly."""


class Copier(ABC):
    """Starts copies; one at a time is in flight, later ones queue behind it."""

    @abstractmethod
    def start(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        first_byte: int,
        page_bytes: int,
        mapped: Iterable[int],
    ) -> Load:
        """Copy `source[first_byte:]` to the same place of `target`, page by page.

        Args:
            source: packed bytes of the model on the host (1-d uint8).
            target: its range on the device (1-d uint8).
            first_byte: where to begin; a multiple of `page_bytes`.
            page_bytes: size of a page in bytes.
            mapped: maps pages from `first_byte` on as it is iterated, and gives how many there are
                each time; a copy of pages that are mapped can run while others are being mapped.
        """

    @abstractmethod
    def fence(self) -> Callable[[], None]:
        """Return a function that waits for the computation that the caller has submitted so far.

        Pages that it reads may be unmapped after that.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish the copies in flight and free what the copier holds."""


class ThreadLoad(Load):
    """A load carried out by a host thread, which reports each page."""

    def __init__(self, first_byte: int, end_byte: int) -> None:
        super().__init__(first_byte)
        self._end_byte = end_byte
        self._changed = threading.Condition()

    @property
    def ended(self) -> bool:
        """Whether the copy has ended, well or badly."""
        return self.error is not None or self.good_bytes >= self._end_byte

    def wait(self, end_byte: int) -> None:
        """Block until the bytes are there."""
        if self.good_bytes >= end_byte:
            return
        begin_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self.error or self.good_bytes >= end_byte)
        self.stall_s += time.perf_counter() - begin_s
        if self.good_bytes < end_byte:
            raise incomplete(end_byte, self)

    def finish(self) -> None:
        """Block until the thread is done with this load."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended)

    def advance(self, good_bytes: int) -> None:
        """Report that the bytes up to `good_bytes` are there."""
        with self._changed:
            self.good_bytes = good_bytes
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Report that the copy ended early."""
        with self._changed:
            self.error = error
            self._changed.notify_all()


class ThreadCopier(Copier):
    """Copies with one background thread; torch releases the interpreter lock while it copies."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="djinn-copier")

    def start(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        first_byte: int,
        page_bytes: int,
        mapped: Iterable[int],
    ) -> ThreadLoad:
        """Map all pages, queue the copy and return."""
        deque(mapped, maxlen=0)
        load = ThreadLoad(first_byte, source.numel())

        def run() -> None:
            try:
                for begin in range(first_byte, source.numel(), page_bytes):
                    end = min(begin + page_bytes, source.numel())
                    copy_page(target[begin:end], source[begin:end])
                    load.advance(end)
            except BaseException as error:
                load.fail(error)

        self._thread.submit(run)
        return load

    def fence(self) -> Callable[[], None]:
        """There is nothing to wait for: on the CPU a computation ends with its call."""
        return lambda: None

    def close(self) -> None:
        """Wait for queued copies and end the thread."""
        self._thread.shutdown()


class StreamLoad(Load):
    """A load on a CUDA stream, with an event after each page.

    Waiting is the device's business: the caller's stream waits for an event, and the host goes on.
    """

    def __init__(self, first_byte: int, page_bytes: int) -> None:
        super().__init__(first_byte)
        self._page_bytes = page_bytes
        self._first_byte = first_byte
        self._arrivals: list[torch.cuda.Event] = []
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
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
        if end_byte > self.good_bytes:
            raise incomplete(end_byte, self)
        if end_byte <= self._first_byte or self.ended:
            return
        arrival = self._arrivals[-(-(end_byte - self._first_byte) // self._page_bytes) - 1]
        if arrival.query():
            return
        stream = torch.cuda.current_stream()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(arrival)
        after.record(stream)
        self._stalls.append((before, after))

    @property
    def stall_s(self) -> float:
        """Seconds that streams were held up; waits for them to get past the last hold-up."""
        if self._stalls:
            self._stalls[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in self._stalls) / 1e3

    @stall_s.setter
    def stall_s(self, value: float) -> None:
        self._stalls = []

    def finish(self) -> None:
        """Block until the last page is there."""
        if self._arrivals:
            self._arrivals[-1].synchronize()


class StreamCopier(Copier):
    """Copies on a CUDA stream of its own, from pinned memory at the rate of the link."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        first_byte: int,
        page_bytes: int,
        mapped: Iterable[int],
    ) -> StreamLoad:
        """Submit copies as pages are mapped, and return; the host waits for none of them."""
        load = StreamLoad(first_byte, page_bytes)
        begin = first_byte
        try:
            with torch.cuda.stream(self._stream):
                for n_pages in mapped:
                    for _ in range(n_pages):
                        end = min(begin + page_bytes, source.numel())
                        copy_page(target[begin:end], source[begin:end])
                        arrival = torch.cuda.Event()
                        arrival.record(self._stream)
                        load.add(end, arrival)
                        begin = end
        except Exception as error:
            load.error = error
        return load

    def fence(self) -> Callable[[], None]:
        """Mark the current stream."""
        return torch.cuda.current_stream().record_event().synchronize

    def close(self) -> None:
        """Wait for the copies in flight."""
        self._stream.synchronize()


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


def open_copier(device: torch.device) -> Copier:
    """Return the copier of a device."""
    return StreamCopier(device) if device.type == "cuda" else ThreadCopier()
