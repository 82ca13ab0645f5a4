"""Copying pages from a master to mapped device memory, in page order and in the background.

A `Load` is one such copy. Whoever needs the first `n` bytes of a model waits for just those, so
that the first layers compute while later ones are still on their way.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
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
    ) -> Load:
        """Copy `source[first_byte:]` to the same place of `target`, page by page.

        Args:
            source: packed bytes of the model on the host (1-d uint8).
            target: its range on the device (1-d uint8), mapped from `first_byte` on.
            first_byte: where to begin; a multiple of `page_bytes`.
            page_bytes: size of a page in bytes.
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
            raise DjinnError(
                f"expected weights up to byte {end_byte}, got {self.good_bytes}: the copy failed "
                f"({self.error}); try the request again"
            ) from self.error

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
    ) -> ThreadLoad:
        """Queue the copy and return at once."""
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

    def close(self) -> None:
        """Wait for queued copies and end the thread."""
        self._thread.shutdown()


def copy_page(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy one page; apart so that tests can make it fail."""
    target.copy_(source)


def open_copier(device: torch.device) -> Copier:
    """Return the copier of a device."""
    return ThreadCopier()
