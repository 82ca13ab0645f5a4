"""Djinn: pages the weights of several LLMs through one ring of device memory.

    import djinn_lib as dj

    djinn = dj.Djinn(capacity="25GiB")
    djinn.add("llama-7b", "meta-llama/Llama-2-7b-hf")
    print(djinn.generate("llama-7b", "Why is the sky blue?").text)

Names are imported when first used: tools that only read rows need no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djinn_lib.engine.decode.sampling import Sampling
    from djinn_lib.engine.djinn import Djinn
    from djinn_lib.engine.handles import Model
    from djinn_lib.engine.models.packaged import small_model
    from djinn_lib.engine.models.spec import ModelSpec
    from djinn_lib.engine.serving.generation import Generation
    from djinn_lib.engine.serving.stream import Stream
    from djinn_lib.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DjinnError,
        LeaseError,
        PlatformError,
        RecordError,
        RequestCancelled,
        TraceError,
    )
    from djinn_lib.fleet.fleet import Fleet
    from djinn_lib.fleet.handles import FleetModel
    from djinn_lib.simulator.optimal import optimal_bytes
    from djinn_lib.simulator.simulate import simulate

    __version__: str

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Djinn",
    "DjinnError",
    "Fleet",
    "FleetModel",
    "Generation",
    "LeaseError",
    "Model",
    "ModelSpec",
    "PlatformError",
    "RecordError",
    "RequestCancelled",
    "Sampling",
    "Stream",
    "TraceError",
    "__version__",
    "optimal_bytes",
    "simulate",
    "small_model",
]
_HOMES = {
    "Djinn": "engine.djinn",
    "Fleet": "fleet.fleet",
    "FleetModel": "fleet.handles",
    "Generation": "engine.serving.generation",
    "Model": "engine.handles",
    "ModelSpec": "engine.models.spec",
    "Sampling": "engine.decode.sampling",
    "Stream": "engine.serving.stream",
    "optimal_bytes": "simulator.optimal",
    "simulate": "simulator.simulate",
    "small_model": "engine.models.packaged",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("djinn-lib")
    if name not in __all__:
        raise AttributeError(f"module 'djinn_lib' has no attribute {name!r}")
    return getattr(import_module(f"djinn_lib.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
