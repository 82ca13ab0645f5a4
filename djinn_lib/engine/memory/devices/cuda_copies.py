"""Copy pages to an NVIDIA GPU on CUDA streams, and decode compressed pages there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from djinn_lib.engine.memory.compressed.form import Form
from djinn_lib.engine.memory.compressed.page import CompressedPage
from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.memory.devices.base import Copier, PageCopy, Source, Stalls


class StreamCopy(PageCopy):
    """A copy on a CUDA stream: the event behind it, or the error of its submission."""

    def __init__(
        self, arrival: torch.cuda.Event | None, error: BaseException | None = None
    ) -> None:
        self._arrival, self._error = arrival, error

    @property
    def ended(self) -> bool:
        """Whether the page has arrived, or the copy failed."""
        arrival = self._arrival
        if arrival is not None and arrival.query():
            self._arrival = None  # not queried again
        return self._arrival is None

    @property
    def error(self) -> BaseException | None:
        """Why it was not submitted; known from the start."""
        return self._error

    def wait(self, stalls: Stalls) -> None:
        """Make the current stream wait for the page; the host does not wait."""
        if (arrival := self._arrival) is not None and not self.ended:
            stalls.hold(arrival)

    def block_until_ended(self) -> None:
        """Block until the page has arrived."""
        if (arrival := self._arrival) is not None:
            arrival.synchronize()


class StreamCopier(Copier):
    """Copies on a CUDA stream of its own, from pinned memory at the rate of the link.

    A compressed page is copied to a staging buffer. A second stream decodes it from there into its
    frame, while the first stream copies the next page to another buffer. From the first compressed
    page on, all pages end on the second stream, because copies must end in order.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._decoder: StagedDecoder | None = None  # made for the first compressed page

    def submit(self, target: torch.Tensor, source: Source, after: Any = None) -> StreamCopy:
        """Submit the page to the stream; the host does not wait for it."""
        try:
            if isinstance(source, CompressedPage) and source.compression:
                self._decoder = self._decoder or StagedDecoder(self._stream)
                return StreamCopy(self._decoder.submit(target, source, after))
            if after is not None:
                self._stream.wait_event(after)
            with torch.cuda.stream(self._stream):
                base.copy_page(target, source)
                copied = _event(self._stream)
            return StreamCopy(self._decoder.follow(copied) if self._decoder else copied)
        except BaseException as error:
            with suppress(RuntimeError):  # it may have been submitted without an event
                self._synchronize()
            if not isinstance(error, Exception):  # the caller was interrupted
                raise
            return StreamCopy(None, error)

    def mark(self) -> torch.cuda.Event:
        """Mark the current stream."""
        return _event(torch.cuda.current_stream(self._stream.device))

    def fence(self) -> Callable[[], None]:
        """Mark the current stream."""
        return self.mark().synchronize

    def close(self) -> None:
        """Block until no copy is in flight."""
        self._synchronize()

    def _synchronize(self) -> None:
        self._stream.synchronize()
        if self._decoder:
            self._decoder.synchronize()


class StagedDecoder:
    """Decodes pages on its own stream, each from one of two staging buffers.

    Args:
        link: the stream that copies to the buffers.
    """

    def __init__(self, link: torch.cuda.Stream) -> None:
        from djinn_lib.engine.memory.compressed import kernel  # which needs triton

        self._decode: Callable[[torch.Tensor, Form, torch.Tensor], None] = kernel.decode
        self._link = link
        self._stream = torch.cuda.Stream(link.device)
        empty = torch.empty(0, dtype=torch.uint8, device=link.device)
        self._buffers = [empty, empty]
        self._decoded: list[torch.cuda.Event | None] = [None, None]  # the last decoding from each
        self._turn = 0

    def submit(
        self, target: torch.Tensor, page: CompressedPage, after: Any = None
    ) -> torch.cuda.Event:
        """Copy and decode one page; return the event behind it.

        Args:
            target: bytes to write (1-d uint8, device).
            page: a compressed page.
            after: an event; `target` may be overwritten after it.
        """
        assert page.compression  # as the caller has seen
        buffer = self._next_buffer(len(target))[: page.n_bytes]
        with torch.cuda.stream(self._link):
            base.copy_page(buffer, page.stored)
        self._stream.wait_event(_event(self._link))
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            self._decode(buffer, page.compression.form, target)
        arrival = self._decoded[self._turn] = _event(self._stream)
        return arrival

    def follow(self, copied: torch.cuda.Event) -> torch.cuda.Event:
        """Return an event behind a plain copy and all pages before it."""
        self._stream.wait_event(copied)
        return _event(self._stream)

    def _next_buffer(self, n_bytes: int) -> torch.Tensor:
        """Return a buffer of at least that size; the link waits until its content is decoded."""
        self._turn = 1 - self._turn
        if len(self._buffers[self._turn]) < n_bytes:
            self.synchronize()  # its memory goes back to torch, which may give it to others at once
            device = self._link.device
            self._buffers[self._turn] = torch.empty(n_bytes, dtype=torch.uint8, device=device)
            torch.cuda.current_stream(device).synchronize()  # which may have used that memory
        elif decoded := self._decoded[self._turn]:
            self._link.wait_event(decoded)
        return self._buffers[self._turn]

    def synchronize(self) -> None:
        """Block until nothing is being copied or decoded."""
        self._link.synchronize()
        self._stream.synchronize()


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event behind all work submitted to a stream so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event
