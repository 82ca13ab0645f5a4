"""Cells of a run: full disks, kernels that die, notebooks that fail. Nothing measured is lost."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tiny_run import cell_of, copied, prepare

from djinn_lib import files, nvml
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.cells import cell_runs, kept_rows
from djinn_lib.experiment.cells.cell import close_dead_cell, run_cell
from djinn_lib.experiment.cells.cell_runs import run_cell_notebook, run_cells, stale_cells
from djinn_lib.experiment.cells.inputs import is_current
from djinn_lib.experiment.execution import notebooks
from djinn_lib.experiment.manifest import Status, read_execution, read_manifest
from djinn_lib.experiment.run_folder import CellFiles
from djinn_lib.rows import read_rows
from djinn_lib.systems.pytorch import PyTorchPinned


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Bench:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def bench(prepared, tmp_path) -> Bench:
    return copied(prepared, tmp_path / "copy")


def measured(bench: Bench, parameters: dict[str, str], output: Path) -> None:
    """Do what 02_run_system does, in this process."""
    output.write_text("{}")
    names = [parameters[name] for name in ("trace", "capacity_label", "system")]
    run_cell(bench, bench.profile.cell(*names))


@pytest.fixture
def run(bench, monkeypatch) -> Callable[..., Status]:
    """Runs the cell of a system as a run does, without a kernel.

    `then` is what the notebook raises after its cell was measured, `instead` what it raises before.
    """

    def run_here(
        system: str, then: Exception | None = None, instead: Exception | None = None
    ) -> Status:
        def execute(_source, output, parameters, _manager):
            if instead:
                raise instead
            try:
                measured(bench, parameters, output)
            except Exception as error:  # as it arrives from a kernel
                kind = type(error).__name__
                raise PapermillExecutionError(1, 1, "", kind, str(error), []) from error
            if then:
                raise then

        with monkeypatch.context() as patch:
            patch.setattr(notebooks, "_papermill", execute)
            return run_cell_notebook(bench.run, bench.profile, cell_of(bench, system), "here")

    return run_here


def files_of(bench: Bench, system: str) -> CellFiles:
    return bench.run.cell(cell_of(bench, system).id)


def rows_of(bench: Bench, system: str) -> pd.DataFrame:
    return read_rows(files_of(bench, system).rows)


def noted(bench: Bench, system: str) -> Status | None:
    return read_execution(files_of(bench, system).manifest)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def n_rows(journal: Path) -> int:
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


DIED = DeadKernelError("Kernel died")

# -- the manifest is the only state ----------------------------------------------------------


def test_how_an_execution_ended_is_in_the_manifest_and_nowhere_else(bench, run, capsys):
    before = set(contents(bench.run_dir))
    status = run("djinn")
    assert status.state == "ok" and status.seconds > 0 and noted(bench, "djinn") == status
    cell, other = cell_of(bench, "djinn"), cell_of(bench, "pytorch_pinned")
    assert is_current(bench.run, bench.profile, cell)
    assert stale_cells(bench.run, bench.profile, [cell, other]) == [other]
    own = files_of(bench, "djinn")
    new = {bench.run_dir / name for name in set(contents(bench.run_dir)) - before}
    assert new == {own.rows, own.manifest, own.notebook}
    assert f"{cell.id} (here) ..." in capsys.readouterr().out


def test_a_system_that_cannot_run_here_is_settled(bench, run):
    status = run("vllm_sleep")
    assert (status.state, status.error_kind) == ("unavailable", "unavailable")
    assert is_current(bench.run, bench.profile, cell_of(bench, "vllm_sleep"))


def test_a_failed_cell_runs_again_after_those_that_had_no_turn(bench, run):
    status = run("djinn", instead=DIED)
    assert (status.state, status.error_kind) == ("failed", "kernel_died")
    assert set(rows_of(bench, "djinn")["error_kind"]) == {"kernel_died"}
    cells = [cell_of(bench, system) for system in ("djinn", "pytorch_pinned")]
    assert stale_cells(bench.run, bench.profile, cells) == cells[::-1]


def test_a_cell_that_was_cut_off_or_run_by_hand_is_not_up_to_date(bench):
    cell = cell_of(bench, "djinn")
    run_cell(bench, cell)  # its manifest says nothing of an execution
    files_of(bench, "djinn").notebook.parent.mkdir(exist_ok=True)
    files_of(bench, "djinn").notebook.write_text("{}")
    assert not is_current(bench.run, bench.profile, cell)


def test_what_changed_while_a_cell_ran_is_said_and_has_it_run_again(
    bench, run, monkeypatch, capsys
):
    ring = bench.run_dir / "ring.py"
    monkeypatch.setattr(cell_runs, "cell_inputs", lambda *_: {"code": str(ring.exists())})
    monkeypatch.setattr(PyTorchPinned, "close", lambda _: ring.touch())
    status = run("pytorch_pinned")
    assert status.begun_with == {"code": "False"}
    assert "code changed while it ran: the next run does it again" in capsys.readouterr().out
    assert not is_current(bench.run, bench.profile, cell_of(bench, "pytorch_pinned"))


def test_the_gpu_s_memory_is_waited_for_between_cells(bench, monkeypatch, capsys):
    monkeypatch.setattr(cell_runs, "run_cell_notebook", lambda *a: Status(a[2].id, "ok", 1.0))
    monkeypatch.setattr(nvml, "used_bytes", lambda: 7)
    monkeypatch.setattr(nvml, "await_memory", lambda base: f"{base} bytes too many")
    profile = bench.profile.model_copy(update={"device": "cuda"})
    cells = [cell_of(bench, system) for system in ("djinn", "serverless")]
    assert [s.task for s in run_cells(bench.run, profile, cells)] == [c.id for c in cells]
    assert capsys.readouterr().out.count("warning: 7 bytes too many") == 2


def test_memory_of_the_gpu_is_waited_for(monkeypatch):
    used = iter([9 << 30, 5 << 30, 1 << 30])
    monkeypatch.setattr(nvml, "used_bytes", lambda: next(used))
    assert nvml.await_memory(1 << 30) == ""
    assert nvml.await_memory(None) == ""  # without a driver there is nothing to wait for
    monkeypatch.setattr(nvml, "used_bytes", lambda: 9 << 30)
    monkeypatch.setattr(nvml, "gpu_processes", lambda with_this_one: ["12 python 8589934592"])
    said = nvml.await_memory(1 << 30, patience_s=0)
    assert "as before, got 9,663,676,416" in said and "12 python" in said


# -- disks -----------------------------------------------------------------------------------


def test_rows_that_find_no_room_are_kept_once_there_is_some(bench, run, monkeypatch):
    real, calls = kept_rows.write_rows, []

    def full_once(*arguments):
        calls.append(arguments)
        return full() if len(calls) == 1 else real(*arguments)

    monkeypatch.setattr(kept_rows, "write_rows", full_once)
    status = run("pytorch_pinned")
    assert rows_of(bench, "pytorch_pinned")["ok"].all()
    assert (status.state, status.error_kind) == ("failed", "disk_full")  # so that it runs again
    assert noted(bench, "pytorch_pinned") == status


def test_a_journal_that_finds_no_room(bench, run, monkeypatch):
    """The kernel's own refusal: what is written to /dev/full never fits."""
    real = Path.open

    def open_full(path, *arguments, **options):
        if path.name.endswith(".journal.jsonl") and arguments[:1] == ("w",):
            path = Path("/dev/full")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    assert run("djinn").error_kind == "disk_full"
    assert set(rows_of(bench, "djinn")["error_kind"]) == {"disk_full"}


def test_a_disk_that_stays_full_loses_no_other_result(bench, run, monkeypatch, capsys):
    run("djinn")
    before = contents(bench.run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        status = run("pytorch_pinned")
    assert (status.state, status.error_kind) == ("failed", "disk_full")
    assert "its rows cannot be kept" in capsys.readouterr().out
    after = contents(bench.run_dir)
    assert {name: after[name] for name in before} == before
    assert not [n for n in after if "partial" in n and "ipynb" not in n]
    assert run("pytorch_pinned").state == "ok"  # with room again, as if nothing had been
    assert rows_of(bench, "pytorch_pinned")["ok"].all()


def test_an_executed_notebook_that_cannot_be_kept(bench, run):
    status = run("djinn", instead=OSError(errno.EROFS, "Read-only file system"))
    assert set(rows_of(bench, "djinn")["error_kind"]) == {"other"} == {status.error_kind}
    assert "Read-only file system" in noted(bench, "djinn").error


# -- rows that were measured before something failed -------------------------------------------


def test_a_notebook_that_fails_after_its_cell_was_measured_loses_no_row(bench, run):
    """6 of 6 served once became 0 of 6."""
    failure = PapermillExecutionError(9, 9, "", "OutOfMemoryError", "no room", [])
    status = run("pytorch_pinned", then=failure)
    rows, cell = rows_of(bench, "pytorch_pinned"), files_of(bench, "pytorch_pinned")
    assert rows["ok"].all() and set(rows["run_id"]) == {read_manifest(cell.manifest)["run_id"]}
    assert (status.state, status.error_kind) == ("failed", "oom")
    assert "6 of 6 requests had been served, and their rows are kept" in status.error
    assert noted(bench, "pytorch_pinned") == status
    assert cell.notebook.exists() and not cell.journal.exists()


def test_a_system_that_fails_in_closing_loses_no_row(bench, run, monkeypatch):
    def audit(_):
        raise AssertionError("frame 3 is mapped twice")

    monkeypatch.setattr(PyTorchPinned, "close", audit)
    status = run("pytorch_pinned")
    assert rows_of(bench, "pytorch_pinned")["ok"].all()
    assert status.state == "failed" and "frame 3 is mapped twice" in status.error


def test_an_execution_that_dies_leaves_an_earlier_one_its_rows(bench, run):
    assert run("pytorch_pinned").state == "ok"
    rows = files_of(bench, "pytorch_pinned").rows
    before = rows.read_bytes()
    assert run("pytorch_pinned", instead=DIED).error_kind == "kernel_died"
    assert rows.read_bytes() == before
    assert noted(bench, "pytorch_pinned").error_kind == "kernel_died"
    assert run("pytorch_pinned").state == "ok"  # is measured, and takes their place
    assert rows.read_bytes() != before and noted(bench, "pytorch_pinned").error == ""


def test_an_execution_that_dies_half_way_does_not_replace_a_whole_one(bench, run, monkeypatch):
    assert run("pytorch_pinned").state == "ok"
    cell, own = cell_of(bench, "pytorch_pinned"), files_of(bench, "pytorch_pinned")
    before = own.rows.read_bytes()
    real, calls = PyTorchPinned.serve, []

    def serve(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2 + 4:
            raise KeyboardInterrupt  # as a kill: no row of it
        return real(self, *arguments)

    def die(*_):
        try:
            run_cell(bench, cell)
        except KeyboardInterrupt:
            raise DIED from None

    monkeypatch.setattr(PyTorchPinned, "serve", serve)
    monkeypatch.setattr(notebooks, "_papermill", die)
    run_cell_notebook(bench.run, bench.profile, cell, "here")
    assert own.rows.read_bytes() == before
    assert n_rows(own.journal) == 3  # what it did measure is there too
    own.rows.unlink()
    close_dead_cell(bench, cell, "kernel_died", "killed")
    rows, manifest = read_rows(own.rows), read_manifest(own.manifest)
    assert rows["ok"].tolist() == [True] * 3 + [False] * 3
    assert set(rows["run_id"]) == {manifest["run_id"]}
    assert manifest["wall_s"] > rows["start_s"][2] > manifest["setup_s"] > 0
    assert not own.journal.exists()


def test_rows_of_an_interrupted_execution_are_not_those_of_the_next(bench, run):
    """Its kernel does not even start: the journal that is there was another's."""
    own = files_of(bench, "djinn")
    row = run_cell(bench, cell_of(bench, "djinn")).iloc[0].to_dict()
    own.rows.unlink()
    own.journal.write_text(json.dumps(row, default=str) + "\n")
    run("djinn", instead=RuntimeError("Kernel didn't respond in 180 seconds"))
    assert not rows_of(bench, "djinn")["ok"].any()
    assert n_rows(own.earlier / own.journal.name) == 1
