"""Run one cell: one system, one trace and one capacity, in this process.

A failed request becomes a row with its cause, and the cell continues. Each row is written to a
journal at once, so a process that dies loses only its current request. `close_dead_cell` turns the
journal of such a cell into rows. `kept_rows` decides about existing rows.

A cell that its user interrupted runs again from its first request, because a cell in two processes
would not have the cold start and the sequence of its trace. Its journal is kept until then.
"""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch

from djinn_lib.errors import DjinnError, TraceError, in_words
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.cells.arrivals import send
from djinn_lib.experiment.cells.kept_rows import DIED, keep, read_journal, whole_frame
from djinn_lib.experiment.cells.running import CellRecord, running_system
from djinn_lib.experiment.execution.by_hand import progress_bar
from djinn_lib.experiment.profile import Cell
from djinn_lib.files import ensure_writable
from djinn_lib.rows import classify_error, clock_warning, failed_row, token_sha
from djinn_lib.systems import system_class
from djinn_lib.systems.base import Served, SystemUnderTest
from djinn_lib.trace import Request, Trace, check_models, read_trace


def run_cell(bench: Bench, cell: Cell, keep_running: bool = False) -> pd.DataFrame:
    """Run a cell, write its rows and manifest, and return the rows.

    With `keep_running`, the next cell of this process uses the same system, which then keeps
    running; see `djinn_lib.experiment.cells.running`.

    Raises:
        TraceError: the trace is broken, empty, or names a model that the profile lacks.
        ConfigError: the run's folder cannot be written to.
        RecordError: the rows break the schema, which is a bug of the system.
        OSError: the disk is full; the rows so far are in the journal, if they could be written.
    """
    trace, files = _read_trace(bench, cell), bench.run.cell(cell.id)
    check_models(trace, bench.models)
    ensure_writable(files.rows.parent)  # before minutes are spent
    begun = CellRecord(bench, cell, trace)
    with begun.memory:
        rows = whole_frame(_rows(begun, keep_running))
    if warning := clock_warning(rows):
        begun.notes.append(warning)
    keep(files, rows, begun.manifest())
    files.journal.unlink(missing_ok=True)
    return rows


def close_dead_cell(bench: Bench, cell: Cell, kind: str, error: str) -> pd.DataFrame:
    """Write rows for a cell whose process died or whose notebook failed; return those on disk then.

    Finished requests are taken from its journal, and all others get failed rows, of the kind and
    the cause that are given. The rows on disk stay if they are complete, or if an earlier execution
    served more requests.

    Raises:
        TraceError: the trace is broken or empty, so the requests are unknown.
        OSError: the rows cannot be written; the journal is kept.
    """
    begun, files = CellRecord(bench, cell, _read_trace(bench, cell)), bench.run.cell(cell.id)
    noted = _noted(begun)
    begun.take_over(list(noted.values()))
    begun.notes.append(f"{DIED}{error}")
    left = [
        failed_row(**begun.keys(repeat, request), error_kind=kind, error=error)
        for repeat, request in _requests(begun)
        if (repeat, request.request) not in noted
    ]
    measured = {row["run_id"] for row in noted.values()}
    rows = keep(files, whole_frame([*noted.values(), *left]), begun.manifest())
    if measured <= set(rows["run_id"]):  # else what it did measure is in the journal alone
        files.journal.unlink(missing_ok=True)
    return rows


def _noted(begun: CellRecord) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the rows of a cell's journal by repeat and request, without unknown requests."""
    asked = {(repeat, r.request): r.model for repeat, r in _requests(begun)}
    noted: dict[tuple[int, int], dict[str, Any]] = {}
    for row in read_journal(begun.bench.run.cell(begun.cell.id).journal):
        key = row["repeat"], row["request"]
        if asked.get(key) == row["model"]:
            noted.setdefault(key, row)
    return noted


def _read_trace(bench: Bench, cell: Cell) -> Trace:
    path = bench.run.trace(cell.trace)
    trace = read_trace(path)
    if not trace.requests:
        raise TraceError(
            f"expected a trace of at least 1 request, got none in {path}: generate the trace again"
        )
    return trace


def _rows(begun: CellRecord, keep_running: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each request, after writing it to the journal."""
    cls, profile = system_class(begun.entry.system), begun.bench.profile
    if reason := cls.unavailable(profile.device):
        yield from _all_failed(begun, "unavailable", reason)
        return
    journal = begun.bench.run.cell(begun.cell.id).journal
    journal.unlink(missing_ok=True)
    with ExitStack() as stack:
        try:
            # Read now, so that a system that needs no files while it serves goes on without them.
            begun.prompts = {(r.model, r.request): begun.prompt(r) for r in begun.requests}
            running = stack.enter_context(running_system(begun, keep_running))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reason = f"could not start: {in_words(error)}"
            yield from _all_failed(begun, classify_error(error), reason)
            return
        serve = _serve_one_by_one if begun.cell.mode == "sequential" else _serve_as_they_arrive
        n_requests = len(begun.requests) * begun.cell.repeats
        with (
            journal.open("w") as lines,
            progress_bar(
                desc=begun.cell.id, unit="req", total=n_requests, mininterval=2
            ) as progress,
        ):
            for row in serve(begun, running.system):
                progress.update()
                running.keep &= row["ok"]
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                yield row
                if row["error_kind"] == "oom":
                    _free_unused_memory()


def _all_failed(begun: CellRecord, kind: str, error: str) -> Iterator[dict[str, Any]]:
    """Yield a failed row for every request of the cell, all with the same reason."""
    for repeat, request in _requests(begun):
        yield failed_row(**begun.keys(repeat, request), error_kind=kind, error=error)


def _requests(begun: CellRecord) -> Iterator[tuple[int, Request]]:
    for repeat in range(begun.cell.repeats):
        for request in begun.requests:
            yield repeat, request


def _free_unused_memory() -> None:
    """Free memory after a request ran out of memory, before the next request.

    torch empties its cache before it raises, but the failed request still used memory then. Other
    allocators, such as the driver or another process, may need that memory.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _serve_one_by_one(begun: CellRecord, system: SystemUnderTest) -> Iterator[dict[str, Any]]:
    """Send each request when the previous one is done; yield a row for each."""
    for repeat, request in _requests(begun):
        begun.note_pace(repeat)
        keys = None
        try:
            if request.request == 0:
                _begin_repeat(begun, system)
            prompt = _checked_prompt(begun, system, request)
            keys = begun.keys(repeat, request)
            served = system.serve(request.model, prompt, begun.bench.profile.new_tokens)
        except (Exception, SystemExit) as error:  # a library that exits must not end the cell
            yield _failed(keys or begun.keys(repeat, request), error)
            continue
        yield _row(keys, served, queue_ms=0.0)


def _begin_repeat(begun: CellRecord, system: SystemUnderTest) -> None:
    """Empty the device; for a warm start, serve each model once without counting it."""
    system.reset()
    if begun.cell.start == "warm":
        for name in begun.bench.models:
            prompt = begun.prompt(Request(0, 0.0, name))
            system.serve(name, prompt, begun.bench.profile.new_tokens)


def _serve_as_they_arrive(begun: CellRecord, system: SystemUnderTest) -> Iterator[dict[str, Any]]:
    """Send each request when it arrives; yield a row for each, in the order of completion."""

    def submit(request: Request) -> Future[Served]:
        prompt = _checked_prompt(begun, system, request)
        return system.submit(worker, request.model, prompt, begun.bench.profile.new_tokens)

    with ThreadPoolExecutor(1, "djinn-system") as worker:
        for repeat in range(begun.cell.repeats):
            try:
                _begin_repeat(begun, system)
            except (Exception, SystemExit) as error:
                yield from (_failed(begun.keys(repeat, r), error) for r in begun.requests)
                continue
            for arrived in send(begun.requests, begun.cell.speed, submit):
                keys = begun.keys(repeat, arrived.request)
                if arrived.served is None:
                    yield _failed(keys, arrived.error or DjinnError("no result"))
                    continue
                queue_ms = max(0.0, arrived.total_s * 1e3 - arrived.served.total_ms)
                keys["start_s"] = max(0.0, keys["start_s"] - arrived.served.total_ms / 1e3)
                yield _row(keys, arrived.served, queue_ms)


def _checked_prompt(begun: CellRecord, system: SystemUnderTest, request: Request) -> list[int]:
    if system.reads_files_while_serving:
        begun.watch.ensure_unchanged(request.model)
    return begun.prompts[request.model, request.request]


def _failed(keys: dict[str, Any], error: BaseException) -> dict[str, Any]:
    return failed_row(**keys, error_kind=classify_error(error), error=in_words(error))


def _row(keys: dict[str, Any], served: Served, queue_ms: float) -> dict[str, Any]:
    return {
        **keys,
        "queue_ms": queue_ms,
        "loaded_bytes": served.loaded_bytes,
        "evicted_bytes": served.evicted_bytes,
        "writeback_bytes": served.writeback_bytes,
        "resident_before_bytes": served.resident_before_bytes,
        "switch_ms": float(served.switch_ms),
        "ttft_ms": float(queue_ms + served.ttft_ms),
        "decode_ms": float(served.decode_ms),
        "total_ms": float(queue_ms + served.total_ms),
        "n_tokens": len(served.token_ids),
        "token_sha": token_sha(served.token_ids),
        "ok": True,
        "error_kind": "",
        "error": "",
        "resident_bytes": json.dumps(served.resident_bytes),
    }
