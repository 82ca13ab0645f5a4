"""Store a master of each model: a complete copy of its weights, packed for loading.

A master is filled once and is read-only afterwards, so an eviction writes nothing back.
`HostMasters` keeps all masters in host memory. `DiskTier` keeps them on disk, with limited host
memory as a cache. `CompressedMasters` stores compressed bytes in one of these two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.devices.base import Source
from djinn_lib.engine.memory.layout import Fill, Layout, Report, Shrink, say_nothing
from djinn_lib.errors import ConfigError

T = TypeVar("T")


class MasterBytes(NamedTuple):
    """Size of one master in bytes: of its weights, and as it is stored."""

    plain: int
    stored: int


class Masters(Protocol):
    """Masters by the name of their model."""

    @property
    def n_bytes(self) -> int:
        """Host memory used for masters, in bytes."""
        ...

    def add(self, model: str, layout: Layout, fill: Fill, report: Report = say_nothing) -> None:
        """Make the master of `model`: `fill` gets its tensors by name and writes all of them.

        If `fill` raises, nothing is left. `report` is called with later steps, such as compressing.

        Raises:
            ConfigError: the name is taken, or the layout is empty or not supported here.
            CapacityError: there is too little memory, or disk space.
        """
        ...

    def discard(self, model: str) -> None:
        """Free the master of `model`, if there is one."""
        ...

    def layout(self, model: str) -> Layout:
        """Return how the tensors of `model` are packed."""
        ...

    def hold(self, model: str, lasting: bool = False) -> None:
        """Read all bytes of `model` into host memory, and keep them there until `let_go`.

        Every call needs a `let_go`. With `lasting` that may come much later, so others do not
        wait for it.

        Raises:
            CapacityError: there is too little host memory.
            DjinnError: they cannot be read.
        """
        ...

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Undo one `hold` of the same kind.

        Bytes that a copy still reads are guarded by `when_reused`.
        """
        ...

    def read(self, model: str, begin: int, end: int) -> Source:
        """Return bytes `begin` to `end` of a held model, which are one page; read-only."""
        ...

    def tables(self, model: str, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the lookup tables of `model`, in host memory, as tensors that `device` can read.

        Raises:
            PlatformError: the device cannot read them.
        """
        ...

    def when_reused(self, block_until_copied: Callable[[str], None]) -> None:
        """Register a function to call before memory of a model gets other content."""
        ...

    def sha256(self, model: str) -> str:
        """Return the hash of the weights in packing order, to compare masters."""
        ...

    def sizes(self) -> dict[str, MasterBytes]:
        """Return the size of each master."""
        ...

    def close(self) -> None:
        """Free all masters; a second call does nothing."""
        ...


class Store(Masters, Protocol):
    """Masters whose stored bytes `CompressedMasters` decides."""

    def add(
        self,
        model: str,
        layout: Layout,
        fill: Fill,
        report: Report = say_nothing,
        shrink: Shrink | None = None,
    ) -> None:
        """Make the master of `model`; `shrink` compresses it in place, and the rest is freed.

        Positions that `read` and `pieces` take are positions in the stored bytes.
        """
        ...

    def pieces(self, model: str, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Return stored bytes `begin` to `end` of a held model, in one or more pieces."""
        ...

    def tables(
        self, model: str, device: torch.device, moved_by: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return the lookup tables, which `shrink` moved by `moved_by` bytes."""
        ...


class HostMasters:
    """Masters in host memory, one buffer for each model.

    Args:
        pin: register masters with the CUDA driver, so copies run at the rate of the link. A master
            is filled before it is registered, which is faster.
    """

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin
        self._masters: dict[str, torch.Tensor] = {}
        self._layouts: dict[str, Layout] = {}

    def add(
        self,
        model: str,
        layout: Layout,
        fill: Fill,
        report: Report = say_nothing,
        shrink: Shrink | None = None,
    ) -> None:
        """Make the master of `model`; see `Store.add`."""
        if model in self._masters:
            raise ConfigError(f"expected a new model name, got {model!r}, which was added before")
        if not layout.n_bytes:
            raise ConfigError(f"expected a model with weights, got none for {model!r}")
        master = host.allocate(layout.n_bytes)
        fill(layout.views(master))
        if shrink:
            master = host.keep(master, shrink(master))
        if self._pin:
            host.pin(master)
        self._layouts[model], self._masters[model] = layout, master

    def discard(self, model: str) -> None:
        """Free the master of `model`, if there is one."""
        master = self._masters.pop(model, None)
        self._layouts.pop(model, None)
        if master is not None and self._pin:
            host.unpin(master)

    def layout(self, model: str) -> Layout:
        """Return how the tensors of `model` are packed."""
        return _known(model, self._layouts)

    def master(self, model: str) -> torch.Tensor:
        """Return the packed bytes of `model` (1-d uint8, host), read-only."""
        return _known(model, self._masters)

    def hold(self, model: str, lasting: bool = False) -> None:
        """Do nothing: masters are always in host memory."""

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Do nothing."""

    def read(self, model: str, begin: int, end: int) -> torch.Tensor:
        """Return bytes `begin` to `end` of `model`, read-only."""
        return self.master(model)[begin:end]

    def pieces(self, model: str, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Return bytes `begin` to `end` of `model`, as one piece."""
        return (self.read(model, begin, end),)

    def tables(
        self, model: str, device: torch.device, moved_by: int = 0
    ) -> dict[str, torch.Tensor]:
        """Return the lookup tables of `model`, in host memory, as tensors that `device` can read.

        Raises:
            PlatformError: the device cannot read them.
        """
        layout = self.layout(model)
        if not layout.n_tables:
            return {}
        return layout.table_views(host.seen_from(self.master(model), device), moved_by)

    def when_reused(self, block_until_copied: Callable[[str], None]) -> None:
        """Do nothing: the memory of a master is never reused."""

    def sha256(self, model: str) -> str:
        """Return the hash of the packed bytes, to compare masters."""
        return hashlib.sha256(self.master(model).numpy().data).hexdigest()

    def sizes(self) -> dict[str, MasterBytes]:
        """Return the size of each master."""
        layouts, masters = dict(self._layouts), dict(self._masters)  # threads may change them
        return {
            m: MasterBytes(layouts[m].n_bytes, kept.numel())
            for m, kept in masters.items()
            if m in layouts
        }

    def close(self) -> None:
        """Free all masters."""
        for model in list(self._masters):
            self.discard(model)

    @property
    def n_bytes(self) -> int:
        """Host memory of all masters in bytes."""
        return sum(master.numel() for master in tuple(self._masters.values()))


def _known(model: str, kept: Mapping[str, T]) -> T:
    """Return what is kept of a model, which another thread may discard."""
    if (found := kept.get(model)) is None:
        raise ConfigError(
            f"the model {model!r} is not in host memory: add it first, or wait for its add()"
        )
    return found
