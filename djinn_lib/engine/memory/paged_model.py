"""One model as the pager sees it: its addresses, its copies in flight, its last use.

Pages of the ring are pages of the model, one to one, unless the model is larger than the ring: then
the last few stand for the slots of its `Window`, each of which is mapped wherever it is at home.
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

LARGEST_BATCH = 16  # pages mapped at once; a page of 64 MiB is copied in the time of as many


class PagedModel:
    """Maps pages of one model and starts their copies; the pager decides which.

    Attributes:
        n_bytes: of the model.
        window: how it runs, when it is larger than the ring.
        streamed: its pages on their way through the window.
        view: its range of addresses (1-d uint8).
        loads: copies in flight, or failed and not yet rolled back, in page order.
        prefetched_bytes, evicted_for_it_bytes: ahead of the next lease, and because of that.
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
        """How many pages stay as long as nobody evicts them; they are the first ones."""
        return self.window.n_prefix if self.window else self.area.n_pages

    def bytes_of(self, first_page: int, n_pages: int) -> int:
        """Bytes of the model in consecutive pages of the ring; a window counts for none."""
        begin = min(first_page, self.n_stable_pages) * self.page_bytes
        end = min(first_page + n_pages, self.n_stable_pages) * self.page_bytes
        return max(0, min(end, self.n_bytes) - begin)

    def _read(self, begin: int, end: int) -> Source:
        return self._masters.read(self.name, begin, end)

    def check_bytes(self, n_bytes: int) -> None:
        """Compare its first bytes, all of them resident, with its master.

        On the device: masters go there at the rate of the link, while pages would come slowly into
        memory that is not pinned.

        Raises:
            AssertionError: naming the first byte that differs.
            DjinnError: a compressed page of the master has changed.
        """
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
        """A page of the master, intact and decoded, on the device of the page it belongs to."""
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

        The copies of a few pages are queued while the next few are mapped. A mapping that fails is
        an error of this call; a copy that fails is one of those that wait for its bytes.

        Raises:
            DjinnError: mapping failed; nothing of the extent is mapped or in flight any more.
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
            load.block_until_ended()  # what is in flight would write to pages that are unmapped
            self.unmap(extent.first_page, len(extent.frames))
            raise
        if n_stable:
            self.loads.append(load)

    def _page(self, page: int) -> Page:
        """Where a page is copied to and from; masters may reuse it once no copy reads it."""
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
        """Unmap pages of the ring, wherever they are mapped; nobody may use them any more."""
        n_stable = max(0, min(n_pages, self.n_stable_pages - first_page))
        self._space.unmap(self.area, first_page, n_stable)
        if self.window and self.streamed and n_pages > n_stable:
            slot = first_page + n_stable - self.window.n_prefix
            for page, n_homes in self.window.homes(slot, n_pages - n_stable):
                self._space.unmap(self.area, page, n_homes)

    def release(self) -> None:
        """Give the addresses back; tensors over them must not be used any more."""
        self.block_until_unused()
        self._space.release(self.area)

    @property
    def ring_pages(self) -> frozenset[int]:
        """Pages of the ring of which every address is mapped; for audits."""
        mapped = self._space.mapped_pages(self.area)
        pages = {page for page in mapped if page < self.n_stable_pages}
        if self.window:
            for slot in range(self.window.n_slots):
                homes = {page for page, _ in self.window.homes(slot, 1)}
                pages |= {self.window.n_prefix + slot} if homes <= mapped else set()
        return frozenset(pages)

    # -- copies and computations in flight ---------------------------------------------------

    def wait(self, end_byte: int) -> None:
        """Hold the caller's computation until bytes up to `end_byte` are there."""
        for load in tuple(self.loads):
            load.wait(end_byte)

    def block_until_copied(self) -> None:
        """Block the host until no copy of this model is in flight."""
        for load in tuple(self.loads):
            load.block_until_ended()
        if self.streamed:
            self.streamed.block_until_ended()

    def block_until_unused(self) -> None:
        """Block the host until nothing writes or reads its frames: others may have them."""
        self.block_until_copied()
        if self.streamed:
            self.streamed.reset()
        self._last_use()

    def note_use(self, fence: Callable[[], None]) -> None:
        """Remember how to wait for the last computation that reads it."""
        self._last_use = fence

    def good_bytes(self) -> int | None:
        """Bytes from its start that are there for sure, when a copy failed; None if none did.

        Blocks until no copy is in flight, if one failed: what comes after the gap is of no use.
        """
        failed = next((load for load in self.loads if load.error), None)
        if failed is None:
            return None
        self.block_until_copied()
        return failed.good_bytes

    @property
    def is_loading(self) -> bool:
        """Whether a load is in flight, or failed and not yet rolled back."""
        return not all(load.arrived for load in tuple(self.loads))

    def forget_arrived(self) -> None:
        """Drop the loads that went well."""
        self.loads = [load for load in self.loads if not load.arrived]

    def begin_stats(self) -> LeaseStats:
        """Return what counts hold-ups, and bytes through the window, from now on."""
        tally = Tally()
        if self.streamed:
            self.streamed.tally = tally
        return LeaseStats([load.stalls for load in self.loads], tally)


def _batches(n_pages: int) -> Iterator[tuple[int, int]]:
    """Split pages into batches, each as (first, after the last).

    The first is one page, so that the link is idle for no longer than it takes to map that; the
    next ones double, since a call to the driver has a price.
    """
    begin, size = 0, 1
    while begin < n_pages:
        end = min(begin + size, n_pages)
        yield begin, end
        begin, size = end, min(2 * size, LARGEST_BATCH)
