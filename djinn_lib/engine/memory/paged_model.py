"""Map the pages of one model and copy their bytes.

Each page of the ring is one page of the model. The exception is a model larger than the ring: its
last ring pages are the slots of its `Window`, and each slot is mapped at several addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from djinn_lib.engine.memory.devices.base import AddressSpace, Copier, Page, Range, Source
from djinn_lib.engine.memory.frames import Extent
from djinn_lib.engine.memory.lease import LeaseStats, Tally
from djinn_lib.engine.memory.load import Load
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.window import Streamed, Window

LARGEST_BATCH = 16  # pages to map at once; mapping 16 takes about as long as copying one of 64 MiB


class PagedModel:
    """Maps pages of one model and starts their copies; the pager decides which.

    Attributes:
        n_bytes: size of the model.
        window: plan for a model larger than the ring, else None.
        streamed: state of the window, else None.
        view: its range of addresses (1-d uint8).
        loads: copies in flight, or failed and not yet rolled back, in page order.
        prefetched_bytes: bytes loaded ahead of the next lease.
        evicted_for_it_bytes: bytes evicted from other models for that prefetch.
    """

    def __init__(
        self,
        name: str,
        n_bytes: int,
        window: Window | None,
        space: AddressSpace,
        copier: Copier,
        masters: Masters,
    ) -> None:
        self.name, self.n_bytes, self.window = name, n_bytes, window
        self._space, self._copier, self._masters = space, copier, masters
        self.page_bytes = space.page_bytes
        self.area: Range = space.reserve(-(-n_bytes // self.page_bytes))
        try:
            self.view: torch.Tensor = space.bytes_view(self.area)
        except BaseException:
            space.release(self.area)
            raise
        self.streamed: Streamed | None = None
        if window:
            self.streamed = Streamed(window, n_bytes, self.view, self._read, copier)
        self.loads: list[Load] = []
        self.prefetched_bytes = self.evicted_for_it_bytes = 0
        self._last_use: Callable[[], None] = lambda: None

    @property
    def n_stable_pages(self) -> int:
        """Number of pages, from the first one on, that stay resident until they are evicted."""
        return self.window.n_prefix if self.window else self.area.n_pages

    def bytes_of(self, first_page: int, n_pages: int) -> int:
        """Bytes of the model in consecutive pages of the ring, without those of the window."""
        begin = min(first_page, self.n_stable_pages) * self.page_bytes
        end = min(first_page + n_pages, self.n_stable_pages) * self.page_bytes
        return max(0, min(end, self.n_bytes) - begin)

    def _read(self, begin: int, end: int) -> Source:
        return self._masters.read(self.name, begin, end)

    def check_bytes(self, n_bytes: int) -> None:
        """Compare its first `n_bytes`, which must be resident, with its master.

        The comparison runs on the device: copies from pinned masters are fast, while copies of
        pages back to unpinned host memory would be slow.

        Raises:
            AssertionError: naming the first byte that differs.
            DjinnError: a compressed page of the master has changed.
        """
        if not n_bytes:
            return  # it may have no master yet
        self._masters.hold(self.name)
        try:
            for begin in range(0, n_bytes, self.page_bytes):
                held = self.view[begin : min(begin + self.page_bytes, n_bytes)]
                master = self._on_device(self._read(begin, begin + len(held)), held)
                if not torch.equal(held, master):
                    first = begin + int((held != master).int().argmax())
                    raise AssertionError(f"{self.name!r} differs from its master at byte {first}")
        finally:
            self._masters.let_go(self.name)

    def _on_device(self, source: Source, held: torch.Tensor) -> torch.Tensor:
        """Check and decode a page of the master; return it on the device of `held`."""
        if isinstance(source, torch.Tensor):
            return source.to(held.device)
        copied = torch.empty_like(held)
        if copied.is_cpu:
            source.copy_to(copied)
            return copied
        source.ensure_intact()
        page_copy = self._copier.submit(copied, source, self._copier.mark())
        page_copy.block_until_ended()
        if page_copy.error:
            raise page_copy.error
        return copied

    # -- mapping ---------------------------------------------------------------------------

    def load(self, extent: Extent) -> None:
        """Map missing pages and start to copy them, a few at a time.

        The copies of a few pages are queued while the next few are mapped. This call raises if
        mapping fails. If a copy fails, the error is raised by those that wait for its bytes.

        Raises:
            DjinnError: mapping failed; no page of the extent is mapped or in flight.
        """
        n_stable = max(0, min(len(extent.frames), self.n_stable_pages - extent.first_page))
        load = Load(self._copier, extent.first_page * self.page_bytes)
        try:
            self._map_window(extent, n_stable)
            for begin, end in _batches(n_stable):
                first_page = extent.first_page + begin
                self._space.map(self.area, first_page, extent.frames[begin:end])
                load.copy([self._page(first_page + i) for i in range(end - begin)])
        except BaseException:
            load.block_until_ended()  # or copies would write to unmapped pages
            self.unmap(extent.first_page, len(extent.frames))
            raise
        if n_stable:
            self.loads.append(load)

    def _page(self, page: int) -> Page:
        """The target and the source of the copy of a page."""
        begin = page * self.page_bytes
        end = min(begin + self.page_bytes, self.n_bytes)
        return self.view[begin:end], self._read(begin, end)

    def _map_window(self, extent: Extent, n_stable: int) -> None:
        frames = extent.frames[n_stable:]
        if self.window and frames:
            slot = extent.first_page + n_stable - self.window.n_prefix
            for page, n_pages in self.window.homes(slot, len(frames)):
                self._space.map(self.area, page, frames[:n_pages])

    def unmap(self, first_page: int, n_pages: int) -> None:
        """Unmap pages of the ring at all their addresses; they must not be in use."""
        n_stable = max(0, min(n_pages, self.n_stable_pages - first_page))
        self._space.unmap(self.area, first_page, n_stable)
        if self.window and self.streamed and n_pages > n_stable:
            slot = first_page + n_stable - self.window.n_prefix
            for page, n_homes in self.window.homes(slot, n_pages - n_stable):
                self._space.unmap(self.area, page, n_homes)

    def release(self) -> None:
        """Release the addresses; tensors over them must not be used afterwards."""
        self.block_until_unused()
        self._space.release(self.area)

    @property
    def ring_pages(self) -> frozenset[int]:
        """Pages of the ring that are mapped at all their addresses; for audits."""
        mapped = self._space.mapped_pages(self.area)
        pages = {page for page in mapped if page < self.n_stable_pages}
        if self.window:
            for slot in range(self.window.n_slots):
                homes = {page for page, _ in self.window.homes(slot, 1)}
                pages |= {self.window.n_prefix + slot} if homes <= mapped else set()
        return frozenset(pages)

    # -- copies and computations in flight ---------------------------------------------------

    def wait(self, end_byte: int) -> None:
        """Make the caller's computation wait until bytes up to `end_byte` are loaded."""
        for load in tuple(self.loads):
            load.wait(end_byte)

    def block_until_copied(self) -> None:
        """Block the host until no copy of this model is in flight."""
        for load in tuple(self.loads):
            load.block_until_ended()
        if self.streamed:
            self.streamed.block_until_ended()

    def block_until_unused(self) -> None:
        """Block the host until nothing reads or writes its frames, so others can use them."""
        self.block_until_copied()
        if self.streamed:
            self.streamed.reset()
        self._last_use()

    def note_use(self, fence: Callable[[], None]) -> None:
        """Store a function that waits for the last computation that reads the model."""
        self._last_use = fence

    def good_bytes(self) -> int | None:
        """If a copy failed, return how many bytes before it are loaded; else None.

        If a copy failed, this blocks until no copy is in flight. Bytes after the gap are useless.
        """
        failed = next((load for load in self.loads if load.error), None)
        if failed is None:
            return None
        self.block_until_copied()
        return failed.good_bytes

    @property
    def is_loading(self) -> bool:
        """Whether a load is in flight, or has failed and is not rolled back yet."""
        return not all(load.arrived for load in tuple(self.loads))

    def forget_arrived(self) -> None:
        """Drop the loads that succeeded."""
        self.loads = [load for load in self.loads if not load.arrived]

    def begin_stats(self) -> LeaseStats:
        """Start to count stalls, and bytes copied through the window; return the counters."""
        tally = Tally()
        if self.streamed:
            self.streamed.tally = tally
        return LeaseStats([load.stalls for load in self.loads], tally)


def _batches(n_pages: int) -> Iterator[tuple[int, int]]:
    """Split pages into batches, each as (first, after the last).

    The first batch is one page, so the first copy starts early. Each next batch is twice as large,
    because every call to the driver has a fixed cost.
    """
    begin, size = 0, 1
    while begin < n_pages:
        end = min(begin + size, n_pages)
        yield begin, end
        begin, size = end, min(2 * size, LARGEST_BATCH)
