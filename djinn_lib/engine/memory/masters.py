"""The host swap pool: the master copy of every model's weights, packed for loading.

A master is one buffer of exactly the model's size, tensors back to back in execution order, so that
loading the first pages is loading the first layers. Masters are filled once and only read after
that; an eviction has nothing to save.

Lookup tables can be an exception. Of a table of embeddings a token needs one row of some kilobytes,
while the table takes a quarter of a gigabyte of every 7B model; so it can stay where it is: it lies
behind the pages, is never loaded, and the device fetches the rows that it needs over the link.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from djinn_lib.engine.memory.devices import host_memory
from djinn_lib.errors import ConfigError

ALIGNMENT_BYTES = 256  # what CUDA kernels with vector loads, and torch's own allocator, count on

Extents = tuple[tuple[int, int], ...]  # bytes of a packed model: (first, after the last), ascending


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

    def table_views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The lookup tables, as views of at least `n_bytes`."""
        tables = self.slots[len(self.paged) :]
        return {slot.name: slot.view(packed) for slot in tables}


Shaped = tuple[str, tuple[int, ...], torch.dtype]  # the name of a tensor, and what it is
Fill = Callable[[Mapping[str, torch.Tensor]], None]


class SwapPool:
    """One master per model in host memory.

    A `PageSource` that holds everything in memory all the time.

    Args:
        pin: register masters with the CUDA driver, so that copies run at the rate of the link. A
            master is filled first: registering memory that exists already is the fastest way.
    """

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin
        self._masters: dict[str, torch.Tensor] = {}
        self._layouts: dict[str, Layout] = {}

    def add(self, model: str, layout: Layout, fill: Fill) -> None:
        """Make the master of `model`: `fill` gets its tensors by name and writes all of them.

        A `fill` that raises leaves nothing behind.

        Raises:
            ConfigError: the name is taken or the layout is empty.
            CapacityError: the host has too little memory.
        """
        if model in self._masters:
            raise ConfigError(f"expected a new model name, got {model!r}, which was added before")
        if not layout.n_bytes:
            raise ConfigError(f"expected a model with weights, got none for {model!r}")
        master = host_memory.allocate(layout.n_bytes)
        fill(layout.views(master))
        if self._pin:
            host_memory.pin(master)
        self._masters[model], self._layouts[model] = master, layout

    def discard(self, model: str) -> None:
        """Free the master of `model`, if there is one."""
        master = self._masters.pop(model, None)
        self._layouts.pop(model, None)
        if master is not None and self._pin:
            host_memory.unpin(master)

    def layout(self, model: str) -> Layout:
        """How the tensors of `model` are packed."""
        return self._layouts[model]

    def master(self, model: str) -> torch.Tensor:
        """The packed bytes of `model` (1-d uint8, host), to be read only."""
        return self._masters[model]

    def hold(self, model: str, lasting: bool = False) -> None:
        """Nothing to do: a master is always there."""

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Nothing to do."""

    def read(self, model: str, begin: int, end: int) -> torch.Tensor:
        """Bytes `begin` to `end` of `model`, to be read only."""
        return self._masters[model][begin:end]

    def tables(self, model: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The lookup tables of `model`, in host memory, as tensors that `device` can read.

        Raises:
            PlatformError: it cannot.
        """
        layout = self._layouts[model]
        if not layout.n_tables:
            return {}
        return layout.table_views(host_memory.seen_from(self._masters[model], device))

    def when_reused(self, finish_copies: Callable[[str], None]) -> None:
        """Masters stay where they are until they are discarded, after their models are removed."""

    def sha256(self, model: str) -> str:
        """Hash of the packed bytes, to compare two masters or a master with the device."""
        return hashlib.sha256(self._masters[model].numpy().data).hexdigest()

    def close(self) -> None:
        """Free all masters."""
        for model in list(self._masters):
            self.discard(model)

    @property
    def n_bytes(self) -> int:
        """Host memory of all masters in bytes."""
        return sum(master.numel() for master in self._masters.values())
