"""vLLM's `/sleep` and `/wake_up` on a ring.

An engine with the ring's worker sleeps on the ring whatever its options call the way to sleep.
Sleeping frees the model's frames and copies nothing; its KV cache stays. Waking loads the whole
model. vLLM from 0.32 on keeps a list of such ways (`--sleep-mode-backend`), and finds this one in
it as "ring", by the entry point `vllm.general_plugins` of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from djinn_lib.errors import ConfigError
from djinn_lib.fleet import vllm_hooks

State = Literal["RUNNING", "SUSPENDED", "RESUMING"]
NAME = "ring"
_MODULE = "vllm.device_allocator.sleep_mode_backend"
_Backend: Any = vllm_hooks.find(f"{_MODULE}:SleepModeBackend") or object


class RingSleepMode(_Backend):
    """A `SleepModeBackend` of vLLM, where vLLM has them.

    Args:
        sleep: frees all frames of the model.
        wake_up: loads it and waits for it.

    Raises:
        ConfigError: neither was given, which is how vLLM makes one for a worker without a ring.
    """

    def __init__(
        self,
        sleep: Callable[[], None] | None = None,
        wake_up: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        if sleep is None or wake_up is None:
            raise ConfigError(
                f"sleep_mode_backend={NAME!r} needs the ring's worker: add "
                "worker_cls='djinn_lib.fleet.vllm_worker.RingWorker', or leave it out"
            )
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

    @classmethod
    def preserves_communicators(cls) -> bool:
        """A model on the ring runs on one device."""
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        """Addresses never change."""
        return True

    @classmethod
    def preserves_graphs_with_communicators(cls) -> bool:
        """Addresses never change."""
        return True


def register() -> None:
    """Make the name known to a vLLM that has such a list; vLLM calls this in each process."""
    if factory := vllm_hooks.find(f"{_MODULE}:SleepModeBackendFactory"):
        with suppress(ValueError):  # it is known
            factory.register_backend(NAME, __name__, RingSleepMode.__name__)
