"""Carry out decisions of the ring: map, copy and unmap pages, and roll back after errors.

`Ring` decides, `PagedModel` maps and copies. The mover keeps both consistent. It takes no lock; the
pager does.
"""

from __future__ import annotations

from djinn_lib.engine.memory.devices.base import AddressSpace, Copier
from djinn_lib.engine.memory.frames import Extent
from djinn_lib.engine.memory.interrupts import held_back
from djinn_lib.engine.memory.masters import Masters
from djinn_lib.engine.memory.paged_model import PagedModel
from djinn_lib.engine.memory.policies import Policy
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.engine.memory.window import Window
from djinn_lib.errors import ConfigError


class Mover:
    """Keeps page tables, mappings and copies of all models consistent.

    Args:
        ring: the page tables.
        policy: orders victims.
        space, copier: address space and copier of the device.
        masters: the master copies of all models.
    """

    def __init__(
        self, ring: Ring, policy: Policy, space: AddressSpace, copier: Copier, masters: Masters
    ) -> None:
        self.ring, self.policy, self.page_bytes = ring, policy, space.page_bytes
        self._space, self._copier, self._masters = space, copier, masters
        self.models: dict[str, PagedModel] = {}

    @held_back()
    def add(self, model: str, n_bytes: int, window: Window | None) -> PagedModel:
        """Reserve addresses for a model; after an error nothing is left."""
        n_pages = window.n_frames if window else -(-n_bytes // self.page_bytes)
        self.ring.add(model, n_pages)
        try:
            self.policy.admit(model, n_pages, self.ring.n_frames)
            paged = PagedModel(model, n_bytes, window, self._space, self._copier, self._masters)
        except BaseException:
            self.policy.forget(model)
            self.ring.remove(model)
            raise
        self.models[model] = paged
        return paged

    @held_back()
    def remove(self, model: str) -> None:
        """Free the frames and the addresses of an unleased model."""
        self.ring.ensure_unleased(model)
        self.settle()
        self[model].release()
        self.ring.remove(model)
        del self.models[model]
        self.policy.forget(model)

    def reset(self) -> None:
        """Evict all models, none of which may be leased, and reset the policy."""
        for model in self.models:
            self.evict(model)
            self.policy.forget(model)
        for model in self.models:
            self.policy.admit(model, self.ring.n_pages(model), self.ring.n_frames)

    def __getitem__(self, model: str) -> PagedModel:
        """Return a model by name.

        Raises:
            ConfigError: there is no such model.
        """
        if (paged := self.models.get(model)) is None:
            raise ConfigError(
                f"expected one of the models {list(self.models)}, got {model!r}: add it first"
            )
        return paged

    def resident_bytes(self, model: str) -> int:
        """Bytes of `model` that are mapped; of the last page only the bytes that it uses."""
        return self[model].bytes_of(0, self.ring.n_resident(model))

    def load(self, model: str, n_pages: int, spare: frozenset[str] = frozenset()) -> int:
        """Evict pages of others, map pages and start copies; return the evicted bytes.

        After an error the model is as before. Pages that were evicted stay evicted.
        """
        return self._load(model, n_pages, spare) if n_pages else 0

    @held_back()
    def _load(self, model: str, n_pages: int, spare: frozenset[str]) -> int:
        evicted = self.ring.make_room(model, self.policy, n_pages, spare)
        try:
            for extent in evicted:
                self.models[extent.model].block_until_unused()
            missing = self.ring.map_missing(model, n_pages)
            try:
                self.models[model].load(missing)
            except BaseException:
                self.ring.roll_back(model, n_pages)
                raise
        finally:  # after the copies started: briefly a frame has two addresses
            for extent in evicted:
                self.models[extent.model].unmap(extent.first_page, len(extent.frames))
        return sum(self._bytes_of(extent) for extent in evicted)

    @held_back()
    def evict(self, model: str) -> int:
        """Unmap all pages of an unleased model; return their bytes."""
        self.ring.ensure_unleased(model)
        self.settle()
        paged, n_bytes = self[model], self.resident_bytes(model)
        paged.block_until_unused()
        extent = self.ring.evict(model, self.ring.n_resident(model))
        paged.unmap(0, len(extent.frames))
        paged.prefetched_bytes = 0
        return n_bytes

    def settle(self, wanted: str | None = None) -> None:
        """Unmap pages whose copies failed, of `wanted` and of all unleased models.

        A leased model keeps its pages; `wait` raises the error where its bytes are used.
        """
        for model, paged in self.models.items():
            paged.forget_arrived()
            if paged.loads and (model == wanted or not self.ring.is_leased(model)):
                good_bytes = paged.good_bytes()
                if good_bytes is not None:
                    self._roll_back(model, good_bytes)

    @held_back()
    def _roll_back(self, model: str, good_bytes: int) -> None:
        paged, n_good = self.models[model], good_bytes // self.page_bytes
        n_bad = max(0, self.ring.n_resident(model) - n_good)
        paged.block_until_unused()
        self.ring.roll_back(model, n_bad)
        paged.unmap(n_good, n_bad)
        paged.loads.clear()
        paged.prefetched_bytes = min(paged.prefetched_bytes, self.resident_bytes(model))

    def check(self) -> None:
        """Audit page tables, mappings and bytes; blocks until no copy is in flight.

        Raises:
            AssertionError: naming the model, and the first byte that differs from its master.
        """
        for paged in self.models.values():
            paged.block_until_copied()
        self.settle()
        self.ring.check()
        for model, paged in self.models.items():
            if paged.ring_pages != frozenset(range(self.ring.n_resident(model))):
                raise AssertionError(f"pages of {model!r} are mapped that its table does not list")
            if paged.streamed:
                paged.streamed.rotation.check()
            paged.check_bytes(self.resident_bytes(model))

    def is_intact(self, model: str) -> bool:
        """Whether the resident bytes of a model equal their master."""
        self[model].block_until_copied()
        self.settle()
        try:
            self[model].check_bytes(self.resident_bytes(model))
        except AssertionError:
            return False
        return True

    def _bytes_of(self, extent: Extent) -> int:
        return self.models[extent.model].bytes_of(extent.first_page, len(extent.frames))
