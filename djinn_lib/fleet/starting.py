"""Which engines may start side by side: as many as the device has memory for.

While vLLM loads a model, its weights are on the device a second time, beside the ring. An engine
that starts waits until the free memory, without what other starting engines may still take, is
enough for it. On the CPU engines start as they are added.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BESIDE_BYTES = 4 << 30  # an engine's context, activations and graphs, with a reserve


class StartingRoom:
    """Admits engines that start, by the device memory that they need meanwhile.

    Args:
        free_bytes: how much device memory is free now; None where nobody knows.
    """

    def __init__(self, free_bytes: Callable[[], int | None]) -> None:
        self._free_bytes = free_bytes
        self._needs: list[float] = []  # of the engines that are starting
        self._changed = threading.Condition()

    @contextmanager
    def held(self, need_bytes: float) -> Iterator[None]:
        """Wait for the memory that an engine needs to start, and hold it while the block runs.

        An engine that starts alone always may: if it does not fit, vLLM says so.
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
        # Part of the other needs is taken already, and counts twice: rather wait than run out.
        return free_bytes is not None and sum(self._needs) + need_bytes <= free_bytes


def need_bytes(source: str | Path, options: Mapping[str, Any]) -> float:
    """Return the device memory (bytes) that an engine takes while it starts.

    Args:
        source: of the model. Infinite for anything but a folder: its size is not known yet.
        options: of the engine.
    """
    weights = [file.stat().st_size for file in Path(source).glob("*.safetensors")]
    if not weights:
        return math.inf
    return sum(weights) + int(options.get("kv_cache_memory_bytes") or 0) + _BESIDE_BYTES
