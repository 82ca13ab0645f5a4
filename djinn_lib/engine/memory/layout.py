"""Pack the tensors of a model back to back, in the order of execution.

The first pages therefore hold the first layers. Lookup tables can be an exception. A token needs
one row of an embedding table, a few kilobytes, while the table of a 7B model takes a quarter of a
gigabyte. So tables can stay in host memory. They then lie after the pages and are never loaded; the
device reads the rows that it needs over the link.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

ALIGNMENT_BYTES = 256  # vector loads of CUDA kernels need this; torch's allocator gives it

Extents = tuple[tuple[int, int], ...]  # bytes of a packed model: (first, after the last), ascending
Shaped = tuple[str, tuple[int, ...], torch.dtype]  # name, shape and dtype of a tensor
Fill = Callable[[Mapping[str, torch.Tensor]], None]  # writes all tensors, given by name
Report = Callable[[str], object]  # called with what a longer step is doing
Shrink = Callable[[torch.Tensor], int]  # compresses bytes in place; returns how many are left
Advance = Callable[[int], object]  # called with the number of bytes just written


@dataclass(frozen=True, slots=True)
class Slot:
    """Position of one tensor in a packed model; `offset` is in bytes from its start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """First byte after the tensor."""
        return self.offset + self.n_bytes

    def view(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of `packed`, the model's bytes (1-d uint8)."""
        return packed[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The slots of a packed model, in order of their offsets; the last `n_tables` are not paged."""

    slots: tuple[Slot, ...]
    n_tables: int = 0

    @classmethod
    def pack(cls, tensors: Iterable[Shaped], tables: Iterable[Shaped] = ()) -> Layout:
        """Place tensors in the given order, aligned to `ALIGNMENT_BYTES`, then lookup tables."""
        slots, offset, behind = [], 0, list(tables)
        for name, shape, dtype in [*tensors, *behind]:
            slot = Slot(name, tuple(shape), dtype, offset)
            slots.append(slot)
            offset = -(-slot.end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(slots), len(behind))

    @property
    def n_bytes(self) -> int:
        """Size of the packed model in bytes."""
        return self.slots[-1].end if self.slots else 0

    @property
    def paged(self) -> tuple[Slot, ...]:
        """The slots of all tensors but the lookup tables."""
        return self.slots[: len(self.slots) - self.n_tables]

    @property
    def paged_bytes(self) -> int:
        """Size of the paged part, which comes first, in bytes."""
        return self.paged[-1].end if self.paged else 0

    def extents(self, names: Collection[str]) -> Extents:
        """Return where the paged tensors among `names` lie; neighbours form one extent."""
        found: list[tuple[int, int]] = []
        for slot in self.paged:
            if slot.name not in names:
                continue
            if found and slot.offset - found[-1][1] < ALIGNMENT_BYTES:
                found[-1] = found[-1][0], slot.end
            else:
                found.append((slot.offset, slot.end))
        return tuple(found)

    def views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return all tensors by name, as views of `packed` (1-d uint8, at least `n_bytes`)."""
        return {slot.name: slot.view(packed) for slot in self.slots}

    def paged_views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return all tensors except lookup tables, as views of at least `paged_bytes`."""
        return {slot.name: slot.view(packed) for slot in self.paged}

    def table_views(self, packed: torch.Tensor, moved_by: int = 0) -> dict[str, torch.Tensor]:
        """Return the lookup tables, which lie `moved_by` bytes earlier, as views of `packed`."""
        tables = self.slots[len(self.paged) :]
        moved = [replace(slot, offset=slot.offset - moved_by) for slot in tables]
        return {slot.name: slot.view(packed) for slot in moved}


def say_nothing(step: str) -> None:
    """Report nothing."""
