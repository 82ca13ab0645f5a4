"""The ring: it records which frame of device memory holds which page of which model.

This is only bookkeeping, without torch. All decisions about residency are made here, and the code
that moves bytes carries them out. The terms are those of operating systems. A *frame* is one of
`n_frames` equal pieces of device memory; a *page* is an equally large piece of a model's packed
weights; a *page table* says which frame holds a page.

Two invariants make the ring small enough to reason about:

* **Prefix residency.** The resident pages of a model are always its first ones. Weights are packed
  in execution order, so a partly resident model can start to compute at once while its tail
  is loaded. A page table is therefore just a list of frames.
* **Weights are read-only.** Evicting a page frees its frame; nothing is ever written back.

Free frames are in a queue, in the order in which they were freed. A frame is therefore reused as
late as possible, so computations that read its old page have had the longest time to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal, Protocol

from djinn_lib.engine.memory.frames import Extent
from djinn_lib.errors import CapacityError, ConfigError, LeaseError

Eviction = Literal["pages", "models"]


class VictimOrder(Protocol):
    """The part of an eviction policy that the ring uses (see `memory.policies`)."""

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Yield models of `candidates` in the order in which they should lose pages."""
        ...


class Ring:
    """Page tables over `n_frames` frames.

    Args:
        n_frames: number of frames, at least 1.
        eviction: ``"pages"`` evicts only as many pages of victims as needed, from the tail;
            ``"models"`` evicts all pages of a victim, like a cache of whole models.
    """

    def __init__(self, n_frames: int, eviction: Eviction = "pages") -> None:
        if n_frames < 1:
            raise CapacityError(
                f"expected a ring of at least 1 frame, got {n_frames}: "
                "raise the capacity or choose smaller pages"
            )
        if eviction not in ("pages", "models"):
            raise ConfigError(f"expected eviction 'pages' or 'models', got {eviction!r}")
        self.n_frames = n_frames
        self.eviction: Eviction = eviction
        self._free: deque[int] = deque(range(n_frames))
        self._n_pages: dict[str, int] = {}
        self._tables: dict[str, list[int]] = {}
        self._leases: dict[str, int] = {}
        self._resident: set[str] = set()  # models with at least one page: possible victims

    # -- residency ------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """All models, in order of addition."""
        return tuple(self._n_pages)

    def __contains__(self, model: str) -> bool:
        return model in self._n_pages

    @property
    def n_free(self) -> int:
        """Number of free frames."""
        return len(self._free)

    def n_pages(self, model: str) -> int:
        """Number of pages of `model`, resident or not."""
        return self._n_pages[self._known(model)]

    def n_resident(self, model: str) -> int:
        """Number of resident pages of `model`; they are its first ones."""
        return len(self._tables[self._known(model)])

    def n_missing(self, model: str) -> int:
        """Number of pages of `model` that are not resident."""
        return self.n_pages(model) - self.n_resident(model)

    def is_whole(self, model: str) -> bool:
        """Whether every page of `model` is resident; False for an unknown model.

        Thread-safe without a lock, because it reads each table only once.
        """
        table, n_pages = self._tables.get(model), self._n_pages.get(model)
        return table is not None and len(table) == n_pages

    def frames(self, model: str) -> tuple[int, ...]:
        """The page table of `model`: the frame of each resident page, in page order."""
        return tuple(self._tables[self._known(model)])

    def is_leased(self, model: str) -> bool:
        """Whether a lease protects the pages of `model` from eviction."""
        return self._leases[self._known(model)] > 0

    @property
    def any_leased(self) -> bool:
        """Whether any model holds a lease."""
        return any(self._leases.values())

    def _known(self, model: str) -> str:
        if model not in self._n_pages:
            raise ConfigError(
                f"expected one of the models {list(self._n_pages)}, got {model!r}: add it first"
            )
        return model

    # -- models ----------------------------------------------------------------------------

    def add(self, model: str, n_pages: int) -> None:
        """Add a model of `n_pages` pages, none of them resident.

        Raises:
            ConfigError: the name is taken or `n_pages` is below 1.
            CapacityError: the model alone is larger than the ring.
        """
        if model in self._n_pages:
            raise ConfigError(f"expected a new model name, got {model!r}, which was added before")
        if n_pages < 1:
            raise ConfigError(f"expected at least 1 page for {model!r}, got {n_pages}")
        if n_pages > self.n_frames:
            raise CapacityError(
                f"expected a model of at most {self.n_frames} pages (the ring's frames), got "
                f"{model!r} with {n_pages}: raise the capacity"
            )
        self._n_pages[model] = n_pages
        self._tables[model] = []
        self._leases[model] = 0

    def remove(self, model: str) -> Extent:
        """Remove an unleased model and free its frames; return the extent that was resident."""
        extent = self.evict(model, self.n_resident(model))
        del self._n_pages[model], self._tables[model], self._leases[model]
        return extent

    # -- leases ----------------------------------------------------------------------------

    def lease(self, model: str) -> None:
        """Protect the pages of `model` from eviction until the matching `release`."""
        self._leases[self._known(model)] += 1

    def release(self, model: str) -> None:
        """Give one lease back."""
        if not self.is_leased(model):
            raise LeaseError(f"expected a leased model, got {model!r}, which holds no lease")
        self._leases[model] -= 1

    def ensure_unleased(self, model: str) -> None:
        """Raise `LeaseError` if the model is leased."""
        if self.is_leased(model):
            raise LeaseError(
                f"expected an unleased model to evict, got {model!r}: release it first"
            )

    # -- eviction and mapping --------------------------------------------------------------

    def n_evictable(self, model: str, spare: frozenset[str] = frozenset()) -> int:
        """Number of frames of other, unleased models, except those in `spare`."""
        return sum(len(self._tables[victim]) for victim in self._candidates(model, spare))

    def can_load(self, model: str) -> bool:
        """Whether all missing pages of `model` can be mapped, with evictions if necessary."""
        return self.n_missing(model) <= self.n_loadable(model)

    def n_loadable(self, model: str, spare: frozenset[str] = frozenset()) -> int:
        """Number of missing pages of `model` that can be mapped without evicting `spare`."""
        return min(self.n_missing(model), self.n_free + self.n_evictable(model, spare))

    def make_room(
        self,
        model: str,
        policy: VictimOrder,
        n_pages: int | None = None,
        spare: frozenset[str] = frozenset(),
    ) -> list[Extent]:
        """Evict until there are free frames for missing pages of `model`.

        Returns the evicted extents, each the tail of its victim. After an error nothing has
        changed.

        Args:
            model: the model to load.
            policy: orders the victims, each of them once.
            n_pages: number of missing pages; default all of them.
            spare: models that keep their pages, leased or not.

        Raises:
            CapacityError: leases hold too many frames.
            ConfigError: the policy yields too few victims.
        """
        n_pages = self.n_missing(model) if n_pages is None else n_pages
        n_evictable = self.n_evictable(model, spare)
        if n_pages > self.n_free + n_evictable:
            leased = {
                m: self.n_resident(m) for m in self.models if m != model and self.is_leased(m)
            }
            raise CapacityError(
                f"expected {n_pages} frames for {model!r}, got {self.n_free} free "
                f"and {n_evictable} evictable of {self.n_frames}; leases hold "
                f"{leased}: release one or raise the capacity"
            )
        lost = self._choose(model, policy, n_pages - self.n_free, spare)
        return [self.evict(victim, n_taken) for victim, n_taken in lost.items()]

    def _choose(
        self, model: str, policy: VictimOrder, shortfall: int, spare: frozenset[str]
    ) -> dict[str, int]:
        """Return how many pages each victim loses, to free `shortfall` frames."""
        lost: dict[str, int] = {}
        candidates = self._candidates(model, spare)
        victims = iter(policy.victims(candidates) if shortfall > 0 else ())
        while shortfall > 0:
            if (victim := next(victims, None)) is None:
                raise ConfigError(
                    f"expected a policy that orders all of {sorted(candidates)}, got one that "
                    f"stopped with {shortfall} frames to go: yield every candidate"
                )
            lost[victim] = len(self._tables[victim])
            if self.eviction == "pages":
                lost[victim] = min(lost[victim], shortfall)
            shortfall -= lost[victim]
        return lost

    def _candidates(self, model: str, spare: frozenset[str]) -> frozenset[str]:
        return frozenset(
            m for m in self._resident if m != model and not self._leases[m] and m not in spare
        )

    def evict(self, model: str, n_pages: int) -> Extent:
        """Free the frames of the last `n_pages` resident pages of an unleased model."""
        self.ensure_unleased(model)
        return self.roll_back(model, n_pages)

    def roll_back(self, model: str, n_pages: int) -> Extent:
        """Like `evict`, but also for a leased model: for pages whose copy failed."""
        table = self._tables[self._known(model)]
        if not 0 <= n_pages <= len(table):
            raise ConfigError(f"expected 0 to {len(table)} pages of {model!r}, got {n_pages}")
        first_page = len(table) - n_pages
        extent = Extent(model, first_page, tuple(table[first_page:]))
        del table[first_page:]
        self._free.extend(extent.frames)
        if not table:
            self._resident.discard(model)
        return extent

    def map_missing(self, model: str, n_pages: int | None = None) -> Extent:
        """Give missing pages of `model` free frames, in page order.

        Args:
            model: the model to load.
            n_pages: how many of the missing pages, the first ones; default all of them.

        Raises:
            CapacityError: too few free frames; call `make_room` first.
        """
        table, n_missing = self._tables[self._known(model)], self.n_missing(model)
        n_pages = n_missing if n_pages is None else n_pages
        if not 0 <= n_pages <= n_missing:
            raise ConfigError(f"expected 0 to {n_missing} pages of {model!r}, got {n_pages}")
        if n_pages > self.n_free:
            raise CapacityError(
                f"expected {n_pages} free frames for {model!r}, got {self.n_free}: make room first"
            )
        take = self._free.popleft
        extent = Extent(model, len(table), tuple([take() for _ in range(n_pages)]))
        table.extend(extent.frames)
        if table:
            self._resident.add(model)
        return extent

    # -- audit -----------------------------------------------------------------------------

    def check(self) -> None:
        """Audit the whole state; raise `AssertionError` with the first broken invariant."""

        def ensure(holds: bool, what: str) -> None:
            if not holds:
                raise AssertionError(f"ring invariant broken: {what}")

        held = [frame for table in self._tables.values() for frame in table]
        every = sorted(held + list(self._free))
        ensure(every == list(range(self.n_frames)), "each frame is free or in exactly one table")
        ensure(self._tables.keys() == self._n_pages.keys(), "each model has one page table")
        ensure(self._leases.keys() == self._n_pages.keys(), "each model has one lease count")
        for model, table in self._tables.items():
            ensure(len(table) <= self._n_pages[model], f"{model!r} has no page beyond its last")
            ensure(self._leases[model] >= 0, f"{model!r} has no negative lease count")
            ensure((model in self._resident) == bool(table), f"{model!r} is listed if resident")
