"""The pager: it grants leases of models, and loads and evicts their pages.

`Ring` decides what is resident, `PagedModel` maps and copies pages, `Mover` keeps the two
consistent, and `Masters` hold the bytes. Every use of a model needs a lease::

    with pager.lease("llama-7b") as lease:   # missing pages are mapped and start to load
        pager.wait_for("llama-7b", extents)  # before these bytes are read
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from djinn_lib.engine.memory.devices import open_address_space, open_copier
from djinn_lib.engine.memory.devices.base import AddressSpace, Copier
from djinn_lib.engine.memory.frames import n_frames_in
from djinn_lib.engine.memory.layout import Extents
from djinn_lib.engine.memory.lease import Lease, PagerStats
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.mover import Mover
from djinn_lib.engine.memory.paged_model import PagedModel
from djinn_lib.engine.memory.policies import Policy, make_policy
from djinn_lib.engine.memory.ring import Eviction, Ring
from djinn_lib.engine.memory.window import Window
from djinn_lib.errors import ConfigError, DjinnError, LeaseError


class Pager:
    """Moves pages of models through a ring of device memory; safe to use from many threads.

    Args:
        masters: the master copies of all models.
        capacity_bytes: device memory for weights; rounded down to whole frames.
        page_bytes: size of a page and a frame.
        device: device of the frames.
        policy, eviction: which models lose pages, and how many; see `Mover` and `Ring`.

    Raises:
        CapacityError: the capacity is below one page, or the device has less memory.
    """

    def __init__(
        self,
        masters: Masters,
        capacity_bytes: int,
        page_bytes: int,
        device: torch.device,
        policy: str | Policy = "lru",
        eviction: Eviction = "pages",
    ) -> None:
        self._masters, self.page_bytes = masters, page_bytes
        ring = self.ring = Ring(n_frames_in(capacity_bytes, page_bytes), eviction)
        chosen = make_policy(policy)
        self.space: AddressSpace = open_address_space(device, ring.n_frames, page_bytes)
        self.copier: Copier = open_copier(device)
        self._mover = Mover(ring, chosen, self.space, self.copier, masters)
        self._lock, self._is_closed = threading.RLock(), False
        masters.when_reused(self._block_until_copied)

    @property
    def capacity_bytes(self) -> int:
        """Size of all frames together in bytes."""
        return self.ring.n_frames * self.page_bytes

    def add(self, model: str, n_bytes: int, units: Sequence[Extents] = ()) -> torch.Tensor:
        """Reserve addresses for a model; return them as a 1-d uint8 tensor, valid until removal.

        Args:
            model: its name.
            n_bytes: its size.
            units: the bytes that each of its units (layers) needs, for a model larger than the
                ring; default is one unit that needs all bytes.

        Raises:
            CapacityError: it is larger than the ring, and a window for it does not fit either.
            ConfigError: the name is taken, or the pager was closed.
        """
        window = None
        if n_bytes > self.capacity_bytes:
            units = units or [((0, n_bytes),)]
            window = Window.plan(n_bytes, units, self.ring.n_frames, self.page_bytes)
        with self._lock:
            if self._is_closed:
                raise ConfigError(f"the ring was closed before {model!r} was added: make a new one")
            return self._mover.add(model, n_bytes, window).view

    def remove(self, model: str) -> None:
        """Free the frames and addresses of a model; raise `LeaseError` if it is leased."""
        with self._lock:
            self._mover.remove(model)

    def evict(self, model: str) -> int:
        """Unmap all pages of a model, return their bytes; raise `LeaseError` if it is leased."""
        with self._lock:
            return self._mover.evict(model)

    def reset(self) -> None:
        """Unmap all pages and reset the policy; raise `LeaseError` if a model is leased."""
        with self._lock:
            if leased := [model for model in self.ring.models if self.ring.is_leased(model)]:
                raise LeaseError(f"expected no leased models, got {leased}: release them first")
            self._mover.reset()

    def lease(self, model: str) -> Lease:
        """Start to load every missing page of `model`, and protect its pages from eviction.

        Returns as soon as the copies are queued; use `wait` before bytes are read.

        Raises:
            ConfigError: the model is unknown.
            CapacityError: other leases hold the frames that it needs.
        """
        begin_s = time.perf_counter()
        with self._held(model):
            paged, resident_bytes = self._mover[model], self.resident_bytes(model)
            evicted_bytes = self._mover.load(model, self.ring.n_missing(model))
            stats = paged.begin_stats()
            stats.prefetched_bytes = paged.prefetched_bytes
            stats.resident_before_bytes = max(0, resident_bytes - paged.prefetched_bytes)
            stats.mapped_bytes = self.resident_bytes(model) - resident_bytes
            stats.evicted_bytes = paged.evicted_for_it_bytes + evicted_bytes
            paged.prefetched_bytes = paged.evicted_for_it_bytes = 0
            self._mover.policy.touch(model, time.monotonic())
            if paged.window:  # it reads its master while it runs
                self._masters.hold(model, lasting=True)
            self.ring.lease(model)
        stats.plan_s = time.perf_counter() - begin_s
        return Lease(model, stats, self._release)

    def prefetch(self, model: str, spare: Collection[str] = ()) -> int:
        """Load pages of a model without evicting pages of leased or spared models.

        If no model is leased, this does nothing: the next lease gets the frames.

        Args:
            model: a model that will be leased soon.
            spare: models that keep their pages, since they will be leased sooner.

        Returns:
            Number of bytes whose copies were started.
        """
        spared = frozenset(spare)
        with self._held(model):
            paged, before = self._mover[model], self.resident_bytes(model)
            if not self.ring.any_leased:
                return 0
            evicted = self._mover.load(model, self.ring.n_loadable(model, spared), spared)
            n_bytes = self.resident_bytes(model) - before
            paged.prefetched_bytes += n_bytes
            paged.evicted_for_it_bytes += evicted
            return n_bytes

    def expect(self, upcoming: Sequence[str]) -> None:
        """Tell the policy which models will be leased next, the first one first."""
        with self._lock:
            self._mover.policy.expect(upcoming)

    def wait(self, model: str, end_byte: int | None = None) -> None:
        """Make the caller's computation wait for the first `end_byte` bytes of `model`.

        For a model larger than the ring, this covers only its prefix; see `wait_for`.

        Args:
            model: a leased model.
            end_byte: default is all bytes.

        Raises:
            ConfigError: the model is unknown.
            LeaseError: the model is not leased, so its pages may have been evicted.
            DjinnError: the copy failed.
        """
        paged = self._mover[model]
        self._wait_stable(paged, paged.n_bytes if end_byte is None else end_byte)

    def wait_for(self, model: str, extents: Extents) -> None:
        """Like `wait`, for all bytes that a unit of `model` needs.

        They stay resident while the model is leased. For a model larger than the ring they stay
        until the next call for the same model.
        """
        paged = self._mover[model]
        self._wait_stable(paged, extents[-1][1])
        if paged.streamed:
            paged.streamed.wait(extents)

    def block_until_loaded(self, model: str) -> None:
        """Block the host until everything that `wait` covers is on the device.

        Raises:
            LeaseError: the model is not leased.
            DjinnError: the copy failed.
        """
        for load in tuple(self._mover[model].loads):
            load.block_until_ended()
        self.wait(model)

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
        """Whether a model is larger than the ring, so its layers use a window."""
        return self._mover[model].window is not None

    def is_resident(self, model: str) -> bool:
        """Whether all pages are loaded or being copied; takes no lock and never raises."""
        return self.ring.is_whole(model)

    def resident_bytes(self, model: str) -> int:
        """Bytes of `model` that are mapped; of the last page only the bytes that it uses."""
        return self._mover.resident_bytes(model)

    def stats(self) -> PagerStats:
        """Return the current state."""
        with self._lock:
            models = self._mover.models.items()
            return PagerStats(
                self.ring.n_free,
                frozenset(model for model, _ in models if self.ring.is_leased(model)),
                frozenset(model for model, paged in models if paged.is_loading),
                frozenset(model for model, paged in models if paged.streamed),
                {model: self.resident_bytes(model) for model, _ in models},
                {model: self.ring.frames(model) for model, _ in models},
                self._masters.sizes(),
            )

    def check(self) -> None:
        """Audit page tables, mappings and resident bytes; raises `AssertionError`."""
        with self._lock:
            self._mover.check()

    def is_intact(self, model: str) -> bool:
        """Whether the resident bytes of a model equal its master; as slow as loading it."""
        with self._lock:
            return self._mover.is_intact(model)

    def close(self) -> None:
        """Wait for copies and release all device memory; its tensors must not be used again."""
        try:
            self.copier.close()
        except Exception:
            self._free()
            raise
        self._free()  # not after an interrupt: copies may be in flight

    def _free(self) -> None:
        with self._lock:
            self._is_closed = True
            self._mover.models.clear()
            self.space.close()

    @contextmanager
    def _held(self, model: str) -> Iterator[None]:
        """Take the lock, once all missing bytes of a model are in host memory.

        Reading them from disk can take seconds, and other threads must be able to use the pager
        meanwhile. The model may lose pages during that time, so the state is checked again.
        """
        held = False
        try:
            while True:
                with self._lock:
                    self._mover.settle(model)
                    if held or not (self.ring.n_missing(model) or self.is_streamed(model)):
                        yield
                        return
                self._masters.hold(model)
                held = True
        finally:
            if held:
                self._masters.let_go(model)

    def _release(self, model: str) -> None:
        with self._lock:
            if (paged := self._mover.models.get(model)) is None:
                return  # the pager was closed while the lease was held
            try:
                paged.note_use(self.copier.fence())
            finally:
                self.ring.release(model)
                if paged.window:
                    self._masters.let_go(model, lasting=True)
            self._mover.settle()

    def _block_until_copied(self, model: str) -> None:
        if paged := self._mover.models.get(model):
            paged.block_until_copied()
