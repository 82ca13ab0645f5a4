"""The ring: which frame of device memory holds which page of which model.

Pure bookkeeping, without torch: every decision about residency is made here, and the code that
moves bytes only carries it out. The terms are those of operating systems. A *frame* is one of
`n_frames` equal pieces of device memory; a *page* is an equally large piece of a model's packed
weights; a *page table* says which frame holds a page.

Two invariants make the ring small enough to reason about:

* **Prefix residency.** The resident pages of a model are always its first ones. Weights are packed
  in execution order, so a partly resident model can start computing at once while the tail
  streams in. A page table is therefore a list of frames, and its length is all there is to know.
* **Weights are read-only.** Evicting a page frees its frame; nothing is ever written back.

Free frames stand in a queue in the order in which they were freed. Taking from its head is the hand
of a clock sweeping round the ring: a frame is reused as late as possible, so that the work which
read its old page has had the longest time to retire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal, Protocol

from djinn_lib.engine.memory.frames import Extent
from djinn_lib.errors import CapacityError, ConfigError, LeaseError

Eviction = Literal["pages", "models"]


class VictimOrder(Protocol):
    """What the ring asks of an eviction policy (see `djinn_lib.engine.memory.policies`)."""

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Yield models of `candidates` in the order in which they should lose pages."""
        ...


class Ring:
    """Page tables over `n_frames` frames.

    Args:
        n_frames: number of frames, at least 1.
        eviction: ``"pages"`` takes from victims only as many pages as are needed, from the
            tail; ``"models"`` takes all the pages of a victim, as caches of whole models do.
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
        self._resident: set[str] = set()  # models with at least one page: what a victim can be

    # -- what is where ---------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """Every model added, in order of addition."""
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
        """Number of pages of `model` that have to be loaded before it is whole."""
        return self.n_pages(model) - self.n_resident(model)

    def is_whole(self, model: str) -> bool:
        """Whether every page of `model` is resident; False when it was never added or is removed.

        Safe while another thread adds, removes, maps or evicts: it looks at each table once.
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
        """Forget an unleased model and free its frames; returns the extent that was resident."""
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
        """Raise `LeaseError` if the model is leased, so that its pages have to stay."""
        if self.is_leased(model):
            raise LeaseError(
                f"expected an unleased model to evict, got {model!r}: release it first"
            )

    # -- eviction and mapping --------------------------------------------------------------

    def n_evictable(self, model: str, spare: frozenset[str] = frozenset()) -> int:
        """Number of frames that other, unleased models hold, those to `spare` left out."""
        return sum(len(self._tables[victim]) for victim in self._candidates(model, spare))

    def can_load(self, model: str) -> bool:
        """Whether every missing page of `model` could be mapped, evicting if need be."""
        return self.n_missing(model) <= self.n_loadable(model)

    def n_loadable(self, model: str, spare: frozenset[str] = frozenset()) -> int:
        """How many missing pages of `model` could be mapped without a page of `spare`."""
        return min(self.n_missing(model), self.n_free + self.n_evictable(model, spare))

    def make_room(
        self,
        model: str,
        policy: VictimOrder,
        n_pages: int | None = None,
        spare: frozenset[str] = frozenset(),
    ) -> list[Extent]:
        """Evict until missing pages of `model` have free frames.

        Returns the evicted extents, each the tail of its victim. An error changes nothing.

        Args:
            model: to be loaded.
            policy: orders the victims, each of which it names once.
            n_pages: how many of the missing pages; default all of them.
            spare: models that keep their pages, leased or not.

        Raises:
            CapacityError: leases hold too many frames.
            ConfigError: the policy names too few victims.
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
        """How many pages each victim loses, so that `shortfall` frames get free."""
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
        """Like `evict`, leased or not: for pages whose copy failed."""
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
            model: to be loaded.
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
        """Audit the whole state; raises `AssertionError` naming the first broken invariant."""

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
