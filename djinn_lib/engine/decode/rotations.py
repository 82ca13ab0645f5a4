"""Rotary positions whose frequencies change with the length of the sequence.

Most frequencies are fixed. With "dynamic" and "longrope" a forward pass that goes beyond some
length computes others and keeps them in the module; keys that were cached before have been turned
by the old ones, and some models then compute the whole sequence anew. A recorded step can do none
of that. And what a long request has left in a module must not reach the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional", "mrope"})


def changing_rotation(model: PreTrainedModel) -> str | None:
    """Return the kind of rotary positions that changes with the length; None if none does.

    What is not known to be fixed counts as changing.
    """
    told = [*_told(model.config.to_dict()), *(kind for m in model.modules() for kind in _kinds(m))]
    return next((kind for kind in told if kind not in FIXED), None)


def _kinds(module: nn.Module) -> list[str]:
    """The kinds that a module computes: one, or one for each type of layer."""
    kind: Any = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return [kind for kind in kinds if isinstance(kind, str)]


def _told(options: Mapping[str, Any], rotary: bool = False) -> Iterator[str]:
    """The kinds that a configuration names, wherever it does."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _told(value, rotary or "rope" in str(key))
        elif rotary and key in ("rope_type", "type") and isinstance(value, str):
            yield value


_FRESH: WeakKeyDictionary[PreTrainedModel, list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]]
_FRESH = WeakKeyDictionary()


def forget_lengths(model: PreTrainedModel) -> None:
    """Let a model rotate as it did when this function first saw it, whatever it has computed since.

    It costs nothing where rotations are fixed.
    """
    if model not in _FRESH:
        _FRESH[model] = [
            (module, dict(vars(module)), dict(module._buffers))
            for module in model.modules()
            if any(kind not in FIXED for kind in _kinds(module))
        ]
    for module, attributes, buffers in _FRESH[model]:
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
