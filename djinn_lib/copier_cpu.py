"""The copier of the CPU: one host thread, which reports each page that it has copied."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from djinn_lib import copier
from djinn_lib.copier import Arrival, Copier, Load, Read, Stalls
from djinn_lib.errors import DjinnError


class ThreadLoad(Load):
    """A load carried out by a host thread, which reports each page."""

    def __init__(self, first_byte: int, end_byte: int) -> None:
        super().__init__(first_byte, end_byte)
        self._changed = threading.Condition()

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
            raise DjinnError(
                f"expected a page of weights, got none: the copy failed ({error}); try the "
                "request again"
            ) from error

    def finish(self) -> None:
        """Block until the thread is done with the page."""
        self._copied.exception()


class ThreadCopier(Copier):
    """Copies with one background thread; torch releases the interpreter lock while it copies."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="djinn-copier")

    def start(
        self,
        read: Read,
        target: torch.Tensor,
        first_byte: int,
        end_byte: int,
        page_bytes: int,
        mapped: Iterable[int],
    ) -> ThreadLoad:
        """Map all pages, queue the copy and return."""
        deque(mapped, maxlen=0)
        load = ThreadLoad(first_byte, end_byte)
        begins = range(first_byte, end_byte, page_bytes)
        ends = [min(begin + page_bytes, end_byte) for begin in begins]
        # Looked up now: the source may give its frames away as soon as no copy reads them.
        sources = [read(begin, end) for begin, end in zip(begins, ends, strict=True)]

        def run() -> None:
            try:
                for begin, end, source in zip(begins, ends, sources, strict=True):
                    copier.copy_page(target[begin:end], source)
                    load.advance(end)
            except BaseException as error:
                load.fail(error)

        self._thread.submit(run)
        return load

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
