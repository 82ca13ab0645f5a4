"""Eviction policies: they choose which models lose pages when the ring is full.

A policy only orders victims; the ring decides how many pages each of them loses. To add a policy,
derive from `Policy`, override `touch`, `forget` and `victims`, and list it in `POLICIES`. The
contract tests run over every entry. The engine and the simulator use the same objects. A policy
that wraps others must pass every call on to them.

An evicted page costs its bytes to load again, whatever model it belongs to. So a policy should
consider when a model is needed next, not its size. If requests are independent, the best models to
keep are the most frequently requested ones.
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
        """Note a request for `model` at time `now_s` (of any monotonic clock)."""

    @abstractmethod
    def forget(self, model: str) -> None:
        """Forget `model`, which was removed from the ring."""

    @abstractmethod
    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Yield every model of `candidates` once, in the order in which they should lose pages."""

    def admit(self, model: str, n_pages: int, n_frames: int) -> None:  # noqa: B027
        """Note a new model of `n_pages` pages on a ring of `n_frames`. Most policies ignore it."""

    def expect(self, upcoming: Sequence[str]) -> None:  # noqa: B027
        """Note which models have queued requests, the next one first. Most policies ignore it."""


class LRU(Policy):
    """Evict the least recently used model first (Denning, 1968); unused models come first."""

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
    """Evict the least frequently used first; old requests count less (LRFU: Lee et al., 2001).

    Request `i` has the weight 2 ** (i / half_life). Only ratios of counts matter, so old counts
    need no update. Counts are stored as logarithms, so they never overflow.

    Args:
        half_life: number of requests (for any model) after which a request counts half.
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
    """Evict the model with the latest expected next use first.

    The expected time to the next use is the average gap between uses, or the time since the last
    use if that is longer. A model that was used once has no gap and is evicted first.

    Args:
        weight: weight of the newest gap in the exponentially weighted moving average.
    """

    def __init__(self, weight: float = 0.1) -> None:
        if not 0 < weight <= 1:
            raise ConfigError(f"expected a weight above 0 and at most 1, got {weight}")
        self._weight = weight
        self._now = 0
        self._last: dict[str, int] = {}
        self._gap: dict[str, float] = {}

    def touch(self, model: str, now_s: float) -> None:
        """Update the average with the gap since the last use; gaps are counted in requests."""
        self._now += 1
        if model in self._last:
            gap = self._now - self._last[model]
            average = self._gap.get(model, gap)
            self._gap[model] = average + self._weight * (gap - average)
        self._last[model] = self._now

    def forget(self, model: str) -> None:
        """Forget `model`."""
        for known in (self._last, self._gap):
            known.pop(model, None)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates`, the latest expected next use first."""

        def soon(model: str) -> tuple[float, float, str]:
            idle = self._now - self._last.get(model, -1)
            return -max(self._gap.get(model, math.inf), idle), -idle, model

        return sorted(candidates, key=soon)


class Adaptive(Policy):
    """Use the policy out of several that would recently have loaded the fewest pages.

    Recency is better when users stay with a model, frequency when requests are independent. Each
    policy (an expert) manages a simulated ring of its own. The expert with the fewest page loads
    orders the victims of the real ring; older loads count less (adaptive caching by refetching:
    Gramacy et al., 2002; as experts: LeCaR, Vietri et al., 2018).

    Args:
        experts: policies to choose from; default is LRU and LFU over a few thousand requests.
        half_life: number of requests after which a load counts half.
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
        """Serve the request in the simulated ring of every expert."""
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
        """Forget the model; with the last model, also forget the loads of the experts."""
        for shadow in self._shadows:
            if model in shadow:
                shadow.remove(model)
        for expert in self._experts:
            expert.forget(model)
        if not any(shadow.models for shadow in self._shadows):
            self._shadows, self._lost = [], [0.0] * len(self._experts)

    def expect(self, upcoming: Sequence[str]) -> None:
        """Pass the queue on to every expert."""
        for expert in self._experts:
            expert.expect(upcoming)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return the order of the expert with the fewest loads."""
        best = min(range(len(self._experts)), key=self._lost.__getitem__)
        return self._experts[best].victims(candidates)


class Lookahead(Policy):
    """Evict models without queued requests first, in the order of another policy.

    Among models with queued requests, the one whose turn comes last is evicted first (Belady, 1966,
    as far as the queue is known). `beyond` is the other policy; default is LRU.
    """

    def __init__(self, beyond: Policy | None = None) -> None:
        self._beyond = beyond or LRU()
        self._turn: dict[str, int] = {}

    def admit(self, model: str, n_pages: int, n_frames: int) -> None:
        """Pass the model on."""
        self._beyond.admit(model, n_pages, n_frames)

    def touch(self, model: str, now_s: float) -> None:
        """Pass the request on."""
        self._beyond.touch(model, now_s)

    def forget(self, model: str) -> None:
        """Forget the model."""
        self._turn.pop(model, None)
        self._beyond.forget(model)

    def expect(self, upcoming: Sequence[str]) -> None:
        """Store the order of the queue, and pass it on."""
        self._beyond.expect(upcoming)
        self._turn = {}
        for turn, model in enumerate(upcoming):
            self._turn.setdefault(model, turn)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return models that are not queued, then those that are, the last turn first."""
        waiting = [model for model in candidates if model in self._turn]
        yield from self._beyond.victims(candidates - frozenset(waiting))
        yield from sorted(waiting, key=lambda model: -self._turn[model])


class Oracle(Policy):
    """Evict the model whose next use is furthest: the offline optimum (Belady, 1966).

    Args:
        models: the model of every future request, in order.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._next = next_uses(models)
        self._n_touches = 0
        self._next_of: dict[str, float] = {}

    def touch(self, model: str, now_s: float) -> None:
        """Advance to the next request.

        Raises:
            ConfigError: there are more requests than the oracle knows.
        """
        if self._n_touches == len(self._next):
            raise ConfigError(
                f"the oracle knows only {len(self._next)} requests: pass all requests of the trace"
            )
        self._next_of[model] = self._next[self._n_touches]
        self._n_touches += 1

    def forget(self, model: str) -> None:
        """Do nothing: the future requests stay the same."""

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates`, the one with the furthest next use first."""
        return sorted(candidates, key=lambda m: (-self._next_of.get(m, math.inf), m))


POLICIES: dict[str, type[Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "ewma": EWMA,
    "adaptive": Adaptive,
    "lookahead": Lookahead,
}


def make_policy(policy: str | Policy) -> Policy:
    """Return a policy by name, or the object itself; raise `ConfigError` for other values."""
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
    """Wrap a policy in `Lookahead`, unless it already knows the queue or the future."""
    return policy if isinstance(policy, Lookahead | Oracle) else Lookahead(policy)


def next_uses(models: Sequence[str]) -> list[float]:
    """Return, for each request, the index of the next one for the same model, or infinity."""
    following: dict[str, float] = {}
    result = [math.inf] * len(models)
    for i in range(len(models) - 1, -1, -1):
        result[i] = following.get(models[i], math.inf)
        following[models[i]] = i
    return result
