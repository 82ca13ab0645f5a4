"""Draw a fleet: the requests of several models, and the contents of the ring."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from djinn_lib.analysis.plots.style import (
    COLUMN_IN,
    byte_scale,
    footnote,
    model_colors,
    nothing_to_draw,
    styled,
)


@styled
def requests_and_ring(
    requests: pd.DataFrame, residency: pd.DataFrame, capacity_bytes: int, reason: str | None = None
) -> Figure:
    """Draw every request as a line, and below it the bytes of each model on the ring.

    Args:
        requests: columns model, request, begin_s, first_s, end_s.
        residency: columns at_s, model, resident_bytes.
        capacity_bytes: capacity of the ring.
        reason: why there is nothing to draw on this machine.
    """
    if reason:
        return nothing_to_draw(f"Not on this machine: {reason}")
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(COLUMN_IN, 3.4), sharex=True, layout="constrained"
    )
    colors = model_colors(requests["model"])
    for y, row in enumerate(requests.sort_values(["model", "begin_s"]).itertuples()):
        color = colors[str(row.model)]
        above.plot([row.begin_s, row.first_s], [y, y], color=color, linewidth=0.8, alpha=0.4)
        above.plot([row.first_s, row.end_s], [y, y], color=color, linewidth=2.0)
    above.set_yticks([])
    above.set_ylabel("requests")
    scale, unit = byte_scale(capacity_bytes)
    if not residency.empty:
        table = residency.pivot_table(index="at_s", columns="model", values="resident_bytes")
        table = table.fillna(0)[sorted(colors)]
        below.stackplot(
            table.index,
            [table[model] / scale for model in table],
            colors=[colors[model] for model in table],
            labels=list(table),
            step="post",
        )
        figure.legend(loc="outside upper center", ncols=len(colors))
    below.axhline(capacity_bytes / scale, color="black", linewidth=0.8, linestyle="--")
    below.set_ylabel(f"on the ring ({unit})")
    below.set_xlabel("seconds")
    footnote(figure, ["thin: waiting for the first token; thick: decoding; dashed: the ring"])
    return figure
