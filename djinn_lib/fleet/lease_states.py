"""What an engine of a ring is doing, what it cost, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """What an engine is doing, as far as the ring is concerned."""

    IDLE = "idle"
    WAITING = "waiting"
    HOLDING = "holding"
    REVOKED = "revoked"  # asked to give back, and not yet done with its step


@dataclass(frozen=True, slots=True)
class Frames:
    """For an engine: keep `n_kept` pages, map `frames` after them and load those pages.

    `granted`: nothing is missing after that, and the lease is held. `n_evicted` counts the pages
    that other models lose for it.
    """

    model: str
    n_kept: int
    frames: tuple[int, ...]
    granted: bool
    n_evicted: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """For an engine: give the lease back at the end of the step at hand."""

    model: str


@dataclass(slots=True)
class Counts:
    """What happened to one model since it joined; `waited_s` counts the time up to each grant."""

    leases: int = 0
    switches: int = 0  # leases for which pages had to be loaded
    loaded_pages: int = 0
    evicted_pages: int = 0  # of this model, by others
    revoked: int = 0
    waited_s: float = 0.0
    longest_wait_s: float = 0.0


@dataclass(slots=True)
class Engine:
    """One engine's place in the queue and what it cost so far; times are seconds of any clock."""

    model: str
    state: State = State.IDLE
    since_s: float = 0.0  # asked (waiting), or able to compute (holding)
    place: int = 0  # how many had asked before it did
    quantum_s: float = 0.0
    counts: Counts = field(default_factory=Counts)
