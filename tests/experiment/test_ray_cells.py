"""Cells on Ray: what a worker does apart, and what becomes of all that it left, or of nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_run import cell_of, copied, prepare

from djinn_lib.errors import ConfigError
from djinn_lib.experiment import locks
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.cells import ray_cells
from djinn_lib.experiment.cells.cell import run_cell
from djinn_lib.experiment.cells.inputs import cell_inputs, is_current
from djinn_lib.experiment.cells.ray_cells import (
    Driver,
    Outcome,
    run_apart,
    run_cells_on_ray,
    take_back,
)
from djinn_lib.experiment.executors import Result
from djinn_lib.experiment.manifest import Status, read_manifest
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.rows import read_rows

Execute = Callable[[RunFolder, Any, Any], Status]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Bench:
    return prepare(tmp_path_factory.mktemp("ray"))


@pytest.fixture
def bench(prepared, tmp_path) -> Bench:
    return copied(prepared, tmp_path / "copy")


@pytest.fixture
def cell(bench):
    return cell_of(bench, "pytorch_pinned")


def measures(run: RunFolder, profile: Any, cell: Any) -> Status:
    """Do what a cell's notebook does, in this process."""
    run_cell(Bench.open(profile, run.path), cell)
    files = run.cell(cell.id)
    files.notebook.parent.mkdir()
    files.notebook.write_text(json.dumps({"run_dir": str(run.path)}))
    return Status(files.task, "ok", 1.0)


def measures_and_fails(run: RunFolder, profile: Any, cell: Any) -> Status:
    """The same, but the executed notebook could not be kept."""
    measures(run, profile, cell)
    run.cell(cell.id).notebook.unlink()
    return Status(run.cell(cell.id).task, "failed", 1.0, "disk_full", "cannot be kept")


def apart(bench: Bench, cell: Any, execute: Execute, monkeypatch: Any, **driver: Any) -> Outcome:
    """The outcome of a cell that a worker runs, whose notebook does what `execute` does."""
    monkeypatch.setattr(ray_cells, "execute_cell", execute)
    inputs = ray_cells._inputs(bench.run, cell)
    here = replace(Driver(bench.run.path, os.environ.get("OMP_NUM_THREADS")), **driver)
    return run_apart(bench.profile, cell, inputs, here)


def back(bench: Bench, cell: Any, result: Result) -> Status:
    begun = cell_inputs(bench.run, bench.profile, cell)
    return take_back(bench.run, bench.profile, cell, result, begun)


def test_a_cell_run_apart_sees_no_ray_and_leaves_no_trace(bench, cell, monkeypatch):
    seen: dict[str, Any] = {}

    def execute(run, profile, cell):
        seen.update(os.environ, folder=run.path)
        return measures(run, profile, cell)

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome = apart(bench, cell, execute, monkeypatch, threads="2")
    assert "RAY_ADDRESS" not in seen and seen["OMP_NUM_THREADS"] == "2"
    assert os.environ["RAY_ADDRESS"] == "head:6379" and os.environ["OMP_NUM_THREADS"] == "1"
    assert not seen["folder"].exists() and not bench.run.cell(cell.id).rows.exists()
    status = back(bench, cell, Result(replace(outcome, host="elsewhere")))
    files = bench.run.cell(cell.id)
    assert status.state == "ok" and read_rows(files.rows)["ok"].all()
    assert json.loads(files.notebook.read_text())["run_dir"] == str(bench.run_dir)
    assert read_manifest(files.manifest)["notes"][-1].startswith("run on elsewhere; the machine")
    assert is_current(bench.run, bench.profile, cell)  # for either executor


def test_a_cell_of_which_nothing_came_back_is_failed_rows(bench, cell):
    status = back(bench, cell, Result(error="node lost", lost=True))
    files = bench.run.cell(cell.id)
    rows = read_rows(files.rows)
    assert len(rows) == 6 and set(rows["error_kind"]) == {"kernel_died"} == {status.error_kind}
    assert files.notebook.exists() and not is_current(bench.run, bench.profile, cell)


def test_a_worker_whose_notebook_fails_after_the_cell_loses_no_row(bench, cell, monkeypatch):
    status = back(bench, cell, Result(apart(bench, cell, measures_and_fails, monkeypatch)))
    files = bench.run.cell(cell.id)
    rows = read_rows(files.rows)
    assert status.error_kind == "disk_full" and len(rows) == 6 and rows["ok"].all()
    before = files.rows.read_bytes()
    later = back(bench, cell, Result(error="node lost", lost=True))
    assert files.rows.read_bytes() == before  # of a later execution nothing came back
    assert "6 of 6 requests had been served" in later.error
    manifest = read_manifest(files.manifest)
    assert manifest["run_id"] == rows["run_id"][0]
    assert manifest["execution"]["error"] == later.error


def test_a_notebook_that_went_well_without_rows_is_a_failure(bench, cell, monkeypatch):
    outcome = apart(bench, cell, measures, monkeypatch)
    assert back(bench, cell, Result(outcome)).state == "ok"
    status = back(bench, cell, Result(replace(outcome, files={})))
    assert status.state == "failed" and "no rows came back" in status.error


def test_a_cell_whose_outcome_cannot_be_kept_stops_no_other(bench, cell, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def handed_out(jobs: list[Any]) -> Any:
        yield from ((job, Result(error="boom")) for job in jobs)

    monkeypatch.setattr(ray_cells, "_put", full)
    monkeypatch.setattr(ray_cells, "fan_out", handed_out)
    cells = [cell, cell_of(bench, "djinn")]
    statuses = list(run_cells_on_ray(bench.run, bench.profile, cells))
    assert [(s.state, s.error_kind) for s in statuses] == [("failed", "disk_full")] * 2
    assert capsys.readouterr().out.count("its rows cannot be kept") == 2


def test_a_run_folder_of_any_name_stands_in_the_notebook(bench, cell, monkeypatch, tmp_path):
    named = bench.run_dir.rename(tmp_path / 'a "{run}" of ü \\ [x]')
    outcome = apart(Bench.open(bench.profile, named), cell, measures, monkeypatch)
    assert json.loads(outcome.files["notebook"])["run_dir"] == str(named)


def test_a_cell_that_ray_brings_here_asks_for_the_gpu_too(bench, cell, tmp_path, monkeypatch):
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    profile = bench.profile.model_copy(update={"device": "cuda"})
    driver = Driver(bench.run_dir, None)
    with locks.gpu_lock(tmp_path), pytest.raises(ConfigError, match=r"the GPU .* is in use"):
        run_apart(profile, cell, {}, driver)
