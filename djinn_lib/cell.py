"""Runs one cell: one system, one trace, one capacity, in this process.

A failed request is a row with its cause, and the cell goes on. Rows are noted one by one in a
journal, so that a process that dies loses nothing but the request it died on; `close_dead_cell`
turns the journal of such a cell into rows.

A cell that was interrupted by its user is run again from its first request instead: half of it in
one process and half in another would not be the cold start and the sequence that the rows tell of.
Until then its journal stays where it is, for whoever wants to look at it.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from djinn_lib import machine
from djinn_lib.bench import Bench
from djinn_lib.errors import TraceError, in_words
from djinn_lib.files import ensure_writable
from djinn_lib.integrity import WeightsWatch, weights_digest
from djinn_lib.profile import REPO, Cell
from djinn_lib.records import (
    classify_error,
    failed_row,
    rows_frame,
    token_sha,
    write_manifest,
    write_rows,
)
from djinn_lib.systems import SystemUnderTest, system_class
from djinn_lib.trace import Request, Trace, check_models, read_trace
from djinn_lib.units import parse_bytes
from djinn_lib.weights import prompt_ids


def run_cell(bench: Bench, cell: Cell) -> pd.DataFrame:
    """Run a cell, write its rows and manifest, and return the rows.

    Raises:
        TraceError: the trace is broken, empty, or names a model that the profile lacks.
        ConfigError: the run's folder cannot be written to.
        RecordError: the rows break the schema, which is a bug of the system.
        OSError: the disk is full; the rows so far are in the journal, if they could be written.
    """
    trace = _read_trace(bench, cell)
    check_models(trace, bench.models)
    ensure_writable(bench.rows_path(cell).parent)  # before minutes are spent
    begun = _Start(bench, cell, trace)
    rows = list(_rows(begun))
    frame = rows_frame(rows)
    write_rows(frame, bench.rows_path(cell))
    write_manifest(begun.manifest(), bench.manifest_path(cell))
    bench.journal_path(cell).unlink(missing_ok=True)
    return frame


def close_dead_cell(bench: Bench, cell: Cell, kind: str, error: str) -> pd.DataFrame:
    """Write the rows of a cell whose process died: those it finished, the rest as failed.

    Args:
        bench: of the run.
        cell: that died.
        kind: an error kind, such as "kernel_died".
        error: what is known of the cause.

    Raises:
        TraceError: the trace is broken or empty, so that nobody knows what to write.
        OSError: the rows cannot be written either; the journal is still there then.
    """
    trace = _read_trace(bench, cell)
    begun = _Start(bench, cell, trace)
    begun.notes.append(f"the process of this cell died: {error}")
    journal = bench.journal_path(cell)
    lines = journal.read_text().splitlines() if journal.exists() else []
    rows = [row for line in lines if (row := _whole_row(line))]
    done = {(row["repeat"], row["request"]) for row in rows}
    for repeat in range(cell.repeats):
        for request in trace.requests:
            if (repeat, request.request) not in done:
                rows.append(failed_row(**begun.keys(repeat, request), error_kind=kind, error=error))
    frame = rows_frame(rows)
    write_rows(frame, bench.rows_path(cell))
    write_manifest(begun.manifest(), bench.manifest_path(cell))
    journal.unlink(missing_ok=True)
    return frame


def _read_trace(bench: Bench, cell: Cell) -> Trace:
    trace = read_trace(bench.trace_path(cell.trace))
    if not trace.requests:
        raise TraceError(
            f"expected a trace of at least 1 request, got none in {bench.trace_path(cell.trace)}: "
            "make the trace anew"
        )
    return trace


def _whole_row(line: str) -> dict[str, Any] | None:
    """The row of a journal line; None for one that was cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class _Start:
    """A cell at its start: everything its rows and manifest repeat."""

    def __init__(self, bench: Bench, cell: Cell, trace: Trace) -> None:
        self.bench, self.cell, self.trace = bench, cell, trace
        self.entry = bench.profile.systems[cell.system]
        self.capacity_bytes = bench.capacity_bytes(cell.capacity_label)
        self.started = datetime.now(UTC)
        self.run_id = f"{cell.id}-{self.started:%Y%m%dT%H%M%S%f}"
        self.begin_s = time.perf_counter()
        self.setup_s = 0.0
        self.notes: list[str] = []
        self.watch: WeightsWatch  # from the start of the system on
        self.prompts: dict[tuple[str, int], list[int]] = {}
        self.commit, self.dirty = machine.git_state(REPO)
        self.other_gpu_processes = machine.other_gpu_processes()

    def keys(self, repeat: int, request: Request) -> dict[str, Any]:
        """The columns that say which request a row is about."""
        return {
            "run_id": self.run_id,
            "system": self.cell.system,
            "mode": "sequential",
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

    def manifest(self) -> dict[str, Any]:
        """Where the rows come from."""
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
                name: {"bytes": f.n_bytes, "dtype": f.dtype, "sha256": weights_digest(f.digests)}
                for name, f in self.bench.models.items()
            },
            "parameters": {
                **profile.model_dump(exclude={"cells", "systems"}),
                "page_bytes": self.page_bytes,
                "repeats": self.cell.repeats,
            },
            "started_at_utc": self.started.isoformat(),
            "wall_s": time.perf_counter() - self.begin_s,
            "setup_s": self.setup_s,
            "notes": self.notes,
        }

    @property
    def page_bytes(self) -> int:
        """Size of a page in bytes."""
        return parse_bytes(str(self.entry.options.get("page", self.bench.profile.page)))

    def make_system(self) -> SystemUnderTest:
        """The system, not started yet."""
        options = dict(self.entry.options)
        cls = system_class(self.entry.system)
        if "page" in cls.option_names:
            options.setdefault("page", self.bench.profile.page)
        device = self.bench.profile.device
        return cls(self.bench.models, self.capacity_bytes, device, **options)


def _rows(begun: _Start) -> Iterator[dict[str, Any]]:
    """Yield a row per request; each is in the journal before it is yielded."""
    cls, profile = system_class(begun.entry.system), begun.bench.profile
    if reason := cls.unavailable(profile.device):
        yield from _all_failed(begun, "unavailable", reason)
        return
    journal = begun.bench.journal_path(begun.cell)
    journal.unlink(missing_ok=True)
    with ExitStack() as running:
        try:
            system = _start(begun, running)
        except Exception as error:
            traceback.print_exc()
            reason = f"could not start: {in_words(error)}"
            yield from _all_failed(begun, classify_error(error), reason)
            return
        with journal.open("w") as lines:
            requests = tqdm(list(_requests(begun)), desc=begun.cell.id, unit="req", mininterval=2)
            for repeat, request in requests:
                row = _serve(begun, system, repeat, request)
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                yield row
                if row["error_kind"] == "oom":
                    _free_unused_memory()


def _all_failed(begun: _Start, kind: str, error: str) -> Iterator[dict[str, Any]]:
    """A failed row for every request of the cell, for one and the same reason."""
    for repeat, request in _requests(begun):
        yield failed_row(**begun.keys(repeat, request), error_kind=kind, error=error)


def _requests(begun: _Start) -> Iterator[tuple[int, Request]]:
    for repeat in range(begun.cell.repeats):
        for request in begun.trace.requests:
            yield repeat, request


def _start(begun: _Start, running: ExitStack) -> SystemUnderTest:
    """Start and warm up the system, which is closed with `running` whatever happens."""
    begin_s = time.perf_counter()
    watch = begun.watch = WeightsWatch(begun.bench.models)
    # Read now, so that a system that needs no files while it serves goes on without them.
    begun.prompts = {(r.model, r.request): _prompt(begun, r) for r in begun.trace.requests}
    system = begun.make_system()
    running.callback(gc.collect)
    running.callback(system.close)
    begun.notes.extend(system.notes())
    system.start(progress=lambda step: print(f"{begun.cell.id}: {step}", flush=True))
    for name in begun.bench.models:
        watch.ensure_unchanged(name)
        system.warm_up(name, _prompt(begun, Request(0, 0.0, name)))
    begun.setup_s = time.perf_counter() - begin_s
    return system


def _prompt(begun: _Start, request: Request) -> list[int]:
    files = begun.bench.models[request.model]
    return prompt_ids(files, begun.bench.profile.prompt_tokens, request.request)


def _free_unused_memory() -> None:
    """After a request ran out of memory: what it left behind goes before the next one comes.

    torch empties its cache by itself before it gives up, but what the failed request still held
    then is unused only now, and other allocators (the driver's, another process) may want it.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _serve(begun: _Start, system: SystemUnderTest, repeat: int, request: Request) -> dict[str, Any]:
    keys = None
    try:
        if request.request == 0:
            system.reset()  # every repeat starts cold
        if system.reads_files_while_serving:
            begun.watch.ensure_unchanged(request.model)
        prompt = begun.prompts[request.model, request.request]
        keys = begun.keys(repeat, request)
        served = system.serve(request.model, prompt, begun.bench.profile.new_tokens)
    except (Exception, SystemExit) as error:  # a library that exits must not end the cell
        keys = keys or begun.keys(repeat, request)
        return failed_row(**keys, error_kind=classify_error(error), error=in_words(error))
    return {
        **keys,
        "queue_ms": 0.0,
        "loaded_bytes": served.loaded_bytes,
        "evicted_bytes": served.evicted_bytes,
        "writeback_bytes": served.writeback_bytes,
        "resident_before_bytes": served.resident_before_bytes,
        "switch_ms": served.switch_ms,
        "ttft_ms": served.ttft_ms,
        "decode_ms": served.decode_ms,
        "total_ms": served.total_ms,
        "n_tokens": len(served.token_ids),
        "token_sha": token_sha(served.token_ids),
        "ok": True,
        "error_kind": "",
        "error": "",
        "resident_bytes": json.dumps(served.resident_bytes),
    }
