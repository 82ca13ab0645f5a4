"""Record the facts of a running cell for its rows and its manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from djinn_lib import nvml, provenance
from djinn_lib.experiment import machine
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.integrity import WeightsWatch, weights_digest
from djinn_lib.experiment.profile import REPO, Cell
from djinn_lib.experiment.weights import prompt_ids
from djinn_lib.systems import system_class
from djinn_lib.systems.base import SystemUnderTest
from djinn_lib.trace import Request, Trace
from djinn_lib.units import parse_bytes

if TYPE_CHECKING:
    from djinn_lib.experiment.running import Running


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
        self.device_bytes = {name: files.n_bytes for name, files in bench.models.items()}
        self.running_since = ""  # the earlier cell that the system was started for
        self.watch: WeightsWatch  # set when the system has started
        self.prompts: dict[tuple[str, int], list[int]] = {}
        self.commit, self.dirty = provenance.git_state(REPO)
        self.other_gpu_processes = machine.other_gpu_processes()
        self.memory = nvml.MemoryWatch()

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests of one repeat: those of the trace, or as many as the cell has."""
        return self.trace.requests[: self.cell.requests]

    def prompt(self, request: Request) -> list[int]:
        """Return the prompt of a request as token ids, from the model's files."""
        files = self.bench.models[request.model]
        return prompt_ids(files, self.bench.profile.prompt_tokens, request.request)

    def began_with(self, running: Running, setup_s: float) -> None:
        """Record the facts of a system that was started for this cell."""
        self.watch, self.setup_s = running.watch, setup_s
        self.device_bytes = dict(running.device_bytes)
        self.notes.extend(running.notes)

    def go_on_with(self, running: Running) -> None:
        """Record the facts of a system that was started for an earlier cell."""
        self.began_with(running, 0.0)
        self.running_since = running.first_cell
        self.memory.base_bytes = running.base_bytes
        self.other_gpu_processes = list(running.other_gpu_processes)

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
        return {
            "run_id": self.run_id,
            "cell": self.cell.id,
            "system": self.entry.system,
            "options": self.entry.options,
            "profile": profile.name,
            "git_commit": self.commit,
            "git_dirty": self.dirty,
            "other_gpu_processes": self.other_gpu_processes,
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
            "running_since": self.running_since or None,
            "stolen_share": machine.stolen_share(self.cpu_times),
            "host_loop_us": self.host_loop_us,
            "gpu_uuid": nvml.first_gpu() if profile.device == "cuda" else None,
            "batches": system_class(self.entry.system).batches,
            "peak_device_bytes": self.memory.peak_bytes,
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
