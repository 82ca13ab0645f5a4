"""Interfaces of a device: stable addresses over changing frames, and copies in the background.

A tensor over a range of addresses keeps its address, whichever frames are mapped there, so
parameters are bound only once. Copies run in the background, one after the other. If a copy fails,
the error is raised by those that wait for its page, not by the caller that queued it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from djinn_lib.engine.memory.compressed.page import CompressedPage
from djinn_lib.errors import ConfigError, PlatformError
from djinn_lib.units import format_bytes

Source = torch.Tensor | CompressedPage  # bytes of one page on the host
Page = tuple[torch.Tensor, Source]  # target on the device, source on the host


# -- addresses -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """A reserved range of virtual addresses: `n_pages` pages from `address` on."""

    address: int
    n_pages: int


class Refused(PlatformError):
    """The system or the driver refused a call; the message is theirs."""


class AddressSpace(ABC):
    """`n_frames` physical frames of `page_bytes` each, and ranges to map them into.

    A backend overrides the methods that begin with an underscore. Roll-back and error messages are
    implemented here, so they are the same on every device.
    """

    device: torch.device

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        granularity = self.granularity_bytes()
        if page_bytes < granularity or page_bytes % granularity:
            raise ConfigError(
                f"expected pages of a multiple of {granularity} bytes on this device, "
                f"got {page_bytes}"
            )
        self.n_frames, self.page_bytes = n_frames, page_bytes
        self._areas: dict[int, Range] = {}
        self._mapped: dict[int, set[int]] = {}  # pages by the address of their range

    @abstractmethod
    def granularity_bytes(self) -> int:
        """The smallest page size; every page size is a multiple of it."""

    def reserve(self, n_pages: int) -> Range:
        """Reserve addresses for `n_pages` pages; nothing is mapped.

        Raises:
            PlatformError: there are too few addresses.
        """
        n_bytes = n_pages * self.page_bytes
        try:
            address = self._reserve(n_bytes)
        except Refused as error:
            raise PlatformError(
                f"expected {format_bytes(n_bytes)} of virtual addresses, got none ({error}): "
                "remove models, or raise the limit that `ulimit -v` shows"
            ) from error
        area = self._areas[address] = Range(address, n_pages)
        self._mapped[address] = set()
        return area

    def release(self, area: Range) -> None:
        """Release a range, mapped or not. Tensors over it must not be used afterwards."""
        if self._areas.pop(area.address, None):
            self._release(area, sorted(self._mapped.pop(area.address)))

    def map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map `frames[i]` at page `first_page + i`.

        Raises:
            PlatformError: the system refused; none of the pages is mapped.
        """
        if not frames:
            return
        try:
            self._map(area, first_page, frames)
        except Refused as error:
            self.unmap(area, first_page, len(frames))
            raise PlatformError(
                f"expected {len(frames)} pages of {format_bytes(self.page_bytes)} to be mapped, "
                f"got none ({error}): free memory, or use fewer, larger pages"
            ) from error

    def unmap(self, area: Range, first_page: int, n_pages: int) -> None:
        """Unmap those of the pages that are mapped.

        The caller must make sure that nothing on the device still reads them.

        Raises:
            PlatformError: the system refused.
        """
        mapped = self._mapped[area.address]
        if pages := sorted(mapped.intersection(range(first_page, first_page + n_pages))):
            self._unmap(area, pages)

    def mapped_pages(self, area: Range) -> frozenset[int]:
        """Return the mapped pages of a range; for audits."""
        return frozenset(self._mapped[area.address])

    @abstractmethod
    def bytes_view(self, area: Range) -> torch.Tensor:
        """Return the whole range as a 1-d uint8 tensor, readable where pages are mapped."""

    @abstractmethod
    def export(self) -> list[int]:
        """Return descriptors of the frames for other processes; the caller closes them.

        Another process maps the same frames when it opens its address space over them. A frame is
        freed when the last process that uses it releases it.

        Raises:
            PlatformError: the frames were not made to be shared.
        """

    @abstractmethod
    def close(self) -> None:
        """Release every range and frame; a second call does nothing."""

    @abstractmethod
    def _reserve(self, n_bytes: int) -> int:
        """Return the address of a new range, or raise `Refused`."""

    @abstractmethod
    def _release(self, area: Range, pages: Sequence[int]) -> None:
        """Unmap the pages of a range that are mapped, and give its addresses back."""

    @abstractmethod
    def _map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map frames, or raise `Refused`; add each mapped page to `_mapped`."""

    @abstractmethod
    def _unmap(self, area: Range, pages: Sequence[int]) -> None:
        """Unmap mapped pages, in ascending order, and remove them from `_mapped`."""


# -- copies --------------------------------------------------------------------------------------

Reading = tuple[float, int]  # of `Stalls`: seconds of the host, number of waits of streams


class Stalls:
    """Measures how long computations waited for copies, on the host or on a CUDA stream."""

    def __init__(self) -> None:
        self._host_s = 0.0
        self._on_streams: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, seconds: float) -> None:
        """Add a wait of the host."""
        self._host_s += seconds

    def hold(self, arrival: torch.cuda.Event) -> None:
        """Make the current stream wait for an event and time it; the host does not wait."""
        stream = torch.cuda.current_stream(arrival.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(arrival)
        after.record(stream)
        self._on_streams.append((before, after))

    def reading(self) -> Reading:
        """Return the current position, without waiting for streams; see `until_s`."""
        return self._host_s, len(self._on_streams)

    def until_s(self, reading: Reading) -> float:
        """Return the seconds up to a reading; blocks until its last wait of a stream has ended."""
        host_s, n_on_streams = reading
        held_up = self._on_streams[:n_on_streams]
        if held_up:
            held_up[-1][1].synchronize()
        return host_s + sum(before.elapsed_time(after) for before, after in held_up) / 1e3

    @property
    def total_s(self) -> float:
        """Seconds up to now; blocks until the last wait of a stream has ended."""
        return self.until_s(self.reading())


class PageCopy(ABC):
    """The copy of one page. Copies of one copier end in the order in which they were queued."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether it has ended, with or without an error."""

    @property
    @abstractmethod
    def error(self) -> BaseException | None:
        """Why it failed, as far as known; reliable once it has ended or `wait` returned."""

    @abstractmethod
    def wait(self, stalls: Stalls) -> None:
        """Make the caller's computation wait until it has ended, and add the time to `stalls`.

        This never raises the error of the copy.
        """

    @abstractmethod
    def block_until_ended(self) -> None:
        """Block the host until it has ended; never raise its error."""


class Copier(ABC):
    """Copies pages in the background, one after the other."""

    @abstractmethod
    def submit(self, target: torch.Tensor, source: Source, after: Any = None) -> PageCopy:
        """Queue the copy of one mapped page; a compressed page is decoded.

        Args:
            target, source: see `Page`.
            after: a `mark`; the copy starts after the computations before it.
        """

    @abstractmethod
    def mark(self) -> Any:
        """Return a mark behind the computations that the caller has submitted so far."""

    @abstractmethod
    def fence(self) -> Callable[[], None]:
        """Return a function that blocks until those computations have ended.

        Pages that they read may be unmapped after that.
        """

    @abstractmethod
    def close(self) -> None:
        """Block until no copy is in flight, and release all resources."""


def copy_page(target: torch.Tensor, source: Source) -> None:
    """Copy one page; a function of its own, so that tests can make it fail."""
    if isinstance(source, CompressedPage):
        source.copy_to(target)
    else:
        target.copy_(source, non_blocking=True)
