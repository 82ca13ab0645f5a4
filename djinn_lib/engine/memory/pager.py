"""The pager: keeps page tables, mappings and bytes in step.

`Ring` decides, `AddressSpace` maps, `Copier` copies, a page source (`SwapPool`) has the master
bytes; the pager is the only place where the four meet. Every use of a model goes through a lease::

    with pager.lease("llama-7b") as lease:   # missing pages are mapped and start to load
        pager.wait_for("llama-7b", extents)  # before these bytes are read
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from djinn_lib.engine.memory.devices.address_space import AddressSpace, open_address_space
from djinn_lib.engine.memory.devices.copier import Copier, open_copier
from djinn_lib.engine.memory.lease import Lease
from djinn_lib.engine.memory.masters import Extents
from djinn_lib.engine.memory.page_source import PageSource
from djinn_lib.engine.memory.paged_model import PagedModel
from djinn_lib.engine.memory.policies import Policy, make_policy
from djinn_lib.engine.memory.ring import Extent, Residency, Ring, n_frames_in
from djinn_lib.engine.memory.window import Window
from djinn_lib.errors import ConfigError, DjinnError, LeaseError


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
        self.ring = Ring(n_frames_in(capacity_bytes, page_bytes), residency)
        self.space: AddressSpace = open_address_space(device, self.ring.n_frames, page_bytes)
        self.copier: Copier = open_copier(device)
        self._models: dict[str, PagedModel] = {}
        self._lock = threading.RLock()
        source.when_reused(self._finish_copies)

    @property
    def capacity_bytes(self) -> int:
        """Size of all frames together in bytes."""
        return self.ring.n_frames * self.page_bytes

    def add(self, model: str, n_bytes: int, units: Sequence[Extents] = ()) -> torch.Tensor:
        """Reserve addresses for a model and return them as a 1-d uint8 tensor, for life.

        Args:
            model: its name.
            n_bytes: its size.
            units: the bytes that each of its units needs, for a model larger than the ring;
                default is one unit that needs all.

        Raises:
            CapacityError: it is larger than the ring, and so is what has to be there at once.
        """
        window = None
        if n_bytes > self.capacity_bytes:
            units = units or [((0, n_bytes),)]
            window = Window.plan(n_bytes, units, self.ring.n_frames, self.page_bytes)
        with self._lock:
            n_pages = window.n_frames if window else -(-n_bytes // self.page_bytes)
            self.ring.add(model, n_pages)
            try:
                self.policy.admit(model, n_pages, self.ring.n_frames)
                paged = PagedModel(model, n_bytes, window, self.space, self.copier, self._source)
            except BaseException:
                self.policy.forget(model)
                self.ring.remove(model)
                raise
            self._models[model] = paged
            return paged.view

    def remove(self, model: str) -> None:
        """Free the frames and the addresses of an unleased model.

        Raises:
            LeaseError: the model is leased; nothing changes.
        """
        with self._lock:
            self.ring.ensure_unleased(model)
            self._settle()
            self._models[model].release()
            self.ring.remove(model)
            del self._models[model]
            self.policy.forget(model)

    def evict(self, model: str) -> int:
        """Unmap all pages of an unleased model; returns their bytes.

        Raises:
            LeaseError: the model is leased.
        """
        with self._lock:
            self.ring.ensure_unleased(model)
            self._settle()
            paged, n_bytes = self._models[model], self.resident_bytes(model)
            paged.finish_use()
            extent = self.ring.evict(model, self.ring.n_resident(model))
            paged.unmap(0, len(extent.frames))
            paged.prefetched_bytes = 0
            return n_bytes

    def reset(self) -> None:
        """Unmap all pages, and have the policy begin anew: a repeat that starts cold knows nothing.

        Raises:
            LeaseError: a model is leased; nothing was done.
        """
        with self._lock:
            if leased := [model for model in self._models if self.ring.is_leased(model)]:
                raise LeaseError(f"expected no leased models, got {leased}: release them first")
            for model in self._models:
                self.evict(model)
                self.policy.forget(model)
            for model in self._models:
                self.policy.admit(model, self.ring.n_pages(model), self.ring.n_frames)

    def lease(self, model: str) -> Lease:
        """Make every page of `model` resident or on its way, and protect it.

        Returns as soon as the copies are under way; `wait` holds back whoever needs the bytes.

        Raises:
            ConfigError: the model was never added.
            CapacityError: other leases hold the frames that it needs.
        """
        lease = Lease(model, self._release)
        begin_s = time.perf_counter()
        with self._held(model):
            paged = self._models[model]
            lease.prefetched_bytes = paged.prefetched_bytes
            resident_bytes = self.resident_bytes(model)
            lease.resident_before_bytes = max(0, resident_bytes - paged.prefetched_bytes)
            evicted = self._load(model, self.ring.n_missing(model))
            lease.mapped_bytes = self.resident_bytes(model) - resident_bytes
            lease.evicted_bytes = paged.evicted_for_it_bytes + evicted
            paged.prefetched_bytes = paged.evicted_for_it_bytes = 0
            lease.stalls, lease.streamed_bytes = paged.begin_clock()
            self.policy.touch(model, time.monotonic())
            if paged.window:  # it reads its master as long as it runs
                self._source.hold(model, lasting=True)
            self.ring.lease(model)
        lease.plan_s = time.perf_counter() - begin_s
        return lease

    def prefetch(self, model: str, spare: Collection[str] = ()) -> int:
        """Load what can be loaded of a model without taking pages from leased or spared ones.

        Without a lease nothing is done: then the frames are for the lease that comes next.

        Args:
            model: that will be leased soon.
            spare: models that keep their pages, since they will be leased sooner.

        Returns:
            How many bytes are on their way.
        """
        spared = frozenset(spare)
        with self._held(model):
            paged, before = self._models[model], self.resident_bytes(model)
            if not self.ring.any_leased:
                return 0
            evicted = self._load(model, self.ring.n_loadable(model, spared), spared)
            n_bytes = self.resident_bytes(model) - before
            paged.prefetched_bytes += n_bytes
            paged.evicted_for_it_bytes += evicted
            return n_bytes

    def expect(self, upcoming: Sequence[str]) -> None:
        """Tell the policy which models will be leased next, the first one first."""
        with self._lock:
            self.policy.expect(upcoming)

    def wait(self, model: str, end_byte: int) -> None:
        """Hold the caller's computation until the first `end_byte` bytes of `model` are there.

        Of a model larger than the ring, only what stays on the device; see `wait_for`.

        Raises:
            ConfigError: the model was never added, or is removed.
            LeaseError: the model holds no lease, so its pages may be gone.
            DjinnError: the copy failed.
        """
        self._wait_stable(self._known(model), end_byte)

    def wait_for(self, model: str, extents: Extents) -> None:
        """Like `wait`, for all bytes that a unit of `model` needs.

        They stay until the next call for the same model; of a model that fits into the ring, as
        long as it is leased.
        """
        paged = self._known(model)
        self._wait_stable(paged, extents[-1][1])
        if paged.streamed:
            paged.streamed.wait(extents)

    def wait_whole(self, model: str) -> None:
        """Like `wait`, for all that stays on the device while the model is leased."""
        self.wait(model, self._known(model).n_bytes)

    def finish(self, model: str) -> None:
        """Block the host until that is on the device; `wait` need not block it.

        Raises:
            LeaseError: the model holds no lease.
            DjinnError: the copy failed.
        """
        for load in tuple(self._known(model).loads):
            load.finish()
        self.wait_whole(model)

    def _wait_stable(self, paged: PagedModel, end_byte: int) -> None:
        if not self.ring.is_leased(paged.name):
            raise LeaseError(
                f"expected a lease on {paged.name!r} while its weights are used, got none: "
                "use the model inside `with djinn.lease(name) as model:`"
            )
        paged.wait(end_byte)
        n_bytes = min(end_byte, paged.bytes_of(0, paged.n_stable_pages))
        if n_bytes > (n_resident_bytes := self.resident_bytes(paged.name)):
            raise DjinnError(
                f"expected {n_bytes} resident bytes of {paged.name!r}, got {n_resident_bytes}: "
                "their copy failed; try the request again"
            )

    def is_streamed(self, model: str) -> bool:
        """Whether a model is larger than the ring, so that its layers take turns."""
        return self._known(model).window is not None

    def is_resident(self, model: str) -> bool:
        """Whether a model is whole on the device or on its way; takes no lock and never raises."""
        return self.ring.is_whole(model)

    def resident_bytes(self, model: str) -> int:
        """Bytes of `model` that are mapped; the last page counts what the model fills of it."""
        return self._known(model).bytes_of(0, self.ring.n_resident(model))

    def _known(self, model: str) -> PagedModel:
        if (paged := self._models.get(model)) is None:
            raise ConfigError(
                f"expected one of the models {list(self._models)}, got {model!r}: add it first"
            )
        return paged

    def check(self) -> None:
        """Audit the ring, and that all resident bytes equal their masters.

        Raises:
            AssertionError: naming the model and the first byte that differs.
        """
        with self._lock:
            for paged in self._models.values():
                paged.finish_copies()
            self._settle()
            self.ring.check()
            for model, paged in self._models.items():
                paged.check_bytes(self.resident_bytes(model))

    def is_intact(self, model: str) -> bool:
        """Whether the resident bytes of a model equal their master; takes as long as loading it."""
        with self._lock:
            self._models[model].finish_copies()
            self._settle()
            try:
                self._models[model].check_bytes(self.resident_bytes(model))
            except AssertionError:
                return False
            return True

    def close(self) -> None:
        """Finish copies and release all device memory. Tensors over it must not be used again."""
        try:
            self.copier.close()
        finally:
            with self._lock:
                self._models.clear()
                self.space.close()

    # -- steps of a lease --------------------------------------------------------------------

    @contextmanager
    def _held(self, model: str) -> Iterator[None]:
        """Take the lock, with all that is missing of a model in host memory.

        Reading it from disk can take seconds, in which others must be able to use the pager; while
        it is being read the model may lose more pages, so that is looked up again.
        """
        held = False
        try:
            while True:
                with self._lock:
                    self._settle(model)
                    if held or not (self.ring.n_missing(model) or self.is_streamed(model)):
                        yield
                        return
                self._source.hold(model)
                held = True
        finally:
            if held:
                self._source.let_go(model)

    def _settle(self, wanted: str | None = None) -> None:
        """Bring the ring in step with the copies, so that every page it lists has its bytes."""
        for model, paged in self._models.items():
            paged.forget_ended()
            if paged.loads and (model == wanted or not self.ring.is_leased(model)):
                good_bytes = paged.good_bytes()
                if good_bytes is not None:
                    self._roll_back(model, good_bytes)

    def _load(self, model: str, n_pages: int, spare: frozenset[str] = frozenset()) -> int:
        """Take frames from others, map and start to copy; returns the bytes that others lost."""
        evicted = self.ring.make_room(model, self.policy, n_pages, spare)
        try:
            for extent in evicted:
                self._models[extent.model].finish_use()
            if n_pages:
                missing = self.ring.map_missing(model, n_pages)
                try:
                    self._models[model].load(missing)
                except BaseException:
                    self.ring.roll_back(model, n_pages)
                    raise
        finally:  # after the copies began: for a moment a frame has two addresses
            for extent in evicted:
                self._models[extent.model].unmap(extent.first_page, len(extent.frames))
        return sum(self._extent_bytes(extent) for extent in evicted)

    def _roll_back(self, model: str, good_bytes: int) -> None:
        """Take back the pages that a failed copy left without their bytes."""
        paged, n_good = self._models[model], good_bytes // self.page_bytes
        n_bad = max(0, self.ring.n_resident(model) - n_good)
        paged.finish_use()
        self.ring.roll_back(model, n_bad)
        paged.unmap(n_good, n_bad)
        paged.loads.clear()
        paged.prefetched_bytes = min(paged.prefetched_bytes, self.resident_bytes(model))

    def _release(self, model: str) -> None:
        with self._lock:
            if (paged := self._models.get(model)) is None:
                return  # the pager was closed while the lease was held
            try:
                paged.note_use(self.copier.fence())
            finally:
                self.ring.release(model)
                if paged.window:
                    self._source.let_go(model, lasting=True)
            self._settle()

    def _finish_copies(self, model: str) -> None:
        if paged := self._models.get(model):
            paged.finish_copies()

    def _extent_bytes(self, extent: Extent) -> int:
        """Bytes of the model in an extent: whole pages, but for the model's last one."""
        return self._models[extent.model].bytes_of(extent.first_page, len(extent.frames))
