"""Who loses pages when the ring is full.

A policy only orders victims; how many pages each of them loses is the ring's business. To add one,
derive from `Policy`, override the three methods and list it in `POLICIES`: the contract tests run
over every entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable

from djinn_lib.errors import ConfigError


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


class LRU(Policy):
    """Least recently used first (Denning, 1968); models never touched go before all others."""

    def __init__(self) -> None:
        self._by_age: OrderedDict[str, float] = OrderedDict()

    def touch(self, model: str, now_s: float) -> None:
        """Make `model` the most recently used."""
        self._by_age[model] = now_s
        self._by_age.move_to_end(model)

    def forget(self, model: str) -> None:
        """Drop `model` from the order of use."""
        self._by_age.pop(model, None)

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Yield `candidates` from the least to the most recently used."""
        yield from sorted(candidates - self._by_age.keys())
        yield from [model for model in self._by_age if model in candidates]


POLICIES: dict[str, type[Policy]] = {"lru": LRU}


def make_policy(policy: str | Policy) -> Policy:
    """Return a policy by name, or the object itself.

    Raises:
        ConfigError: no policy has that name.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"expected a policy out of {sorted(POLICIES)}, got {policy!r}")
    return POLICIES[policy]()
