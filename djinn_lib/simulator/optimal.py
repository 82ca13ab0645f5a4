"""Compute the fewest bytes that any schedule can load, with partial residency.

The rule is Belady's, for bytes instead of pages. Load what the requested model misses. If that
overflows the capacity, evict exactly the overflow, from the resident model whose next use is
furthest away, then from the next one.

Why it is optimal: between two uses of a model, only the number of its bytes that are *kept*
matters. Let interval i, of a model of s_i bytes, keep a share y_i in [0, 1]. The load is the first
touches plus sum s_i (1 - y_i). At every request, the bytes kept across it must fit next to the
requested model. Each interval covers consecutive requests, so the constraint matrix has consecutive
ones and is totally unimodular: with sizes in bytes, the linear program has an optimum in whole
bytes. The greedy rule finds it, by an exchange argument. Take an optimal schedule that differs from
the rule, first at some overflow. There it keeps a byte with a later next use instead of one with a
sooner next use. Swap the two until the sooner use. Both take the same room until then. One load is
saved at the sooner use, and at most one is added at the later use. So the rule loads no more.

This holds if a byte of every model costs the same. If not, for example with links of different
rates, the linear program itself has to be solved.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from numbers import Real

from djinn_lib.engine.memory.policies import next_uses
from djinn_lib.errors import CapacityError, ConfigError, TraceError
from djinn_lib.trace import Trace
from djinn_lib.units import format_bytes

MAX_SIZE_BYTES = 1 << 60


def optimal_bytes(
    trace: Trace | Sequence[str], sizes: Mapping[str, int], capacity: int, page_bytes: int = 1
) -> int:
    """Return the fewest bytes that serving a trace can load, from an empty ring.

    Args:
        trace: the requests, or only their models, in order.
        sizes: bytes of each model.
        capacity: bytes of the ring.
        page_bytes: kept and loaded bytes and the capacity are multiples of this. A model's last
            page counts only the bytes that the model fills when it is loaded.

    Raises:
        TraceError, ConfigError, CapacityError: see `models_of` and `pages_of`.
    """
    return sum(optimal_loads(trace, sizes, capacity, page_bytes))


def optimal_loads(
    trace: Trace | Sequence[str], sizes: Mapping[str, int], capacity: int, page_bytes: int = 1
) -> list[int]:
    """Return what each request of an optimal schedule loads, in bytes."""
    models = models_of(trace)
    n_pages = pages_of(models, sizes, capacity, page_bytes)
    free, resident = capacity // page_bytes, dict.fromkeys(n_pages, 0)
    next_use, next_of = next_uses(models), dict.fromkeys(n_pages, math.inf)
    furthest: list[tuple[float, str]] = []  # (-next use, model); stale entries are skipped
    loads = []
    for i, model in enumerate(models):
        missing = n_pages[model] - resident[model]
        loads.append(max(0, sizes[model] - resident[model] * page_bytes))
        free -= missing
        while free < 0:
            at, victim = furthest[0]
            if victim == model or next_of[victim] != -at or not resident[victim]:
                heapq.heappop(furthest)
                continue
            taken = min(-free, resident[victim])
            resident[victim] -= taken
            free += taken
        resident[model], next_of[model] = n_pages[model], next_use[i]
        heapq.heappush(furthest, (-next_use[i], model))
    return loads


def models_of(trace: Trace | Sequence[str]) -> list[str]:
    """Return the model of each request of a trace.

    Raises:
        TraceError: there is no request, or a text in place of a sequence of models.
    """
    if isinstance(trace, str):
        raise TraceError(f"expected a trace or a sequence of model names, got the text {trace!r}")
    models = [r.model for r in trace.requests] if isinstance(trace, Trace) else list(trace)
    if not models:
        raise TraceError("expected a trace of at least 1 request, got none")
    return models


def pages_of(
    models: Sequence[str], sizes: Mapping[str, int], capacity: int, page_bytes: int
) -> dict[str, int]:
    """Return the number of pages of each requested model.

    Raises:
        TraceError: a model has no size.
        ConfigError: a size or the page is no positive, whole number of bytes.
        CapacityError: a model alone is larger than the ring.
    """
    if page_bytes < 1:
        raise ConfigError(f"expected pages of at least 1 byte, got {page_bytes}")
    pages = {}
    for model in dict.fromkeys(models):
        if model not in sizes:
            raise TraceError(
                f"expected a size for every model of the trace, got none for {model!r}"
            )
        size = sizes[model]
        if not isinstance(size, Real) or not 1 <= size <= MAX_SIZE_BYTES or size != int(size):
            raise ConfigError(
                f"expected a size from 1 to {MAX_SIZE_BYTES} bytes for {model!r}, got {size!r}: "
                "sizes are whole numbers of bytes"
            )
        pages[model] = -(-int(sizes[model]) // page_bytes)
        if pages[model] > capacity // page_bytes:
            raise CapacityError(
                f"expected models of at most {format_bytes(capacity)} (the ring), got {model!r} "
                f"with {format_bytes(int(sizes[model]))}: raise the capacity"
            )
    return pages
