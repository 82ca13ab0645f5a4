"""Decide which engines sleep and which run, each awake or asleep as a whole.

This is bookkeeping without engines or a clock. Requests for one model are served together. The
oldest request has priority, within limits: while the engines that must sleep for it are busy, they
accept more of their own requests, until it has waited for `max_wait_s`. Then they only finish what
they have.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from djinn_lib.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that is not being served yet; `key` identifies it for the caller."""

    key: Any
    model: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """Decision: pass these requests to their engine, which is awake."""

    model: str
    requests: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Decision: let an idle engine sleep, to make room for the model `room_for`."""

    model: str
    room_for: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Decision: wake an engine; there is room for its model."""

    model: str


class SleepOrder:
    """Makes one decision at a time; each counts as carried out.

    Args:
        sizes: bytes of each model.
        capacity_bytes: for models that are awake.
        naive: let every other engine sleep whenever the model changes.
        max_wait_s: how long busy engines accept new requests while an older one waits for room.

    Raises:
        CapacityError: a model is larger than the capacity.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        capacity_bytes: int,
        naive: bool = False,
        max_wait_s: float = 1.0,
    ) -> None:
        for model, n_bytes in sizes.items():
            if n_bytes > capacity_bytes:
                raise CapacityError(
                    f"{model!r} has {n_bytes} bytes and the capacity is {capacity_bytes}: raise "
                    "the capacity"
                )
        self._sizes, self._capacity_bytes = dict(sizes), capacity_bytes
        self._naive, self._max_wait_s = naive, max_wait_s
        self.awake: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._running: Counter[str] = Counter()
        self._waiting: list[Waiting] = []

    def arrive(self, key: Any, model: str, now_s: float) -> None:
        """Queue a request."""
        self._waiting.append(Waiting(key, model, now_s))

    def done(self, model: str) -> None:
        """Record that a request of a model has ended."""
        self._running[model] -= 1

    def forget(self, model: str) -> list[Waiting]:
        """Record that a model's engine has ended; return its waiting requests."""
        self.awake.pop(model, None)
        left = [one for one in self._waiting if one.model == model]
        self._waiting = [one for one in self._waiting if one.model != model]
        return left

    def forget_all(self) -> list[Waiting]:
        """Empty the queue; return the waiting requests."""
        left, self._waiting = self._waiting, []
        return left

    def next(self, now_s: float) -> Run | Sleep | Wake | None:
        """Return the next decision; None if nothing can be done now."""
        if not self._waiting:
            return None
        oldest = self._waiting[0].model
        if model := self._admissible(now_s):
            return self._run(model)
        if oldest in self.awake:
            return None
        if self._fits(oldest):
            self.awake[oldest] = None
            return Wake(oldest)
        for victim in self.awake:
            if not self._running[victim]:
                del self.awake[victim]
                return Sleep(victim, oldest)
        return None

    def deadline_s(self) -> float | None:
        """Return when `next` may change its decision, if no event comes first."""
        if not self._waiting or self._waiting[0].model in self.awake:
            return None
        return self._waiting[0].since_s + self._max_wait_s

    def _admissible(self, now_s: float) -> str | None:
        """Return the model of the oldest request that an awake engine may serve now."""
        oldest = self._waiting[0]
        # The oldest request has waited long enough: engines that block it accept nothing more.
        drains = oldest.model not in self.awake and now_s >= oldest.since_s + self._max_wait_s
        for one in self._waiting:
            if one.model in self.awake and not (drains and not self._fits(oldest.model)):
                return one.model
        return None

    def _run(self, model: str) -> Run:
        requests = tuple(one for one in self._waiting if one.model == model)
        self._waiting = [one for one in self._waiting if one.model != model]
        self._running[model] += len(requests)
        self.awake.move_to_end(model)
        return Run(model, requests)

    def _fits(self, model: str) -> bool:
        if self._naive:
            return not self.awake
        awake_bytes = sum(self._sizes[one] for one in self.awake)
        return awake_bytes + self._sizes[model] <= self._capacity_bytes
