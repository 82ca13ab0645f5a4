"""Leases: the right to use a model, and what granting it took."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from djinn_lib.copier import Load


class Lease:
    """The right to use a model; while it is held, no page of the model is evicted.

    `resident_before_bytes`, `loaded_bytes` and `evicted_bytes` tell what granting it took;
    `plan_s` is the time that evicting and mapping took, in seconds. When the lease started a copy,
    `load` is it.
    """

    def __init__(self, model: str, give_back: Callable[[str], None]) -> None:
        self.model = model
        self.resident_before_bytes = 0
        self.loaded_bytes = 0
        self.evicted_bytes = 0
        self.plan_s = 0.0
        self.load: Load | None = None
        self._give_back = give_back
        self._held = True

    @property
    def stall_s(self) -> float:
        """Seconds that computations waited for the copy that this lease started."""
        return self.load.stall_s if self.load else 0.0

    def release(self) -> None:
        """Give the lease back; the pages stay until somebody else needs the frames."""
        if self._held:
            self._held = False
            self._give_back(self.model)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
