"""What leases cost one model, as its engine counts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """What leases cost a model since it joined.

    `waited_s` is the time until leases were held, `stalled_s` the time that computations then
    waited for copies.
    """

    leases: int = 0
    switches: int = 0
    loaded_bytes: int = 0
    evicted_bytes: int = 0  # of others, for this one
    waited_s: float = 0.0
    stalled_s: float = 0.0
