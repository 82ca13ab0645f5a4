"""Limit how many engines start at the same time, by the device memory that they need.

While vLLM loads a model, its weights are on the device a second time, outside the ring. A starting
engine therefore waits until there is enough free memory for it and for the other starting engines.
On the CPU, engines start as they are added.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BESIDE_BYTES = 4 << 30  # context, activations and graphs of an engine, with a reserve


class StartingRoom:
    """Admit starting engines, by the device memory that they need while they start.

    Args:
        free_bytes: returns how much device memory is free now; None if unknown.
    """

    def __init__(self, free_bytes: Callable[[], int | None]) -> None:
        self._free_bytes = free_bytes
        self._needs: list[float] = []  # of the engines that are starting
        self._changed = threading.Condition()

    @contextmanager
    def held(self, need_bytes: float) -> Iterator[None]:
        """Wait for the memory that an engine needs to start, and reserve it during the block.

        If no other engine is starting, there is no wait: vLLM itself reports if it does not fit.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._fits(need_bytes))
            self._needs.append(need_bytes)
        try:
            yield
        finally:
            with self._changed:
                self._needs.remove(need_bytes)
                self._changed.notify_all()

    def _fits(self, need_bytes: float) -> bool:
        if not self._needs:
            return True
        free_bytes = self._free_bytes()
        # The other engines may already use a part of their needs. That part counts twice, which may
        # make an engine wait too long, but never runs out of memory.
        return free_bytes is not None and sum(self._needs) + need_bytes <= free_bytes


def need_bytes(source: str | Path, options: Mapping[str, Any]) -> float:
    """Return the device memory (bytes) that an engine takes while it starts.

    Args:
        source: source of the model. If it is not a folder of safetensors, its size is unknown and
            the result is infinite.
        options: options of the engine.
    """
    weights = [file.stat().st_size for file in Path(source).glob("*.safetensors")]
    if not weights:
        return math.inf
    return sum(weights) + int(options.get("kv_cache_memory_bytes") or 0) + _BESIDE_BYTES
