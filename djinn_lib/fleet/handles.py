"""One model of a `Fleet`, as `add` returns it: the same methods without the name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from djinn_lib.engine.serving.named import NamedModel
from djinn_lib.fleet.engines import EngineClient

if TYPE_CHECKING:
    from djinn_lib.fleet.fleet import Fleet


class FleetModel(NamedModel):
    """A model of a `Fleet`.

    After the model was removed every method raises `ConfigError`, even if another model has its
    name by then.
    """

    def __init__(self, fleet: Fleet, engine: EngineClient) -> None:
        self._fleet, self._engine = fleet, engine

    @property
    def name(self) -> str:
        """The name of the model in requests."""
        return self._engine.name

    @property
    def is_removed(self) -> bool:
        """Whether the model was removed, or its fleet closed."""
        return not self._fleet.has(self._engine)

    def _ensure_present(self) -> Fleet:
        if not self._fleet.closed and self.is_removed:
            raise self._removed()
        return self._fleet

    def evict(self) -> None:
        """Take all its pages off the device, after the current step."""
        self._ensure_present().evict(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FleetModel) and self._engine is other._engine

    def __hash__(self) -> int:
        return id(self._engine)

    def __repr__(self) -> str:
        state = ", closed" if self._fleet.closed else ", removed" if self.is_removed else ""
        return f"FleetModel({self.name!r}{state})"
