"""Pictures of models in HTML, for notebooks with light and with dark backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from djinn_lib.units import format_bytes

# Okabe and Ito's colours: told apart by the colour-blind, and seen on white and on black.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f")
_WIDTH_PX = 360  # of the bar of the largest model


@dataclass(frozen=True, slots=True)
class ModelState:
    """How many bytes of a model are resident, of how many; `is_used` while it holds a lease."""

    name: str
    n_bytes: int
    resident_bytes: int
    is_used: bool = False


def picture(models: Sequence[ModelState], title: str = "") -> str:
    """Draw a bar for each model: as long as the model is large, filled as far as it is resident.

    The first layers of a model are the first to be loaded and the last to be evicted, so a bar is
    filled from the left.
    """
    largest = max((model.n_bytes for model in models), default=1)
    rows = "".join(_row(model, i, largest) for i, model in enumerate(models))
    head = f'<div style="margin-bottom:.4em">{escape(title)}</div>' if title else ""
    return (
        f'{head}<div style="display:grid;grid-template-columns:max-content max-content max-content;'
        f'gap:.3em 1em;align-items:center;justify-content:start">{rows}</div>'
    )


def _row(model: ModelState, number: int, largest: int) -> str:
    color = COLORS[number % len(COLORS)]
    width = max(4, round(_WIDTH_PX * model.n_bytes / largest))
    share = model.resident_bytes / model.n_bytes if model.n_bytes else 0.0
    said = (
        f"{format_bytes(model.resident_bytes)} of {format_bytes(model.n_bytes)} resident"
        f"{', in use' if model.is_used else ''}"
    )
    name = escape(model.name)
    return (
        f"<b>{name}</b>"
        f'<svg width="{width}" height="14" role="img" aria-label="{name}: {said}">'
        f'<rect width="{width}" height="14" rx="2" fill="currentColor" opacity="0.15"/>'
        f'<rect width="{width * share:.1f}" height="14" rx="2" fill="{color}"/></svg>'
        f"<span>{said}</span>"
    )
