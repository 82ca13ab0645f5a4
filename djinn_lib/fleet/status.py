"""State of a ring: which model has which frames, and which engines compute or wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import pandas as pd

from djinn_lib.engine.pictures import COLORS
from djinn_lib.fleet.lease_states import Counts
from djinn_lib.fleet.leases import Leases
from djinn_lib.units import format_bytes

_MOST_CELLS = 240  # of a picture; on larger rings a cell is several frames


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """State of one model: its pages, its resident pages, its engine and its counters."""

    model: str
    state: str
    n_pages: int
    n_resident: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class RingStatus:
    """State of a ring; `frames[i]` is the index of the model in frame `i`, or -1."""

    device: str
    page_bytes: int
    n_frames: int
    models: tuple[ModelStatus, ...]
    frames: tuple[int, ...]

    @classmethod
    def of(cls, leases: Leases, device: str, page_bytes: int) -> RingStatus:
        """Return the state of a ring."""
        ring, frames = leases.ring, [-1] * leases.ring.n_frames
        models = []
        for number, engine in enumerate(leases.engines):
            for frame in ring.frames(engine.model):
                frames[frame] = number
            models.append(
                ModelStatus(
                    engine.model,
                    engine.state.value,
                    ring.n_pages(engine.model),
                    ring.n_resident(engine.model),
                    engine.counts,
                )
            )
        return cls(device, page_bytes, ring.n_frames, tuple(models), tuple(frames))

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> RingStatus:
        """Build it from a message made by `fields`."""
        models = tuple(
            ModelStatus(**{**model, "counts": Counts(**model["counts"])})
            for model in message["models"]
        )
        return cls(
            message["device"],
            message["page_bytes"],
            message["n_frames"],
            models,
            tuple(message["frames"]),
        )

    def fields(self) -> dict[str, Any]:
        """Return it as the fields of a message."""
        return asdict(self)

    def resident_bytes(self) -> dict[str, int]:
        """Resident bytes of each model, in whole pages."""
        return {model.model: model.n_resident * self.page_bytes for model in self.models}

    def residency(self) -> pd.DataFrame:
        """One row a model: model, bytes, resident_bytes, frames; bytes are whole pages."""
        rows = {
            "model": [one.model for one in self.models],
            "bytes": [one.n_pages * self.page_bytes for one in self.models],
            "resident_bytes": list(self.resident_bytes().values()),
            "frames": [one.n_resident for one in self.models],
        }
        return pd.DataFrame(rows)

    def stats(self) -> pd.DataFrame:
        """One row a model: the state of its engine, and costs of leases since it joined."""
        rows = [
            {
                "model": one.model,
                "engine": one.state,
                "leases": one.counts.leases,
                "switches": one.counts.switches,
                "loaded_bytes": one.counts.loaded_pages * self.page_bytes,
                "evicted_bytes": one.counts.evicted_pages * self.page_bytes,
                "revoked": one.counts.revoked,
                "waited_s": one.counts.waited_s,
                "longest_wait_s": one.counts.longest_wait_s,
            }
            for one in self.models
        ]
        return pd.DataFrame(rows)

    def html(self) -> str:
        """Draw the ring: a cell for each frame (or for neighbours), in the colour of its model."""
        per_cell = -(-self.n_frames // _MOST_CELLS)
        cells = "".join(
            f'<i style="display:inline-block;width:5px;height:18px;background:{_color(owner)}"></i>'
            for owner in self.frames[::per_cell]
        )
        rows = "".join(
            f"<tr><td><b style='color:{_color(number)}'>&#9632;</b> {escape(one.model)}</td>"
            f"<td>{one.state}</td>"
            f"<td>{format_bytes(one.n_resident * self.page_bytes)} of "
            f"{format_bytes(one.n_pages * self.page_bytes)}</td>"
            f"<td>{one.counts.switches}</td>"
            f"<td>{format_bytes(one.counts.loaded_pages * self.page_bytes)}</td>"
            f"<td>{1e3 * one.counts.longest_wait_s:.0f} ms</td></tr>"
            for number, one in enumerate(self.models)
        )
        head = "".join(
            f"<th>{title}</th>"
            for title in ("model", "engine", "resident", "switches", "loaded", "longest wait")
        )
        ring = format_bytes(self.n_frames * self.page_bytes)
        return (
            f"<div>{ring} on {escape(self.device)}, {self.n_frames} frames of "
            f"{format_bytes(self.page_bytes)}</div><div style='line-height:0'>{cells}</div>"
            f"<table><tr>{head}</tr>{rows}</table>"
        )


def _color(number: int) -> str:
    return "#8884" if number < 0 else COLORS[number % len(COLORS)]
