"""Leases of models, what they cost, and the state of a pager."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from djinn_lib.engine.memory.devices.base import Reading, Stalls
from djinn_lib.engine.memory.masters import MasterBytes


@dataclass(slots=True)
class Tally:
    """Bytes copied through the window of a model larger than the ring, and stalls, for a lease."""

    loaded_bytes: int = 0
    stalls: Stalls = field(default_factory=Stalls)


class LeaseStats:
    """Costs of granting and using a lease.

    Args:
        stalls: stalls of the copies that computations under the lease may wait for.
        streamed: counters of the window, for a model larger than the ring.

    Attributes:
        resident_before_bytes: bytes on the device before anything was loaded for the lease.
        prefetched_bytes: bytes loaded before the lease began.
        mapped_bytes: bytes loaded when it began.
        evicted_bytes: bytes evicted from other models.
        plan_s: seconds of evicting and mapping.
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
        """Bytes copied before the lease, when it began, and for each forward pass."""
        return self.prefetched_bytes + self.mapped_bytes + self._streamed.loaded_bytes

    def note_first_token(self) -> None:
        """Note that later stalls do not delay the first token; only the first call counts."""
        self._first = self._first or tuple(each.reading() for each in self._stalls)

    @property
    def stall_s(self) -> float:
        """Seconds that computations waited for copies; blocks until the last wait has ended."""
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
        """Release the lease; the pages stay until others need the frames.

        In a forked child this does nothing, because the lease belongs to the parent.
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
    """State of a pager.

    Attributes:
        n_free: number of free frames.
        leased: models with a lease.
        loading: models with copies in flight, or with failed copies not rolled back yet.
        streamed: models larger than the ring.
        resident_bytes: resident bytes of each model.
        frames: frames of each model's resident pages, in page order.
        masters: size of each model's master, plain and as it is stored.
    """

    n_free: int
    leased: frozenset[str]
    loading: frozenset[str]
    streamed: frozenset[str]
    resident_bytes: dict[str, int]
    frames: dict[str, tuple[int, ...]]
    masters: dict[str, MasterBytes]
