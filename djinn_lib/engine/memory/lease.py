"""Leases: the right to use a model, and what granting it took."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from djinn_lib.engine.memory.devices.copier import Reading, Stalls


class StallClock:
    """How long computations are held up from its making on, up to the first token and in all.

    Args:
        stalls: of everything that they may wait for.
    """

    def __init__(self, stalls: Sequence[Stalls] = ()) -> None:
        self._stalls = tuple(stalls)
        self._begin_s = sum(each.total_s for each in self._stalls)
        self._first: tuple[Reading, ...] | None = None

    def note_first_token(self) -> None:
        """What is waited for from now on is not for the first token; only the first call counts."""
        self._first = self._first or tuple(each.reading() for each in self._stalls)

    @property
    def total_s(self) -> float:
        """Seconds so far; waits for streams to get past the last hold-up."""
        return sum(each.total_s for each in self._stalls) - self._begin_s

    @property
    def first_token_s(self) -> float:
        """Seconds up to the first token; all of them if none was noted."""
        if self._first is None:
            return self.total_s
        until = zip(self._stalls, self._first, strict=True)
        return sum(each.until_s(reading) for each, reading in until) - self._begin_s


class Lease:
    """The right to use a model; while it is held, no page of the model is evicted.

    `resident_before_bytes`, `evicted_bytes` and `loaded_bytes` tell what granting it took, what was
    loaded ahead for it included; `prefetched_bytes` is that part. `plan_s` is the time that
    evicting and mapping took, in seconds.
    """

    def __init__(self, model: str, give_back: Callable[[str], None]) -> None:
        self.model = model
        self.resident_before_bytes = 0
        self.prefetched_bytes = 0
        self.mapped_bytes = 0
        self.evicted_bytes = 0
        self.plan_s = 0.0
        self.stalls = StallClock()
        self.streamed_bytes: Callable[[], int] = lambda: 0
        self._give_back = give_back
        self._holder: int | None = os.getpid()

    @property
    def loaded_bytes(self) -> int:
        """Bytes copied for this lease: ahead of it, when it began, and for each forward pass."""
        return self.prefetched_bytes + self.mapped_bytes + self.streamed_bytes()

    @property
    def stall_s(self) -> float:
        """Seconds that computations under this lease waited for copies."""
        return self.stalls.total_s

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
