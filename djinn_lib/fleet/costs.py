"""The costs of leases of one model, as counted by its engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a model's leases since it joined.

    `waited_s` is the time until leases were held. `stalled_s` is the time that computations then
    waited for copies.
    """

    leases: int = 0
    switches: int = 0
    loaded_bytes: int = 0
    evicted_bytes: int = 0  # of other models, for this one
    waited_s: float = 0.0
    stalled_s: float = 0.0
