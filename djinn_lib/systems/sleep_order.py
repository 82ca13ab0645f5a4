"""Which engines sleep and which run, when each can only be awake or asleep as a whole.

Pure bookkeeping: no engines, no clock. Requests for one model are served together. The oldest
request comes first, within limits: while the engines that have to sleep for it are busy, they take
more requests of their own, until it has waited for `max_wait_s`; then they finish what they have.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from djinn_lib.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that is not being served; `key` is the caller's."""

    key: Any
    model: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """Hand these requests to their engine, which is awake."""

    model: str
    requests: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let an idle engine sleep; it makes room for the model `room_for`."""

    model: str
    room_for: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Wake an engine: there is room for its model."""

    model: str


class SleepOrder:
    """Decides, one step at a time; each decision counts as carried out.

    Args:
        sizes: bytes of each model.
        capacity_bytes: for models that are awake.
        naive: let every other engine sleep whenever the model changes.
        max_wait_s: how long busy engines take new requests while an older one waits for their room.

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
        self.awake: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._running: Counter[str] = Counter()
        self._waiting: list[Waiting] = []

    def arrive(self, key: Any, model: str, now_s: float) -> None:
        """Queue a request."""
        self._waiting.append(Waiting(key, model, now_s))

    def done(self, model: str) -> None:
        """Note that a request of a model is no longer served."""
        self._running[model] -= 1

    def forget(self, model: str) -> list[Waiting]:
        """Note that the engine of a model ended; returns its requests that wait."""
        self.awake.pop(model, None)
        left = [one for one in self._waiting if one.model == model]
        self._waiting = [one for one in self._waiting if one.model != model]
        return left

    def forget_all(self) -> list[Waiting]:
        """Empty the queue; returns who waited."""
        left, self._waiting = self._waiting, []
        return left

    def next(self, now_s: float) -> Run | Sleep | Wake | None:
        """Decide what to do now; None when only a request's end or time can change anything."""
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
        """When `next` may decide something that it did not before, if nothing happens."""
        if not self._waiting or self._waiting[0].model in self.awake:
            return None
        return self._waiting[0].since_s + self._max_wait_s

    def _admissible(self, now_s: float) -> str | None:
        """The model of the oldest request that can be served as engines are now."""
        oldest = self._waiting[0]
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
