"""A running cell: the facts for its rows and manifest, and the system that serves it.

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
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psutil

from djinn_lib import nvml, provenance
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.profile import REPO, Cell
from djinn_lib.experiment.setup import machine
from djinn_lib.experiment.setup.integrity import WeightsWatch, weights_digest
from djinn_lib.experiment.setup.weights import prompt_ids
from djinn_lib.systems import resizes, system_class
from djinn_lib.systems.base import SystemUnderTest
from djinn_lib.trace import Request, Trace
from djinn_lib.units import parse_bytes


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
        decoding: how it decodes with each model, for the manifest.
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
    decoding: Mapping[str, Mapping[str, Any]]
    base_bytes: int | None
    other_gpu_processes: list[str]
    keep: bool = False


class CellRecord:
    """Facts of a running cell, from its start on."""

    def __init__(self, bench: Bench, cell: Cell, trace: Trace) -> None:
        self.bench, self.cell, self.trace = bench, cell, trace
        self.entry = bench.profile.systems[cell.system]
        self.capacity_bytes = bench.capacity_bytes(cell.capacity_label)
        self.started = datetime.now(UTC)
        self.run_id = f"{cell.id}-{self.started:%Y%m%dT%H%M%S%f}"
        self.begin_s = time.perf_counter()
        self.cpu_times = psutil.cpu_times()
        self.host_loop_us: list[list[float]] = []  # before each request, one list for each repeat
        self.setup_s = 0.0
        self.notes: list[str] = []
        self.decoding: Mapping[str, Mapping[str, Any]] = {}
        self.device_bytes: Mapping[str, int]
        self.device_bytes = {name: files.n_bytes for name, files in bench.models.items()}
        self.running_since: str | None = None  # the earlier cell that the system was started for
        self.watch: WeightsWatch  # set when the system has started
        self.prompts: dict[tuple[str, int], list[int]] = {}
        self.commit, self.dirty = provenance.git_state(REPO)
        self.other_gpu_processes = machine.other_gpu_processes()
        self.busy_neighbours = set(self._busy_neighbours())
        self.memory = nvml.MemoryWatch()

    def _busy_neighbours(self) -> list[str]:
        return nvml.busy_neighbours() if self.bench.profile.device == "cuda" else []

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests of one repeat: those of the trace, or as many as the cell has."""
        return self.trace.requests[: self.cell.requests]

    def prompt(self, request: Request) -> list[int]:
        """Return the prompt of a request as token ids, from the model's files."""
        files = self.bench.models[request.model]
        return prompt_ids(files, self.bench.profile.prompt_tokens, request.request)

    def uses(self, running: Running) -> None:
        """Record the facts of the system, which may have been started for an earlier cell."""
        self.watch, self.device_bytes = running.watch, running.device_bytes
        self.notes.extend(running.notes)
        self.decoding = running.decoding
        self.memory.base_bytes = running.base_bytes
        self.memory.begin_serving()
        self.other_gpu_processes = running.other_gpu_processes

    def keys(self, repeat: int, request: Request) -> dict[str, Any]:
        """Return the columns that identify the request of a row."""
        return {
            "run_id": self.run_id,
            "system": self.cell.system,
            "mode": self.cell.mode,
            "start": self.cell.start,
            "capacity_bytes": self.capacity_bytes,
            "capacity_label": self.cell.capacity_label,
            "trace": self.cell.trace,
            "repeat": repeat,
            "request": request.request,
            "model": request.model,
            "arrival_s": request.arrival_s,
            "start_s": time.perf_counter() - self.begin_s,
            "note": "; ".join(self.notes),
        }

    def note_pace(self, repeat: int) -> None:
        """Record the host's pace before a request of a repeat."""
        while len(self.host_loop_us) <= repeat:
            self.host_loop_us.append([])
        self.host_loop_us[repeat].append(round(machine.host_loop_us(), 1))

    def take_over(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Continue the record of a process that died, from the rows that it left.

        The run id and the times of the start are those of the dead process.
        """
        if not rows:
            return
        if len(run_ids := {row["run_id"] for row in rows}) == 1:
            (self.run_id,) = run_ids
        ends_s = [row["start_s"] + np.nan_to_num(row["total_ms"]) / 1e3 for row in rows]
        self.begin_s -= max(ends_s)
        self.started -= timedelta(seconds=max(ends_s))
        self.setup_s = min(row["start_s"] for row in rows)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest: the origin of the rows."""
        profile = self.bench.profile
        if self.dirty:
            self.notes.append("the working tree differed from the commit")
        if self.other_gpu_processes:
            self.notes.append("other processes held memory of the GPU")
        self.busy_neighbours.update(self._busy_neighbours())
        if self.busy_neighbours:
            self.notes.append("another GPU of the host was in use")
        return {
            "run_id": self.run_id,
            "cell": self.cell.id,
            "system": self.entry.system,
            "options": self.entry.options,
            "profile": profile.name,
            "git_commit": self.commit,
            "git_dirty": self.dirty,
            "other_gpu_processes": self.other_gpu_processes,
            "busy_neighbours": sorted(self.busy_neighbours),
            "versions": machine.versions(),
            "machine": self.bench.machine,
            "trace_sha256": self.trace.sha256,
            "models": {
                name: {
                    "bytes": f.n_bytes,
                    "device_bytes": self.device_bytes[name],
                    "dtype": f.dtype,
                    "sha256": weights_digest(f.digests),
                }
                for name, f in self.bench.models.items()
            },
            "parameters": {
                **profile.model_dump(exclude={"cells", "systems"}),
                "page_bytes": self.page_bytes,
                "repeats": self.cell.repeats,
                "requests": len(self.requests),
                "mode": self.cell.mode,
                "start": self.cell.start,
                "speed": str(self.cell.speed),
            },
            "started_at_utc": self.started.isoformat(),
            "wall_s": time.perf_counter() - self.begin_s,
            "setup_s": self.setup_s,
            "running_since": self.running_since,
            "stolen_share": machine.stolen_share(self.cpu_times),
            "host_loop_us": self.host_loop_us,
            "gpu_uuid": nvml.first_gpu() if profile.device == "cuda" else None,
            "batches": system_class(self.entry.system).batches,
            "peak_device_bytes": self.memory.peak_bytes,
            "serving_device_bytes": self.memory.serving_bytes,
            "decoding": self.decoding or None,
            "notes": self.notes,
        }

    @property
    def page_bytes(self) -> int:
        """Size of a page in bytes."""
        return parse_bytes(str(self.entry.options.get("page", self.bench.profile.page)))

    def make_system(self) -> SystemUnderTest:
        """Create the system under test; it is not started yet."""
        options = dict(self.entry.options)
        cls = system_class(self.entry.system)
        if "page" in cls.option_names:
            options.setdefault("page", self.bench.profile.page)
        device = self.bench.profile.device
        return cls(self.bench.models, self.capacity_bytes, device, **options)


_kept: list[Running] = []  # the system that runs between two cells of this process, if one does


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
    running = _kept.pop() if _kept else None
    if running and not _goes_on(running, begun):
        _close(running.system)
        running = None
    if running:
        begun.running_since = running.first_cell
    else:
        running = _started(begun)
    begun.uses(running)
    running.keep = keep_running
    try:
        yield running
    except BaseException:
        running.keep = False
        raise
    finally:
        if running.keep:
            _kept.append(running)
        else:
            _close(running.system)


def _goes_on(running: Running, begun: CellRecord) -> bool:
    """Whether a running system serves the cell too; its capacity changes if it must and can."""
    if running.made_of != _made_of(begun):
        return False
    if running.system.capacity_bytes == begun.capacity_bytes:
        return True
    if not resizes(begun.entry.system, begun.entry.options):
        return False
    try:
        running.system.resize(begun.capacity_bytes)
    except Exception:  # a new one says what is wrong
        return False
    return True


def _close(system: SystemUnderTest) -> None:
    system.close()
    gc.collect()


def _made_of(begun: CellRecord) -> dict[str, Any]:
    profile = begun.bench.profile
    return {
        "system": begun.cell.system,
        "entry": begun.entry,
        "models": begun.bench.models,
        "profile": profile.model_dump(include={"device", "dtype", "page", "new_tokens"}),
    }


def _started(begun: CellRecord) -> Running:
    """Start the system of a cell and let it serve each model once."""
    begin_s = time.perf_counter()

    def progress(step: str) -> None:
        elapsed_s = time.perf_counter() - begin_s
        print(f"{begun.cell.id}, after {elapsed_s:.0f} s: {step}", flush=True)

    watch, system = WeightsWatch(begun.bench.models), begun.make_system()
    try:
        notes = system.notes()
        system.start(progress)
        for name in begun.bench.models:
            watch.ensure_unchanged(name)
            prompt = begun.prompt(Request(0, 0.0, name))
            system.warm_up(name, prompt, begun.bench.profile.new_tokens)
    except BaseException:
        _close(system)
        raise
    begun.setup_s = time.perf_counter() - begin_s
    return Running(
        system, _made_of(begun), begun.cell.id, watch, system.device_bytes(), notes,
        system.decoding(), begun.memory.base_bytes, begun.other_gpu_processes,
    )  # fmt: skip
