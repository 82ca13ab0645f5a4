"""The pager: keeps page tables, mappings and bytes in step.

`Ring` decides, `AddressSpace` maps, `Copier` copies, a page source (`SwapPool`) has the master
bytes; the pager is the only place where the four meet. Every use of a model goes through a lease::

    with pager.lease("llama-7b") as lease:   # missing pages are mapped and start to load
        pager.wait("llama-7b", end_byte)     # before the bytes up to there are read
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from djinn_lib.address_space import AddressSpace, Range, open_address_space
from djinn_lib.copier import Copier, Load, open_copier
from djinn_lib.errors import CapacityError, ConfigError, DjinnError, LeaseError
from djinn_lib.lease import Lease
from djinn_lib.policy import Policy, make_policy
from djinn_lib.ring import Extent, Residency, Ring
from djinn_lib.units import format_bytes

LARGEST_BATCH = 16  # pages mapped at once; a page of 64 MiB is copied in the time of as many


class PageSource(Protocol):
    """Where pages come from: host memory today; disk or a neighbour's GPU fit behind this."""

    def page_source(self, model: str) -> torch.Tensor:
        """The packed bytes of `model` (1-d uint8)."""
        ...


@dataclass
class _Paged:
    """What the pager knows of one model."""

    n_bytes: int
    area: Range
    view: torch.Tensor


class Pager:
    """Moves pages of models through a ring of device memory; safe to use from many threads.

    Args:
        source: where the bytes of a model come from.
        capacity_bytes: device memory for weights; rounded down to whole frames.
        page_bytes: size of a page and a frame.
        device: where the frames are.
        policy: who loses pages, by name or as an object.
        residency: whether victims lose only what is needed ("partial") or everything ("whole").

    Raises:
        CapacityError: the capacity is below one page, or the device has less memory.
    """

    def __init__(
        self,
        source: PageSource,
        capacity_bytes: int,
        page_bytes: int,
        device: torch.device,
        policy: str | Policy = "lru",
        residency: Residency = "partial",
    ) -> None:
        self._source = source
        self.page_bytes = page_bytes
        self.policy = make_policy(policy)
        self.ring = _sized_ring(capacity_bytes, page_bytes, residency)
        self.space: AddressSpace = open_address_space(device, self.ring.n_frames, page_bytes)
        self.copier: Copier = open_copier(device)
        self._models: dict[str, _Paged] = {}
        self._fences: dict[str, Callable[[], None]] = {}  # the last use of each model
        self._loads: dict[str, Load] = {}  # copies in flight, or failed and not yet rolled back
        self._lock = threading.RLock()

    @property
    def capacity_bytes(self) -> int:
        """Size of all frames together in bytes."""
        return self.ring.n_frames * self.page_bytes

    def add(self, model: str, n_bytes: int) -> torch.Tensor:
        """Reserve addresses for a model and return them as a 1-d uint8 tensor, for life.

        Raises:
            CapacityError: the model alone is larger than the ring.
        """
        n_pages = -(-n_bytes // self.page_bytes)
        if n_pages > self.ring.n_frames:
            raise CapacityError(
                f"expected a model of at most {format_bytes(self.capacity_bytes)} (the ring's "
                f"{self.ring.n_frames} frames), got {model!r} with {format_bytes(n_bytes)}: "
                "raise the capacity"
            )
        with self._lock:
            self.ring.add(model, n_pages)
            try:
                area = self.space.reserve(n_pages)
            except BaseException:
                self.ring.remove(model)
                raise
            self.policy.admit(model, n_pages, self.ring.n_frames)
            paged = self._models[model] = _Paged(n_bytes, area, self.space.bytes_view(area))
            return paged.view

    def remove(self, model: str) -> None:
        """Free the frames and the addresses of an unleased model."""
        with self._lock:
            self._settle()
            self.ring.remove(model)
            self.policy.forget(model)
            self._fence(model)
            self._fences.pop(model, None)
            self.space.release(self._models.pop(model).area)

    def evict(self, model: str) -> int:
        """Unmap all pages of an unleased model; returns their bytes.

        Raises:
            LeaseError: the model is leased.
        """
        with self._lock:
            self._settle()
            n_bytes = self.resident_bytes(model)
            extent = self.ring.evict(model, self.ring.n_resident(model))
            self._unmap(model, 0, len(extent.frames))
            return n_bytes

    def lease(self, model: str) -> Lease:
        """Make every page of `model` resident or on its way, and protect it.

        Returns as soon as the copies are under way; `wait` holds back whoever needs the bytes.

        Raises:
            ConfigError: the model was never added.
            CapacityError: other leases hold the frames that it needs.
        """
        lease = Lease(model, self._release)
        begin_s = time.perf_counter()
        with self._lock:
            self._settle(model)
            lease.resident_before_bytes = self.resident_bytes(model)
            evicted = self._make_room(model)
            lease.evicted_bytes = sum(self._extent_bytes(extent) for extent in evicted)
            try:
                missing = self.ring.map_missing(model)
                if missing.frames:
                    lease.load = self._start_load(model, missing)
            finally:  # after the copies began: for a moment a frame has two addresses
                for extent in evicted:
                    area = self._models[extent.model].area
                    self.space.unmap(area, extent.first_page, len(extent.frames))
            lease.loaded_bytes = self._extent_bytes(missing)
            self.ring.lease(model)
            self.policy.touch(model, time.monotonic())
        lease.plan_s = time.perf_counter() - begin_s
        return lease

    def wait(self, model: str, end_byte: int) -> None:
        """Hold the caller's computation until the first `end_byte` bytes of `model` are there.

        Raises:
            LeaseError: the model holds no lease, so its pages may be gone.
            DjinnError: the copy failed.
        """
        if not self.ring.is_leased(model):
            raise LeaseError(
                f"expected a lease on {model!r} while its weights are used, got none: "
                "use the model inside `with djinn.lease(name) as model:`"
            )
        if load := self._loads.get(model):
            load.wait(end_byte)
        if end_byte > self.resident_bytes(model):
            raise DjinnError(
                f"expected {end_byte} resident bytes of {model!r}, got "
                f"{self.resident_bytes(model)}: their copy failed; try the request again"
            )

    def finish(self, model: str) -> None:
        """Block the host until all of `model` is on the device; `wait` need not block it.

        Raises:
            LeaseError: the model holds no lease.
            DjinnError: the copy failed.
        """
        if load := self._loads.get(model):
            load.finish()
        self.wait(model, self.n_bytes(model))

    def resident_bytes(self, model: str) -> int:
        """Bytes of `model` that are mapped; the last page counts what the model fills of it."""
        return min(self.ring.n_resident(model) * self.page_bytes, self._models[model].n_bytes)

    def n_bytes(self, model: str) -> int:
        """Bytes of `model`, resident or not."""
        return self._models[model].n_bytes

    def check(self) -> None:
        """Audit the ring, and that all resident bytes equal their masters.

        Raises:
            AssertionError: naming the model and the first byte that differs.
        """
        with self._lock:
            for load in self._loads.values():
                load.finish()
            self._settle()
            self.ring.check()
            for model, paged in self._models.items():
                n_bytes = self.resident_bytes(model)
                held, master = paged.view[:n_bytes].cpu(), self._source.page_source(model)[:n_bytes]
                if not torch.equal(held, master):
                    first = int((held != master).int().argmax())
                    raise AssertionError(f"{model!r} differs from its master at byte {first}")

    def close(self) -> None:
        """Finish copies and release all device memory. Tensors over it must not be used again."""
        self.copier.close()
        with self._lock:
            self._models.clear()
            self.space.close()

    # -- steps of a lease, under the lock --------------------------------------------------

    def _settle(self, wanted: str | None = None) -> None:
        """Bring the ring in step with the copies, so that every page it lists has its bytes.

        Only a copy that somebody still waits for may stay in flight: frames under a copy whose
        lease was given up early (an exception, say) must not go to another model.
        """
        for model, load in list(self._loads.items()):
            leased = self.ring.is_leased(model)
            if not leased:
                load.finish()
            if load.error and (model == wanted or not leased):
                self._roll_back(model, load.good_bytes)
                del self._loads[model]
            elif load.ended and not load.error:
                del self._loads[model]

    def _make_room(self, model: str) -> list[Extent]:
        """Take frames from others, and wait until the work that read them is done."""
        evicted = self.ring.make_room(model, self.policy)
        for extent in evicted:
            self._fence(extent.model)
        return evicted

    def _fence(self, model: str) -> None:
        """Wait for the last use of a model, which is long past as a rule."""
        if fence := self._fences.get(model):
            fence()

    def _unmap(self, model: str, first_page: int, n_pages: int) -> None:
        if n_pages:
            self._fence(model)
        self.space.unmap(self._models[model].area, first_page, n_pages)

    def _start_load(self, model: str, extent: Extent) -> Load:
        source, first_byte = self._source.page_source(model), extent.first_page * self.page_bytes
        mapped = self._map(model, extent)
        view = self._models[model].view
        try:
            load = self.copier.start(source, view, first_byte, self.page_bytes, mapped)
        except BaseException:
            self.ring.roll_back(model, len(extent.frames))
            self.space.unmap(self._models[model].area, extent.first_page, len(extent.frames))
            raise
        self._loads[model] = load
        return load

    def _map(self, model: str, extent: Extent) -> Iterator[int]:
        """Map the pages of an extent in batches, and give the size of each batch.

        A batch is mapped while earlier ones are copied. The first is one page, so that the link is
        idle for no longer than that; the next ones double, since a call to the driver has a price.
        """
        area, begin, n_pages = self._models[model].area, 0, 1
        while begin < len(extent.frames):
            frames = extent.frames[begin : begin + n_pages]
            self.space.map(area, extent.first_page + begin, frames)
            yield len(frames)
            begin, n_pages = begin + len(frames), min(2 * n_pages, LARGEST_BATCH)

    def _roll_back(self, model: str, good_bytes: int) -> None:
        """Take back the pages that a failed copy left without their bytes."""
        n_good = good_bytes // self.page_bytes
        n_bad = self.ring.n_resident(model) - n_good
        self.ring.roll_back(model, n_bad)
        self._unmap(model, n_good, n_bad)

    def _release(self, model: str) -> None:
        with self._lock:
            self._fences[model] = self.copier.fence()
            self.ring.release(model)
            if model in self._loads and self._loads[model].ended:
                self._settle()

    def _extent_bytes(self, extent: Extent) -> int:
        """Bytes of the model in an extent: whole pages, but for the model's last one."""
        begin = extent.first_page * self.page_bytes
        end = begin + len(extent.frames) * self.page_bytes
        return max(0, min(end, self._models[extent.model].n_bytes) - begin)


def _sized_ring(capacity_bytes: int, page_bytes: int, residency: Residency) -> Ring:
    if page_bytes < 1:
        raise ConfigError(f"expected a page size of at least 1 byte, got {page_bytes}")
    if capacity_bytes < page_bytes:
        raise CapacityError(
            f"expected a capacity of at least one page ({format_bytes(page_bytes)}), got "
            f"{format_bytes(capacity_bytes)}: raise the capacity or choose smaller pages"
        )
    return Ring(capacity_bytes // page_bytes, residency)
