"""Describe where a tensor is, and make tensors over memory managed elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

_C: Any = torch._C


@dataclass(frozen=True, slots=True)
class Place:
    """The address and form of a tensor; `n_bytes` spans its first to last element."""

    address: int
    n_bytes: int
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """Describe a tensor; its bytes need not be mapped."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        n_bytes = span * tensor.element_size() if tensor.numel() else 0
        return cls(tensor.data_ptr(), n_bytes, tensor.device, tensor.dtype, shape, stride)

    def view(self) -> tuple[Tensor, UntypedStorage]:
        """Make a tensor in this place, with a storage that no other tensor shares."""
        storage: Any = _C._construct_storage_from_data_pointer(
            self.address, self.device, self.n_bytes
        )
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, 0, self.shape, self.stride), storage
