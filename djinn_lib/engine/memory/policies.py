"""Who loses pages when the ring is full.

A policy only orders victims; how many pages each of them loses is the ring's business. To add one,
derive from `Policy`, override `touch`, `forget` and `victims`, and list it in `POLICIES`: the
contract tests run over every entry. The same objects serve the GPU and the simulator. A policy
that asks others passes on everything that it is told, or they decide on less than they would alone.

A model loses its tail and costs what it loses, so a byte is worth the same in every model: what
counts is when its model is asked for next, not its size. Under independent requests it is best to
keep the models that are asked for most often.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import ConfigError, shown


class Policy(ABC):
    """Orders the models that should lose pages."""

    @abstractmethod
    def touch(self, model: str, now_s: float) -> None:
        """Note a request for `model` at time `now_s` (any clock that never runs backwards)."""

    @abstractmethod
    def forget(self, model: str) -> None:
        """Drop what is known of `model`, which left the ring for good."""

    @abstractmethod
    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Yield every model of `candidates` once, the first to lose pages first."""

    def admit(self, model: str, n_pages: int, n_frames: int) -> None:  # noqa: B027
        """Note a new model of `n_pages` pages, next to a ring of `n_frames`. Most ignore it."""

    def expect(self, upcoming: Sequence[str]) -> None:  # noqa: B027
        """Note which models wait to be served, the next one first. Most ignore it."""


class LRU(Policy):
    """Least recently used first (Denning, 1968); models never touched go before all others."""

    def __init__(self) -> None:
        self._n_touches, self._last = 0, dict[str, int]()  # the number of each model's last touch

    def touch(self, model: str, now_s: float) -> None:
        """Make `model` the most recently used."""
        self._n_touches += 1
        self._last[model] = self._n_touches

    def forget(self, model: str) -> None:
        """Drop `model` from the order of use."""
        self._last.pop(model, None)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates` from the least to the most recently used."""
        last = self._last
        return sorted(candidates, key=lambda model: (last.get(model, 0), model))


class LFU(Policy):
    """Least frequently used first, where old requests count less (LRFU: Lee et al., 2001).

    A request counts 2 to the power of its number over `half_life`; only ratios matter, so nothing
    has to be aged, and logarithms keep the counts within range for ever.

    Args:
        half_life: requests (of any model) after which one counts half.
    """

    def __init__(self, half_life: float = 500.0) -> None:
        if not (math.isfinite(half_life) and half_life > 0):
            raise ConfigError(f"expected a positive half_life in requests, got {half_life}")
        self._half_life = half_life
        self._n_touches = 0
        self._log2_count: dict[str, float] = {}

    def touch(self, model: str, now_s: float) -> None:
        """Count a request."""
        self._n_touches += 1
        new = self._n_touches / self._half_life
        old = self._log2_count.get(model, -math.inf)
        self._log2_count[model] = new + math.log2(1 + 2 ** (old - new))

    def forget(self, model: str) -> None:
        """Drop the count of `model`."""
        self._log2_count.pop(model, None)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates` from the least to the most frequently used."""
        count = self._log2_count
        return sorted(candidates, key=lambda model: (count.get(model, -math.inf), model))


class EWMA(Policy):
    """Latest expected next use first, from an average of the gaps between uses.

    The time to the next use is taken as the average gap, or as the time since the last use if that
    is longer: such a model fell out of use. A model used once has no gap and goes first.

    Args:
        weight: of the newest gap in the exponentially weighted moving average.
    """

    def __init__(self, weight: float = 0.1) -> None:
        if not 0 < weight <= 1:
            raise ConfigError(f"expected a weight above 0 and at most 1, got {weight}")
        self._weight = weight
        self._now = 0
        self._last: dict[str, int] = {}
        self._gap: dict[str, float] = {}

    def touch(self, model: str, now_s: float) -> None:
        """Take the gap since the last use into the average; gaps are counted in requests."""
        self._now += 1
        if model in self._last:
            gap = self._now - self._last[model]
            average = self._gap.get(model, gap)
            self._gap[model] = average + self._weight * (gap - average)
        self._last[model] = self._now

    def forget(self, model: str) -> None:
        """Drop what is known of `model`."""
        for known in (self._last, self._gap):
            known.pop(model, None)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates`, the one expected back last first."""

        def soon(model: str) -> tuple[float, float, str]:
            idle = self._now - self._last.get(model, -1)
            return -max(self._gap.get(model, math.inf), idle), -idle, model

        return sorted(candidates, key=soon)


class Adaptive(Policy):
    """The one of several policies that would have loaded least lately.

    Recency wins where users stay with a model, frequency where requests are independent. Each
    expert runs a ring of its own, without bytes; the one with the fewest loads, old ones counting
    less, orders the victims of the real ring (adaptive caching by refetching: Gramacy et al., 2002;
    as experts: LeCaR, Vietri et al., 2018).

    Args:
        experts: to choose from; default is LRU and LFU over the last few thousand requests.
        half_life: requests after which a load counts half.
    """

    def __init__(self, experts: Sequence[Policy] | None = None, half_life: float = 1000.0) -> None:
        self._experts = list(experts) if experts else [LRU(), LFU(2000.0)]
        self._decay, self._shadows = 2 ** (-1 / half_life), list[Ring]()
        self._lost = [0.0] * len(self._experts)

    def admit(self, model: str, n_pages: int, n_frames: int) -> None:
        """Add the model to the ring of every expert."""
        self._shadows = self._shadows or [Ring(n_frames) for _ in self._experts]
        for shadow, expert in zip(self._shadows, self._experts, strict=True):
            shadow.add(model, n_pages)
            expert.admit(model, n_pages, n_frames)

    def touch(self, model: str, now_s: float) -> None:
        """Let every expert serve the request in its own ring."""
        for i, expert in enumerate(self._experts):
            shadow = self._shadows[i] if self._shadows else None
            if shadow and model in shadow:
                n_missing = shadow.n_missing(model)
                self._lost[i] = self._lost[i] * self._decay + n_missing
                if n_missing:
                    shadow.make_room(model, expert)
                    shadow.map_missing(model)
            expert.touch(model, now_s)

    def forget(self, model: str) -> None:
        """Drop the model, and with the last one what the experts lost."""
        for shadow in self._shadows:
            if model in shadow:
                shadow.remove(model)
        for expert in self._experts:
            expert.forget(model)
        if not any(shadow.models for shadow in self._shadows):
            self._shadows, self._lost = [], [0.0] * len(self._experts)

    def expect(self, upcoming: Sequence[str]) -> None:
        """Pass it on."""
        for expert in self._experts:
            expert.expect(upcoming)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return the order of the expert that lost least."""
        best = min(range(len(self._experts)), key=self._lost.__getitem__)
        return self._experts[best].victims(candidates)


class Lookahead(Policy):
    """Spares what waits in the queue; another policy (`beyond`, default LRU) orders the others.

    Among models that wait, the one whose turn comes last goes first (Belady, 1966, as far as the
    queue reaches).
    """

    def __init__(self, beyond: Policy | None = None) -> None:
        self._beyond = beyond or LRU()
        self._turn: dict[str, int] = {}

    def admit(self, model: str, n_pages: int, n_frames: int) -> None:
        """Pass it on."""
        self._beyond.admit(model, n_pages, n_frames)

    def touch(self, model: str, now_s: float) -> None:
        """Pass the request on."""
        self._beyond.touch(model, now_s)

    def forget(self, model: str) -> None:
        """Pass it on."""
        self._turn.pop(model, None)
        self._beyond.forget(model)

    def expect(self, upcoming: Sequence[str]) -> None:
        """Remember whose turn is when, and pass it on."""
        self._beyond.expect(upcoming)
        self._turn = {}
        for turn, model in enumerate(upcoming):
            self._turn.setdefault(model, turn)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return the models that do not wait, then those that do, the last turn first."""
        waiting = [model for model in candidates if model in self._turn]
        yield from self._beyond.victims(candidates - frozenset(waiting))
        yield from sorted(waiting, key=lambda model: -self._turn[model])


class Oracle(Policy):
    """Furthest next use first, the future being known: the offline optimum (Belady, 1966).

    Args:
        models: every request that will be made, in order.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._next = next_uses(models)
        self._n_touches = 0
        self._next_of: dict[str, float] = {}

    def touch(self, model: str, now_s: float) -> None:
        """Go on to the next request; one more than were foretold is a `ConfigError`."""
        if self._n_touches == len(self._next):
            raise ConfigError(f"more than the oracle's {len(self._next)} requests: give it all")
        self._next_of[model] = self._next[self._n_touches]
        self._n_touches += 1

    def forget(self, model: str) -> None:
        """Nothing: the future stays as foretold."""

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates`, the one used last in future first."""
        return sorted(candidates, key=lambda m: (-self._next_of.get(m, math.inf), m))


POLICIES: dict[str, type[Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "ewma": EWMA,
    "adaptive": Adaptive,
    "lookahead": Lookahead,
}


def make_policy(policy: str | Policy) -> Policy:
    """Return a policy by name (a `ConfigError` if there is none), or the object itself."""
    if isinstance(policy, Policy):
        return policy
    if policy == "oracle":
        raise ConfigError(
            "expected a policy that needs no future, got 'oracle': pass Oracle(models)"
        )
    if not isinstance(policy, str) or policy not in POLICIES:
        known = sorted(POLICIES)
        raise ConfigError(f"expected a policy out of {known} or a Policy, got {shown(policy)}")
    return POLICIES[policy]()


def sparing_what_waits(policy: Policy) -> Policy:
    """Return a policy behind `Lookahead`, or itself if it knows as much."""
    return policy if isinstance(policy, Lookahead | Oracle) else Lookahead(policy)


def next_uses(models: Sequence[str]) -> list[float]:
    """For each request, the number of the next one for the same model, or infinity."""
    following: dict[str, float] = {}
    result = [math.inf] * len(models)
    for i in range(len(models) - 1, -1, -1):
        result[i] = following.get(models[i], math.inf)
        following[models[i]] = i
    return result
