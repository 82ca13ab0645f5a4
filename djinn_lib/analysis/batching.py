"""Rows of waiting requests that are no fair comparison, and so are not shown beside others.

vLLM batches the requests of a model by default. The systems here gave its engines one request at a
time through a single thread. How long their queues took therefore says nothing of vLLM.
"""

from __future__ import annotations

import pandas as pd

from djinn_lib.analysis.plots.style import order_systems, system_look

COULD_NOT_BATCH = frozenset({"vllm_recreate", "vllm_sleep", "vllm_sleep_naive"})
WHY = "vLLM batches by default, and was given one request at a time"


def split_unbatched(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of systems that can be compared, and a note that names the others, if any.

    Args:
        rows: of requests that wait for each other. Those of systems that cannot run on this machine
            stay.
    """
    unfair = rows["system"].isin(COULD_NOT_BATCH) & (rows["error_kind"] != "unavailable")
    names = [system_look(system).label for system in order_systems(rows.loc[unfair, "system"])]
    return rows[~unfair], [f"Left out: {', '.join(names)} ({WHY})."] if names else []
