"""Pack the parameters of a module into bytes to page, and bind them to the pages.

Parameters outside the layers come first, then those of each layer in order. So a layer may run when
all bytes up to its own end are loaded.

Packing works on storages, each once. Tied parameters, views of one tensor and transposed ones keep
their shapes, strides and sharing. Other tensors (buffers, tables of positions, scales) keep their
memory, because they may be written to.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from djinn_lib.engine.memory.layout import Layout
from djinn_lib.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Bound:
    """A tensor over a packed storage: `offset` is its first byte in the packed model."""

    tensor: torch.Tensor
    offset: int

    def view(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the same tensor in other memory."""
        shape, strides, size = self.tensor.shape, self.tensor.stride(), self.tensor.element_size()
        n_elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        held = packed[self.offset : self.offset + n_elements * size]
        return held.view(self.tensor.dtype).as_strided(shape, strides)


class PackedParameters:
    """The parameters of `module`: those outside `layers`, then those of each layer.

    Attributes:
        layout: a slot for each storage, as bytes.
        layer_ends: for each layer, the end (exclusive) of the bytes that it and all layers before
            it need.
        outside_end: the end (exclusive) of the bytes outside the layers.

    Raises:
        ConfigError: the module has no parameters.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module] = ()) -> None:
        self._module = module
        self._storages: dict[str, torch.UntypedStorage] = {}
        names: dict[int, str] = {}  # of storages, by address
        in_layers = {id(one) for layer in layers for one in layer.parameters()}
        parameters = list(module.named_parameters())
        for name, parameter in sorted(parameters, key=lambda item: id(item[1]) in in_layers):
            storage = parameter.untyped_storage()
            if parameter.numel() and storage.data_ptr() not in names:
                names[storage.data_ptr()] = name
                self._storages[name] = storage
        if not names:
            raise ConfigError(
                f"{type(module).__name__} has no parameters to page: serve it without a ring"
            )
        self.layout = Layout.pack(
            (name, (storage.nbytes(),), torch.uint8) for name, storage in self._storages.items()
        )
        self._offsets = {slot.name: slot.offset for slot in self.layout.slots}
        self._names = names
        outside = (one for _, one in parameters if id(one) not in in_layers)
        self.outside_end = self._end_of(outside)
        ends = [self._end_of(layer.parameters()) for layer in layers]
        self.layer_ends = tuple(accumulate(ends, max, initial=self.outside_end))[1:]

    def fill(self, slots: Mapping[str, torch.Tensor]) -> None:
        """Copy every storage into its slot."""
        for name, storage in self._storages.items():
            held: Any = torch.empty(0, dtype=torch.uint8, device=storage.device)
            slots[name].copy_(held.set_(storage, 0, (storage.nbytes(),)))

    @torch.no_grad()
    def bind(self, view: torch.Tensor) -> None:
        """Bind every parameter, and every other tensor over the same memory, to `view`.

        Nothing is read or written. The previous memory of the parameters is freed.

        Args:
            view: the packed model (1-d uint8), on the device that computes.
        """
        for parameter in self._module.parameters():
            if bound := self._bound(parameter):
                parameter.data = bound.view(view)
        for module, name, tensor in list(self._aliases()):
            if bound := self._bound(tensor):
                setattr(module, name, bound.view(view))
        self._storages.clear()
        self._names.clear()
        gc.collect()

    def _end_of(self, parameters: Iterable[torch.Tensor]) -> int:
        """Return the end (exclusive) of the storages of some parameters, in bytes."""
        names = [self._names.get(one.untyped_storage().data_ptr()) for one in parameters]
        slots = {slot.name: slot.end for slot in self.layout.slots}
        return max((slots[name] for name in names if name), default=0)

    def _bound(self, tensor: torch.Tensor) -> _Bound | None:
        """Locate a tensor in the packed model; None if it is not packed."""
        if not tensor.numel() or tensor.layout is not torch.strided:
            return None
        name = self._names.get(tensor.untyped_storage().data_ptr())
        return (name and _Bound(tensor, self._offsets[name] + _offset_bytes(tensor))) or None

    def _aliases(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        """Yield the tensors that modules hold as plain attributes."""
        for module in self._module.modules():
            for name, value in _plain_attributes(module):
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    yield module, name, value


def _plain_attributes(module: nn.Module) -> Iterable[tuple[str, object]]:
    return list(vars(module).items())


def _offset_bytes(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()
