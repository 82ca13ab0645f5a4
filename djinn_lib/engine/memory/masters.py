"""Masters: the complete copy of every model's weights, packed for loading.

A master is filled once and only read after that; an eviction has nothing to save. `HostMasters`
keeps all of them in host memory; `DiskTier` keeps them on disk, behind as much host memory as it
may use. `CompressedMasters` keeps packed bytes in one of these two, and unpacks on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.devices.base import Source
from djinn_lib.engine.memory.layout import Fill, Layout, Report, Shrink, say_nothing
from djinn_lib.errors import ConfigError


class MasterBytes(NamedTuple):
    """The size of one master: of the weights, and of what is stored of them."""

    plain: int
    stored: int


class Masters(Protocol):
    """Masters by the name of their model, wherever they are kept."""

    @property
    def n_bytes(self) -> int:
        """Host memory that they take, in bytes."""
        ...

    def add(self, model: str, layout: Layout, fill: Fill, report: Report = say_nothing) -> None:
        """Make the master of `model`: `fill` gets its tensors by name and writes all of them.

        A `fill` that raises leaves nothing behind. `report` is told what comes after that.

        Raises:
            ConfigError: the name is taken, or the layout is empty or cannot be kept here.
            CapacityError: there is too little memory, or disk space.
        """
        ...

    def discard(self, model: str) -> None:
        """Free the master of `model`, if there is one."""
        ...

    def layout(self, model: str) -> Layout:
        """How the tensors of `model` are packed."""
        ...

    def hold(self, model: str, lasting: bool = False) -> None:
        """Have all bytes of `model` in host memory, and keep them there until `let_go`.

        May take as long as reading them from disk does. Every call needs a `let_go`. `lasting` says
        that it will come when somebody else wants it to, not as soon as the caller is done.

        Raises:
            CapacityError: host memory does not allow it.
            DjinnError: they cannot be read.
        """
        ...

    def let_go(self, model: str, lasting: bool = False) -> None:
        """Undo one `hold` of the same kind.

        Bytes that a copy still reads are guarded by `when_reused`.
        """
        ...

    def read(self, model: str, begin: int, end: int) -> Source:
        """Bytes `begin` to `end` of a held model, for a copier: all of one page of the pager.

        To be read only.
        """
        ...

    def tables(self, model: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The lookup tables of `model`, in host memory, as tensors that `device` can read.

        Raises:
            PlatformError: it cannot.
        """
        ...

    def when_reused(self, block_until_copied: Callable[[str], None]) -> None:
        """Have `block_until_copied(model)` called before memory of a model gets other content."""
        ...

    def sha256(self, model: str) -> str:
        """Hash of the weights in packing order, to compare two masters or one with the device."""
        ...

    def sizes(self) -> dict[str, MasterBytes]:
        """How many bytes each master has, wherever they are kept."""
        ...

    def close(self) -> None:
        """Free all masters; twice is harmless."""
        ...


class Store(Masters, Protocol):
    """Masters of which others decide what is stored; see `CompressedMasters`."""

    def add(
        self,
        model: str,
        layout: Layout,
        fill: Fill,
        report: Report = say_nothing,
        shrink: Shrink | None = None,
    ) -> None:
        """Make the master of `model`; `shrink` packs it when it is filled, and the rest is freed.

        What `read` and `pieces` take is a place among the bytes that are left.
        """
        ...

    def pieces(self, model: str, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Bytes `begin` to `end` of what is stored of a held model, in as many pieces as needed."""
        ...

    def tables(
        self, model: str, device: torch.device, moved_by: int = 0
    ) -> dict[str, torch.Tensor]:
        """The lookup tables, which `shrink` moved by as many bytes; see `Masters.tables`."""
        ...


class HostMasters:
    """Masters in host memory, one buffer a model, all the time.

    Args:
        pin: register masters with the CUDA driver, so that copies run at the rate of the link. A
            master is filled first: registering memory that exists already is the fastest way.
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
        if (master := self._masters.get(model)) is None:
            raise ConfigError(f"the model {model!r} is not in host memory yet; wait for its add()")
        return master[begin:end]

    def pieces(self, model: str, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Bytes `begin` to `end` of `model`, which are one piece."""
        return (self.read(model, begin, end),)

    def tables(
        self, model: str, device: torch.device, moved_by: int = 0
    ) -> dict[str, torch.Tensor]:
        """The lookup tables of `model`, in host memory, as tensors that `device` can read.

        Raises:
            PlatformError: it cannot.
        """
        layout = self._layouts[model]
        if not layout.n_tables:
            return {}
        return layout.table_views(host.seen_from(self._masters[model], device), moved_by)

    def when_reused(self, block_until_copied: Callable[[str], None]) -> None:
        """Masters stay where they are until they are discarded, after their models are removed."""

    def sha256(self, model: str) -> str:
        """Hash of the packed bytes, to compare two masters or a master with the device."""
        return hashlib.sha256(self._masters[model].numpy().data).hexdigest()

    def sizes(self) -> dict[str, MasterBytes]:
        """How many bytes each master has."""
        masters = tuple(self._masters.items())
        return {m: MasterBytes(self._layouts[m].n_bytes, kept.numel()) for m, kept in masters}

    def close(self) -> None:
        """Free all masters."""
        for model in list(self._masters):
            self.discard(model)

    @property
    def n_bytes(self) -> int:
        """Host memory of all masters in bytes."""
        return sum(master.numel() for master in self._masters.values())
