"""Keep a system running between the cells of one process.

Starting a system can take longer than measuring it: three engines of vLLM need a minute or two. So
the cells of one system at one capacity run one after the other in one process, which starts it only
once. Nothing else is shared: every repeat of every cell starts with an empty device.

A process holds at most one system. It is closed before a cell of another system, and after a cell
with a failed request, because its state is then unknown.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from djinn_lib.experiment.integrity import WeightsWatch
from djinn_lib.experiment.record import CellRecord
from djinn_lib.systems.base import SystemUnderTest
from djinn_lib.trace import Request


@dataclass(slots=True)
class Running:
    """A started system, and what later cells must know about it.

    Attributes:
        system: the system, started and warmed up.
        made_of: its inputs; a cell with other inputs needs another system.
        first_cell: id of the cell that it was started for.
        watch: watch of the models' files, which it has read.
        device_bytes: bytes of each model on the device.
        notes: notes of the system, for the rows.
        base_bytes: device memory in use before the start; None without a driver.
        other_gpu_processes: other processes with memory of the GPU before the start.
        keep: whether it may keep running after the current cell.
    """

    system: SystemUnderTest
    made_of: Mapping[str, Any]
    first_cell: str
    watch: WeightsWatch
    device_bytes: Mapping[str, int]
    notes: Sequence[str]
    base_bytes: int | None
    other_gpu_processes: Sequence[str]
    keep: bool = False

    def close(self) -> None:
        """Close the system and free its memory."""
        self.system.close()
        gc.collect()


@dataclass(slots=True)
class _Process:
    """The running system of this process."""

    kept: Running | None = field(default=None)


_process = _Process()


@contextmanager
def running_system(begun: CellRecord, keep_running: bool) -> Iterator[Running]:
    """Provide the running system of a cell: the kept one, or a new one.

    Args:
        begun: record of the cell; it receives the facts of the start for the manifest.
        keep_running: whether the next cell of this process uses the same system, which then keeps
            running after the block, unless the block fails or sets `keep` to False.

    Raises:
        Exception: the system did not start; it has been closed.
    """
    running, _process.kept = _process.kept, None
    if running is not None and running.made_of != _made_of(begun):
        running.close()
        running = None
    if running is None:
        running = _started(begun)
    else:
        begun.go_on_with(running)
    running.keep = keep_running
    try:
        yield running
    except BaseException:
        running.keep = False
        raise
    finally:
        if running.keep:
            _process.kept = running
        else:
            running.close()


def _made_of(begun: CellRecord) -> dict[str, Any]:
    profile = begun.bench.profile
    return {
        "system": begun.cell.system,
        "entry": begun.entry,
        "capacity_bytes": begun.capacity_bytes,
        "models": begun.bench.models,
        "profile": profile.model_dump(include={"device", "dtype", "page", "new_tokens"}),
    }


def _started(begun: CellRecord) -> Running:
    """Start the system of a cell and let it serve each model once."""
    begin_s = time.perf_counter()
    watch = WeightsWatch(begun.bench.models)
    system = begun.make_system()
    try:
        notes = list(system.notes())

        def progress(step: str) -> None:
            elapsed_s = time.perf_counter() - begin_s
            print(f"{begun.cell.id}, after {elapsed_s:.0f} s: {step}", flush=True)

        system.start(progress)
        device_bytes = system.device_bytes()
        for name in begun.bench.models:
            watch.ensure_unchanged(name)
            prompt = begun.prompt(Request(0, 0.0, name))
            system.warm_up(name, prompt, begun.bench.profile.new_tokens)
    except BaseException:
        system.close()
        gc.collect()
        raise
    running = Running(
        system, _made_of(begun), begun.cell.id, watch, device_bytes, notes,
        begun.memory.base_bytes, begun.other_gpu_processes,
    )  # fmt: skip
    begun.began_with(running, time.perf_counter() - begin_s)
    return running
