"""Djinn: pages the weights of several LLMs through one ring of device memory.

    import djinn_lib as dj

    djinn = dj.Djinn(capacity="25GiB")
    djinn.add("llama-7b", "meta-llama/Llama-2-7b-hf")
    print(djinn.generate("llama-7b", "Why is the sky blue?").text)

Names below are imported when first used, so that tools which only read rows need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Djinn": "engine.djinn",
    "Fleet": "fleet.fleet",
    "Generation": "engine.djinn",
    "ModelSpec": "engine.models.spec",
    "DjinnError": "errors",
    "optimal_bytes": "simulator.optimal",
    "simulate": "simulator.simulate",
}
__all__ = ["Djinn", "DjinnError", "Fleet", "Generation", "ModelSpec", "optimal_bytes", "simulate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'djinn_lib' has no attribute {name!r}")
    return getattr(import_module(f"djinn_lib.{_HOMES[name]}"), name)
