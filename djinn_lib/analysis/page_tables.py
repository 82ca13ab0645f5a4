"""Tables of a running ring: pages moved by a switch, and costs of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import pandas as pd

_MIB = 1 << 20


class Cost(Protocol):
    """Resident and moved bytes of a request, as in a `Generation`."""

    @property
    def loaded_bytes(self) -> int:
        """Bytes copied to the device for it."""
        ...

    @property
    def evicted_bytes(self) -> int:
        """Bytes evicted from other models for it."""
        ...

    @property
    def resident_before_bytes(self) -> int:
        """Bytes of its model that were already on the device."""
        ...


def moves_table(
    before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]
) -> pd.DataFrame:
    """Return a row a model: how many of its pages stayed, came and went between two moments.

    Args:
        before, after: page tables, such as `Djinn.stats().frames`.
    """
    pages = {model: (set(enumerate(before.get(model, ()))), set(enumerate(frames)))
             for model, frames in after.items()}  # fmt: skip
    return pd.DataFrame.from_dict({
        model: {"stayed": len(old & new), "loaded": len(new - old), "evicted": len(old - new)}
        for model, (old, new) in pages.items()
    }, orient="index").rename_axis("pages of")  # fmt: skip


def costs_table(served: Iterable[tuple[str, Cost]]) -> pd.DataFrame:
    """Return a row a request: what it found, loaded and evicted, in MiB.

    Args:
        served: the model and the `Generation` of each request, in their order.
    """
    return pd.DataFrame(
        {
            "request": number,
            "model": model,
            "found (MiB)": cost.resident_before_bytes / _MIB,
            "loaded (MiB)": cost.loaded_bytes / _MIB,
            "evicted from others (MiB)": cost.evicted_bytes / _MIB,
        }
        for number, (model, cost) in enumerate(served, start=1)
    ).set_index("request").round(1)  # fmt: skip
