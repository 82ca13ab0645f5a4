"""States of an engine of a ring, its counters, and the messages that it receives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

ARRIVING_S = math.inf  # quantum of a holder until its pages have arrived


class State(Enum):
    """What an engine is doing with its pages."""

    IDLE = "idle"
    WAITING = "waiting"
    HOLDING = "holding"
    REVOKED = "revoked"  # asked to give back its lease, and still finishing its step


@dataclass(frozen=True, slots=True)
class Frames:
    """Message: keep `n_kept` pages, map `frames` after them, load those pages.

    `granted` means that nothing is missing after that, and the lease is held. `n_evicted` counts
    the pages evicted from other models for it.
    """

    model: str
    n_kept: int
    frames: tuple[int, ...]
    granted: bool
    n_evicted: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """Message: give the lease back at the end of the current step."""

    model: str


@dataclass(slots=True)
class Counts:
    """Counters of one model since it joined; `waited_s` sums the time to each grant."""

    leases: int = 0
    switches: int = 0  # leases for which pages had to be loaded
    loaded_pages: int = 0
    evicted_pages: int = 0  # pages of this model, evicted for others
    revoked: int = 0
    waited_s: float = 0.0
    longest_wait_s: float = 0.0


@dataclass(slots=True)
class Engine:
    """One engine's state and counters; times are seconds of any clock."""

    model: str
    state: State = State.IDLE
    since_s: float = 0.0  # when it asked (waiting), or could first compute (holding)
    place: int = 0  # number of earlier requests for a lease, by any engine
    quantum_s: float = 0.0
    counts: Counts = field(default_factory=Counts)

    @property
    def is_arriving(self) -> bool:
        """Whether it holds a lease while pages of it are still copied."""
        return self.state is State.HOLDING and self.quantum_s == ARRIVING_S
