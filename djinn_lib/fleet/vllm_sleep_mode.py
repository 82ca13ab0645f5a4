"""vLLM's `/sleep` and `/wake_up` on a ring, for a vLLM that lets a worker choose how it sleeps.

Start such an engine with `--enable-sleep-mode --sleep-mode-backend ring`. Sleeping frees the
model's frames and copies nothing; its KV cache stays. Waking loads the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

State = Literal["RUNNING", "SUSPENDED", "RESUMING"]


class RingSleepMode:
    """What vLLM calls a `SleepModeBackend`.

    Args:
        sleep: frees all frames of the model.
        wake_up: loads it and waits for it.
    """

    def __init__(self, sleep: Callable[[], None], wake_up: Callable[[], None]) -> None:
        self._sleep, self._wake_up = sleep, wake_up
        self._state: State = "RUNNING"

    def suspend(self, level: int = 1) -> None:
        """Free all frames; every level is the same, since weights are only read."""
        self._sleep()
        self._state = "SUSPENDED"

    def resume(self, tags: list[str] | None = None) -> None:
        """Load the model, unless only something else is asked for."""
        if tags is not None and "weights" not in tags:
            return
        self._state = "RESUMING"
        self._wake_up()
        self._state = "RUNNING"

    def state(self) -> State:
        """Return whether the model sleeps."""
        return self._state

    def discard(self, tags: tuple[str, ...]) -> None:
        """Nothing: what is not a weight stays where it is."""
