"""The copier of the CPU: one host thread, which reports each page that it has copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from djinn_lib.engine.memory.devices import copier
from djinn_lib.engine.memory.devices.copier import Arrival, Copier, Load, Page, Stalls


class ThreadLoad(Load):
    """A load carried out by a host thread, which reports each page."""

    def __init__(self, thread: ThreadPoolExecutor, first_byte: int, end_byte: int) -> None:
        super().__init__(first_byte, end_byte)
        self._thread = thread
        self._queued_bytes = first_byte
        self._changed = threading.Condition()

    def copy(self, pages: Sequence[Page]) -> None:
        """Hand the pages to the thread."""
        self._queued_bytes += sum(target.numel() for target, _ in pages)
        self._thread.submit(self._run, pages)

    def _run(self, pages: Sequence[Page]) -> None:
        for target, source in pages:
            if self.error:
                return
            try:
                copier.copy_page(target, source)
            except BaseException as error:
                self._report(0, error)
            else:
                self._report(target.numel(), None)

    def _report(self, n_bytes: int, error: BaseException | None) -> None:
        with self._changed:
            self.good_bytes += n_bytes
            self.error = error
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the copy has ended, well or badly."""
        return self.error is not None or self.good_bytes >= self.end_byte

    def wait(self, end_byte: int) -> None:
        """Block until the bytes are there."""
        end_byte = min(end_byte, self.end_byte)
        if self.good_bytes >= end_byte:
            return
        begin_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self.error or self.good_bytes >= end_byte)
            self.stalls.add(time.perf_counter() - begin_s)
        if self.good_bytes < end_byte:
            raise copier.incomplete(end_byte, self)

    def finish(self) -> None:
        """Block until the thread is done with this load."""
        with self._changed:
            self._changed.wait_for(lambda: self.error or self.good_bytes >= self._queued_bytes)


class ThreadArrival(Arrival):
    """A page that a host thread copies."""

    def __init__(self, copied: Future[None]) -> None:
        self._copied = copied

    def wait(self, stalls: Stalls) -> None:
        """Block until the page is there."""
        begin_s = time.perf_counter()
        error = self._copied.exception()
        stalls.add(time.perf_counter() - begin_s)
        if error:
            raise copier.no_page(error)

    def finish(self) -> None:
        """Block until the thread is done with the page."""
        self._copied.exception()


class ThreadCopier(Copier):
    """Copies with one background thread; torch releases the interpreter lock while it copies."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="djinn-copier")

    def begin(self, first_byte: int, end_byte: int) -> ThreadLoad:
        """Begin a load whose pages the thread copies."""
        return ThreadLoad(self._thread, first_byte, end_byte)

    def submit(self, target: torch.Tensor, source: torch.Tensor, mark: Any) -> ThreadArrival:
        """Queue the copy of a page."""
        return ThreadArrival(self._thread.submit(copier.copy_page, target, source))

    def mark(self) -> None:
        """Nothing: on the CPU a computation ends with its call."""

    def fence(self) -> Callable[[], None]:
        """There is nothing to wait for: on the CPU a computation ends with its call."""
        return lambda: None

    def close(self) -> None:
        """Wait for queued copies and end the thread."""
        self._thread.shutdown()
