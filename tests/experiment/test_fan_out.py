"""Jobs on real local clusters: results, failures, a node that dies, and a run of the experiment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from djinn_lib.experiment.begun import Begun
from djinn_lib.experiment.fan_out import Job, Result, ensure_ray, fan_out
from jobs import die, double, leave, make_a_lock, note_and_sleep, refuse, span
from profile_factory import tiny_profile

from djinn_lib.errors import ConfigError, PlatformError
from djinn_lib.experiment import fan_out as fan_out_module
from djinn_lib.experiment import reproduce, tasks
from djinn_lib.experiment.bench import Bench, set_up
from djinn_lib.experiment.cell import run_cell
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.notebooks import Status, read_statuses
from djinn_lib.paths import REPO
from djinn_lib.rows import read_rows

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402  (only where there is Ray)


@pytest.fixture(autouse=True)
def workers_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO / "tests" / "support"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """One node of two CPUs, whatever this machine has."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield cluster
    cluster.shutdown()


class Kept:
    """An `on_done` that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Result]] = []

    def __call__(self, job: Job, result: Result) -> None:
        self.calls.append((job.name, result))

    @property
    def by_name(self) -> dict[str, Result]:
        assert len({name for name, _ in self.calls}) == len(self.calls), "a result came twice"
        return dict(self.calls)


def run(jobs: list[Job], cluster: Cluster | None = None, **options: Any) -> dict[str, Result]:
    kept = Kept()
    fan_out(jobs, kept, address=cluster.address if cluster else None, **options)
    return kept.by_name


def test_a_cluster_of_its_own_is_started_used_and_stopped(capsys):
    results = run([Job(f"double-{i}", double, (i,)) for i in range(5)])
    assert {name: result.value for name, result in results.items()} == {
        f"double-{i}": 2 * i for i in range(5)
    }
    said = capsys.readouterr().out
    assert [line.split(", ")[1] for line in said.splitlines()] == [f"{k} of 5" for k in range(1, 6)]
    assert not ray.is_initialized()


def test_an_exception_is_the_result_of_its_job_alone(shared, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", shared.address)
    jobs = [Job("odd", refuse, (3,)), Job("exit", leave), Job("a", double, (1,))]
    results = run([*jobs, Job("mute", make_a_lock)])
    assert results["odd"].error == "ValueError: expected an even number, got 3"
    assert results["exit"].error == "SystemExit: giving up"
    assert "cannot pickle" in results["mute"].error
    assert results["a"].value == 2
    assert not any(result.lost for result in results.values())
    assert ray_answers(shared)


def ray_answers(cluster: Cluster) -> bool:
    return ensure_ray(cluster.address) == cluster.address


def test_a_worker_that_dies_every_time_is_lost_and_whole_nodes_are_not_shared(shared, tmp_path):
    spans = [Job(f"span-{i}", span, (0.7,), whole_node=True) for i in range(3)]
    results = run([Job("dies", die, (str(tmp_path),)), *spans], shared, max_retries=1)
    assert results["dies"].lost and "WorkerCrashed" in results["dies"].error
    assert len(list(tmp_path.iterdir())) == 2
    in_order = sorted(results[job.name].value for job in spans)
    assert all(one[1] <= next_[0] for one, next_ in pairwise(in_order))


def test_jobs_of_a_lost_node_run_again_and_end_where_none_can_hold_them(shared, tmp_path):
    """Every result comes once; the job that only the lost node could hold is not waited for."""
    doomed = shared.add_node(num_cpus=2, num_gpus=1)
    names = [f"job-{i}" for i in range(4)]
    kept = Kept()

    def kill_once(job: Job, result: Result) -> None:
        kept(job, result)
        if len(kept.calls) == 1:
            wait_for_a_try_on(doomed.node_id, tmp_path)
            shared.remove_node(doomed, allow_graceful=False)

    jobs = [Job(name, note_and_sleep, (str(tmp_path), name, 2.0), whole_node=True)
            for name in names]  # fmt: skip
    only_there = Job("only-there", time.sleep, (300,), num_cpus=0, num_gpus=1)
    fan_out([*jobs, only_there], kill_once, address=shared.address, patience_s=1)
    results = kept.by_name
    lost = results.pop("only-there")
    assert lost.lost and "expected a node with 0 CPU and 1 GPU" in lost.error
    assert sorted(results) == names and not any(result.error for result in results.values())
    tries = [path.name.split(".")[0] for path in tmp_path.iterdir()]
    again = {name for name in names if tries.count(name) > 1}
    assert again, "no job was running on the node when it was killed"
    assert doomed.node_id not in {results[name].value for name in again}


def wait_for_a_try_on(node: str, folder: Path) -> None:
    """Wait until the latest try on a node is fresh, so that the job is killed half-way."""
    deadline_s = time.time() + 20
    while time.time() < deadline_s:
        on_node = [path for path in folder.iterdir() if path.read_text() == node]
        if on_node and time.time() - max(path.stat().st_mtime for path in on_node) < 1.0:
            return
        time.sleep(0.05)
    raise AssertionError("no job started on the second node")


@pytest.mark.parametrize("needs", [{"num_gpus": 9}, {"num_cpus": 99}])
def test_what_no_node_has_is_refused_before_anything_runs(shared, needs, tmp_path):
    jobs = [Job("fits", die, (str(tmp_path),)), Job("greedy", double, (1,), **needs)]
    with pytest.raises(PlatformError, match=r"for 'greedy', got nodes with 2 CPU and 0 GPU"):
        run(jobs, shared)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "head", "head:port", ":6379"])
def test_what_is_no_address_is_refused(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"host:port .* got '" + address):
        ensure_ray()


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    begin_s = time.perf_counter()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1, got no answer"):
        run([Job("one", double, (1,))])
    assert time.perf_counter() - begin_s < 10


def test_an_address_where_something_else_listens_is_refused_soon(monkeypatch):
    monkeypatch.setattr(fan_out_module, "_HEALTH_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError, match="TimeoutExpired"):
            ensure_ray()


def test_no_ray_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(fan_out_module, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="pip install 'ray"):
        fan_out([], Kept())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = set_up(tiny_profile(), tmp_path / "run", tmp_path / "models", lambda step: None)
    bench.write_traces()
    return bench


def test_a_cell_of_which_nothing_came_back_is_failed_rows(bench):
    (cell,) = bench.profile.all_cells()
    inputs = tasks.cell_inputs(bench.run_dir, cell)
    outcome = tasks.failed_outcome(bench.profile, cell, inputs, "kernel_died", "node lost")
    assert not bench.rows_path(cell).exists()
    assert tasks.keep_outcome(outcome, bench.run_dir)
    rows = read_rows(bench.rows_path(cell))
    assert len(rows) == 6 and set(rows["error_kind"]) == {"kernel_died"}
    assert (bench.run_dir / "notebooks" / f"02_run_system.{cell.id}.ipynb").exists()
    assert not tasks.is_settled(bench.run_dir, f"02_run_system.{cell.id}")


def test_a_cell_run_apart_sees_no_ray_and_leaves_no_trace(bench, monkeypatch):
    (cell,) = bench.profile.all_cells()
    task = f"02_run_system.{cell.id}"
    seen: dict[str, Any] = {}

    def execute(_: str, output: Path, parameters: dict[str, str], **__: Any) -> Status:
        seen.update(os.environ, folder=parameters["run_dir"])
        run_cell(Bench.open(bench.profile, Path(parameters["run_dir"])), cell)
        output.parent.mkdir()
        output.write_text(json.dumps(parameters))
        return Status(task, "ok", 1.0)

    monkeypatch.setattr(tasks, "execute", execute)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    driver = tasks.Driver(host="elsewhere", threads="2")
    inputs = tasks.cell_inputs(bench.run_dir, cell)
    outcome = tasks.run_cell_apart(bench.profile, cell, inputs, bench.run_dir, driver)
    assert "RAY_ADDRESS" not in seen and seen["OMP_NUM_THREADS"] == "2"
    assert os.environ["RAY_ADDRESS"] == "head:6379" and os.environ["OMP_NUM_THREADS"] == "1"
    assert not Path(seen["folder"]).exists() and not bench.rows_path(cell).exists()
    tasks.keep_outcome(outcome, bench.run_dir)
    assert read_rows(bench.rows_path(cell))["ok"].all()
    notebook = bench.run_dir / "notebooks" / f"{task}.ipynb"
    assert json.loads(notebook.read_text())["run_dir"] == str(bench.run_dir)
    assert "elsewhere" in read_manifest(bench.manifest_path(cell))["notes"][-1]


def apart(bench: Bench, monkeypatch: pytest.MonkeyPatch, execute: Any) -> tasks.CellOutcome:
    """The outcome of a cell that a worker runs, whose notebook does what `execute` does."""
    (cell,) = bench.profile.all_cells()
    monkeypatch.setattr(tasks, "execute", execute)
    arguments = (tasks.cell_inputs(bench.run_dir, cell), bench.run_dir, tasks.Driver("here", None))
    return tasks.run_cell_apart(bench.profile, cell, *arguments)


def test_a_worker_whose_notebook_fails_after_the_cell_loses_no_row(bench, monkeypatch):
    """No executed notebook either: it could not be kept."""
    (cell,) = bench.profile.all_cells()
    task = f"02_run_system.{cell.id}"

    def execute(_: str, output: Path, parameters: dict[str, str], **__: Any) -> Status:
        run_cell(Bench.open(bench.profile, Path(parameters["run_dir"])), cell)
        return Status(task, "failed", 1.0, "disk_full", "the executed notebook cannot be kept")

    outcome = apart(bench, monkeypatch, execute)
    assert outcome.is_whole and outcome.status.error_kind == "disk_full"
    assert tasks.keep_outcome(outcome, bench.run_dir)
    rows = read_rows(bench.rows_path(cell))
    assert rows["ok"].all() and len(rows) == 6
    before = bench.rows_path(cell).read_bytes()

    inputs = tasks.cell_inputs(bench.run_dir, cell)
    lost = tasks.failed_outcome(bench.profile, cell, inputs, "kernel_died", "node lost")
    tasks.keep_outcome(lost, bench.run_dir)  # a later execution, of which nothing came back
    assert bench.rows_path(cell).read_bytes() == before
    manifest = read_manifest(bench.manifest_path(cell))
    assert manifest["run_id"] == rows["run_id"][0] and "node lost" in manifest["notes"][-1]
    assert not tasks.is_settled(bench.run_dir, task)


def test_a_worker_without_room_for_rows_says_so_and_what_it_measured_is_kept(bench, monkeypatch):
    (cell,) = bench.profile.all_cells()
    task = f"02_run_system.{cell.id}"

    def execute(_: str, output: Path, parameters: dict[str, str], **__: Any) -> Status:
        folder = Path(parameters["run_dir"])
        run_cell(Bench.open(bench.profile, folder), cell)
        rows = read_rows(folder / "requests" / f"{cell.id}.parquet").to_dict("records")
        shutil.rmtree(folder / "requests")
        (folder / "requests").mkdir()
        journal = folder / "requests" / f"{cell.id}.journal.jsonl"
        journal.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        return Status(task, "failed", 1.0, "disk_full", "No space left on device")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_settle", full)
        outcome = apart(bench, patch, execute)
    assert not outcome.is_whole and outcome.status.error_kind == "disk_full"
    whole = reproduce._whole_outcome(
        bench.profile, cell, tasks.cell_inputs(bench.run_dir, cell), Result(outcome)
    )
    tasks.keep_outcome(whole, bench.run_dir)
    rows = read_rows(bench.rows_path(cell))
    assert rows["ok"].tolist() == [True] * 4 + [False] * 2
    assert set(rows.loc[~rows["ok"], "error_kind"]) == {"disk_full"}


def test_a_cell_whose_outcome_cannot_be_kept_stops_no_other(bench, monkeypatch, capsys):
    (cell,) = bench.profile.all_cells()
    kept: list[str] = []

    def refuse(_: Any, outcome: Any) -> None:
        kept.append(outcome)
        raise OSError(errno.ENOSPC, "No space left on device")

    def handed_out(jobs: list[Job], on_done: Any) -> None:
        for job in jobs * 2:
            on_done(job, Result(error="boom"))

    monkeypatch.setattr(reproduce, "_keep", refuse)
    monkeypatch.setattr(reproduce, "fan_out", handed_out)
    monkeypatch.setitem(sys.modules, "dodo", SimpleNamespace(BEGUN=Begun(), inputs_of=lambda _: {}))
    reproduce._fan_out_cells(bench.profile, bench.run_dir, [cell])
    assert len(kept) == 2
    (status,) = read_statuses(bench.run_dir / "status")
    assert (status.state, status.error_kind) == ("failed", "disk_full")
    assert "its rows cannot be kept" in capsys.readouterr().out


def test_a_run_folder_of_any_name_stands_in_the_notebook(bench, monkeypatch, tmp_path):
    (cell,) = bench.profile.all_cells()

    def execute(_: str, output: Path, parameters: dict[str, str], **__: Any) -> Status:
        output.parent.mkdir()
        output.write_text(json.dumps({"text": f"in {parameters['run_dir']}"}))
        return Status(f"02_run_system.{cell.id}", "failed", 1.0, "other", "boom")

    named = bench.run_dir.rename(tmp_path / 'a "{run}" of ü \\ [x]')
    outcome = apart(Bench.open(bench.profile, named), monkeypatch, execute)
    (notebook,) = [text for name, text in outcome.files.items() if name.endswith(".ipynb")]
    assert json.loads(notebook)["text"] == f"in {named}"


def test_bad_input_ends_a_run_on_ray_before_the_set_up(tmp_path, capsys, monkeypatch):
    smoke = ["--profile", "smoke", "--run-dir", str(tmp_path), "--executor", "ray"]
    assert reproduce.main([*smoke, "cell:nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert reproduce.main(smoke) == 2
    said = capsys.readouterr()
    assert "unset RAY_ADDRESS" in said.err and "00_setup" not in said.out


@pytest.mark.slow
def test_a_cell_that_ray_ran_is_complete_and_up_to_date_for_the_local_executor(tmp_path):
    def reproduce_with(executor: str) -> str:
        command = [sys.executable, "-m", "djinn_lib.experiment.reproduce", "--profile", "smoke"]
        command += ["--run-dir", str(tmp_path), "--executor", executor]
        done = subprocess.run(
            [*command, "cell:paper-25-djinn"], cwd=REPO, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "paper-25-djinn: done" in reproduce_with("ray")
    file = tmp_path / "requests" / "paper-25-djinn.parquet"
    rows = read_rows(file)
    assert len(rows) == 60 and rows["ok"].all()
    before = file.stat().st_mtime_ns
    assert "..." not in reproduce_with("local")  # no notebook was executed
    assert file.stat().st_mtime_ns == before
