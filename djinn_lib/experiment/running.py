"""A system that goes on running between the cells of one process.

To start a system can take longer than to measure it: three engines of vLLM need a minute or two.
So the cells of one system at one capacity run one after the other in one process, which starts it
once. Nothing else is shared: every repeat of every cell begins with nothing on the device.

A process holds at most one system. A cell of another one closes it first, and so does a cell in
which a request failed: what such a system still holds is unknown.
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
    """A system that was started, and what later cells must know of that.

    Attributes:
        system: started and warmed up.
        made_of: what it was started with; a cell with other things needs another system.
        first_cell: the id of the cell that it was started for.
        watch: of the models' files, which it has read.
        device_bytes: of each model, on the device.
        notes: of the system, for the rows.
        base_bytes: device memory in use before the start; None without a driver.
        other_gpu_processes: that held memory of the GPU before the start.
        keep: whether it may go on running after the cell at hand.
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
        """Close the system and give its memory back."""
        self.system.close()
        gc.collect()


@dataclass(slots=True)
class _Process:
    """What this process has running."""

    kept: Running | None = field(default=None)


_process = _Process()


@contextmanager
def running_system(begun: CellRecord, keep_running: bool) -> Iterator[Running]:
    """Have the system of a cell running while the block runs: the kept one, or a new one.

    Args:
        begun: the cell; told what a manifest needs of the start.
        keep_running: whether the next cell of this process is of the same system, so that it goes
            on running after the block. It does not if the block fails, or sets `keep` to False.

    Raises:
        Exception: whatever the system raises when it starts. It has been closed then.
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
