"""How the tensors of a model are packed: back to back, in the order of execution.

So loading the first pages is loading the first layers. Lookup tables can be an exception. Of a
table of embeddings a token needs one row of some kilobytes, while the table takes a quarter of a
gigabyte of every 7B model. So it can stay in host memory: it lies behind the pages, is never
loaded, and the device fetches the rows that it needs over the link.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

ALIGNMENT_BYTES = 256  # what CUDA kernels with vector loads, and torch's own allocator, count on

Extents = tuple[tuple[int, int], ...]  # bytes of a packed model: (first, after the last), ascending
Shaped = tuple[str, tuple[int, ...], torch.dtype]  # the name of a tensor, and what it is
Fill = Callable[[Mapping[str, torch.Tensor]], None]  # writes all tensors, given by name
Report = Callable[[str], object]  # told what a longer step is doing
Shrink = Callable[[torch.Tensor], int]  # packs filled bytes in place: how many it takes, from 0 on
Advance = Callable[[int], object]  # called with how many more bytes have been written


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in a packed model: `offset` and `n_bytes` in bytes from its start."""

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
        """The tensor as a view of `packed`, the model's bytes (1-d uint8)."""
        return packed[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The slots of a packed model, in order of their offsets; the last `n_tables` are not paged."""

    slots: tuple[Slot, ...]
    n_tables: int = 0

    @classmethod
    def pack(cls, tensors: Iterable[Shaped], tables: Iterable[Shaped] = ()) -> Layout:
        """Lay tensors out in the given order, aligned to `ALIGNMENT_BYTES`, then lookup tables."""
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
        """Size of what is paged, which comes first, in bytes."""
        return self.paged[-1].end if self.paged else 0

    def extents(self, names: Collection[str]) -> Extents:
        """Where the paged tensors among `names` lie; neighbours are one extent."""
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
        """Every tensor by name, as views of `packed` (1-d uint8 of at least `n_bytes`)."""
        return {slot.name: slot.view(packed) for slot in self.slots}

    def paged_views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every tensor but the lookup tables, as views of at least `paged_bytes`."""
        return {slot.name: slot.view(packed) for slot in self.paged}

    def table_views(self, packed: torch.Tensor, moved_by: int = 0) -> dict[str, torch.Tensor]:
        """The lookup tables, as views of `packed`, where they lie `moved_by` bytes earlier."""
        tables = self.slots[len(self.paged) :]
        moved = [replace(slot, offset=slot.offset - moved_by) for slot in tables]
        return {slot.name: slot.view(packed) for slot in moved}


def say_nothing(step: str) -> None:
    """Report nothing."""
