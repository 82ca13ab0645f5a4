"""Leases: the right to use a model, and what granting it took."""

from __future__ import annotations

import os
from collections.abc import Callable


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
        self.stalled_s: Callable[[], float] = lambda: 0.0
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
        return self.stalled_s()

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
