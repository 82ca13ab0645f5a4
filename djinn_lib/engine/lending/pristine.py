"""Record the state of a module tree, compare it later, and restore it.

Users of a lent model may replace its parameters and modules (adapters do), register hooks, or
switch to training. Such changes end with their lease.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

_REGISTERED = ("_parameters", "_buffers", "_modules")
_REPORTED = ("forward", "config", "generation_config")  # attributes, besides registered items
_ABSENT = object()


class Pristine:
    """The state of a module and all its submodules, without the bytes of parameters.

    It holds the types of modules, and the attributes of modules and configurations. Of containers
    (registered parameters, buffers, modules and hooks) it holds the items. It also holds the bytes
    of buffers.

    Args:
        root: the module, in the state to restore.
    """

    def __init__(self, root: nn.Module) -> None:
        self._kept = [_ObjectState(module, name) for name, module in root.named_modules()]
        self._kept += [
            _ObjectState(config, "config") for config in _configs(getattr(root, "config", None))
        ]
        self._buffers = [
            (name, buffer, buffer.detach().clone()) for name, buffer in root.named_buffers()
        ]

    def restore(self) -> list[str]:
        """Restore everything; return the names of what a user must have changed.

        Changes that a model may make while it runs are restored without being reported: attributes
        that are not registered, and replaced buffers that no checkpoint holds.
        """
        changed = [item for kept in self._kept if kept.differs() for item in kept.restore()]
        with torch.inference_mode(False):
            for name, buffer, original in self._buffers:
                if not _same_bytes(buffer, original):
                    buffer.data = original.clone()
                    changed.append(name)
        return changed


class _ObjectState:
    """The attributes of one object."""

    def __init__(self, thing: object, name: str) -> None:
        self._thing, self._name, self._kind = thing, name, type(thing)
        self._attributes = dict(vars(thing))
        held = [(value, _items(value)) for value in self._attributes.values()]
        self._empty = [value for value, items in held if items == []]
        self._filled = [(value, items) for value, items in held if items]

    def differs(self) -> bool:
        """Whether anything has changed; kept fast, because usually nothing has."""
        present, attributes = vars(self._thing), self._attributes
        return (
            type(self._thing) is not self._kind
            or present.keys() != attributes.keys()
            or not _are_same(list(map(present.__getitem__, attributes)), list(attributes.values()))
            or any(map(len, self._empty))
            or not all(_are_same(_items(value) or [], items) for value, items in self._filled)
        )

    def restore(self) -> Iterator[str]:
        """Restore the object; yield the names of changes to report."""
        present = vars(self._thing)
        if type(self._thing) is not self._kind:
            self._thing.__class__ = self._kind
            yield f"the class of {self._name or 'the model'}"
        for key in dict.fromkeys([*present, *self._attributes]):
            value = self._attributes.get(key, _ABSENT)
            if present.get(key, _ABSENT) is value:
                continue
            if value is _ABSENT:
                del present[key]
            else:
                present[key] = value
            if key in _REPORTED:
                yield self._path(key)
        for container, items in [*self._filled, *((empty, []) for empty in self._empty)]:
            now = _items(container) or []
            if not _are_same(now, items):
                _refill(container, items)
                yield from self._reported(container, now, items)

    def _reported(self, container: Any, now: list[Any], then: list[Any]) -> Iterator[str]:
        """Yield what to report about a container that held other objects than it should."""
        key = next(key for key, value in self._attributes.items() if value is container)
        if key in _REGISTERED:
            unsaved = self._attributes["_non_persistent_buffers_set"]
            before, after = (
                dict(zip(items[::2], items[1::2], strict=True)) for items in (then, now)
            )
            for item in dict.fromkeys([*before, *after]):
                is_same = before.get(item, _ABSENT) is after.get(item, _ABSENT)
                if not is_same and item not in unsaved:
                    yield self._path(item)
        elif key.endswith("_hooks"):
            yield f"hooks of {self._name or 'the model'}"

    def _path(self, attribute: str) -> str:
        return f"{self._name}.{attribute}" if self._name else attribute


def _configs(config: Any) -> list[PretrainedConfig]:
    """Return a configuration and its nested ones, such as that of a text model."""
    if not isinstance(config, PretrainedConfig):
        return []
    return [config, *(inner for value in vars(config).values() for inner in _configs(value))]


def _items(value: Any) -> list[Any] | None:
    """List what a container holds, keys and values in turn; None for anything else."""
    if isinstance(value, dict):
        return [item for pair in value.items() for item in pair]
    return list(value) if isinstance(value, (list, set)) else None


def _are_same(now: list[Any], then: list[Any]) -> bool:
    """Whether these are identical objects, in the same order."""
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _refill(container: Any, items: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        container.update(zip(items[::2], items[1::2], strict=True))
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bits; so a NaN equals itself."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    bits = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)
