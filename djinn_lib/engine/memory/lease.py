"""Leases: the right to use a model, what it measured, and what a pager holds for whom."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from djinn_lib.engine.memory.devices.base import Reading, Stalls
from djinn_lib.engine.memory.masters import MasterBytes


@dataclass(slots=True)
class Tally:
    """What went through the window of a model larger than the ring, under one lease."""

    loaded_bytes: int = 0
    stalls: Stalls = field(default_factory=Stalls)


class LeaseStats:
    """What granting and using a lease took.

    Args:
        stalls: of the copies that computations under the lease may wait for, from now on.
        streamed: of a model larger than the ring.

    Attributes:
        resident_before_bytes: on the device before anything was loaded for the lease.
        prefetched_bytes: loaded for it ahead of its beginning.
        mapped_bytes: loaded for it when it began.
        evicted_bytes: that others lost for it.
        plan_s: seconds that evicting and mapping took.
    """

    def __init__(self, stalls: Sequence[Stalls] = (), streamed: Tally | None = None) -> None:
        self.resident_before_bytes = self.prefetched_bytes = 0
        self.mapped_bytes = self.evicted_bytes = 0
        self.plan_s = 0.0
        self._streamed = streamed or Tally()
        self._stalls = (*stalls, self._streamed.stalls)
        self._begin_s = sum(each.total_s for each in self._stalls)
        self._first: tuple[Reading, ...] | None = None

    @property
    def loaded_bytes(self) -> int:
        """Bytes copied for the lease: ahead of it, when it began, and for each forward pass."""
        return self.prefetched_bytes + self.mapped_bytes + self._streamed.loaded_bytes

    def note_first_token(self) -> None:
        """What is waited for from now on is not for the first token; only the first call counts."""
        self._first = self._first or tuple(each.reading() for each in self._stalls)

    @property
    def stall_s(self) -> float:
        """Seconds that computations waited for copies; waits for streams to get past the last."""
        return sum(each.total_s for each in self._stalls) - self._begin_s

    @property
    def switch_s(self) -> float:
        """Seconds of evicting, mapping, and waiting for copies before the first token."""
        if self._first is None:
            return self.plan_s + self.stall_s
        until = zip(self._stalls, self._first, strict=True)
        return self.plan_s + sum(each.until_s(at) for each, at in until) - self._begin_s


class Lease:
    """The right to use a model; while it is held, no page of the model is evicted."""

    def __init__(self, model: str, stats: LeaseStats, give_back: Callable[[str], None]) -> None:
        self.model, self.stats = model, stats
        self._give_back = give_back
        self._holder: int | None = os.getpid()

    def release(self) -> None:
        """Give the lease back; the pages stay until somebody else needs the frames.

        In a forked child this does nothing: the lease is its parent's.
        """
        holder, self._holder = self._holder, None
        if holder == os.getpid():
            self._give_back(self.model)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class PagerStats:
    """What a pager holds at a moment.

    Attributes:
        n_free: frames that no model has.
        leased: models that hold a lease.
        loading: models of which copies are in flight, or failed and not yet rolled back.
        streamed: models larger than the ring, whose layers take turns.
        resident_bytes: of each model.
        frames: of each model's resident pages, in page order.
        masters: bytes of each model's master, plain and as it is stored.
    """

    n_free: int
    leased: frozenset[str]
    loading: frozenset[str]
    streamed: frozenset[str]
    resident_bytes: dict[str, int]
    frames: dict[str, tuple[int, ...]]
    masters: dict[str, MasterBytes]
