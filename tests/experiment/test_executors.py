"""Jobs on Ray: results come once, exceptions are results, lost workers and nodes are made good."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jobs import die, double, leave, make_a_lock, note_and_sleep, refuse, span

from djinn_lib.errors import ConfigError, PlatformError
from djinn_lib.experiment import executors
from djinn_lib.experiment.executors import Job, Result, ensure_ray, fan_out
from djinn_lib.paths import REPO

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


def run(jobs: list[Job], cluster: Cluster | None = None, **options: Any) -> dict[str, Result]:
    results = list(fan_out(jobs, address=cluster.address if cluster else None, **options))
    by_name = {job.name: result for job, result in results}
    assert len(by_name) == len(results), "a result came twice"
    return by_name


@pytest.mark.slow
def test_a_cluster_of_its_own_is_started_used_and_stopped(tmp_path, monkeypatch):
    """Also where the folder for temporary files is too long for sockets."""
    folder = tmp_path / "scratch" / "users" / ("some.user.name-" * 6)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    results = run([Job(f"double-{i}", double, (i,)) for i in range(5)])
    assert {name: result.value for name, result in results.items()} == {
        f"double-{i}": 2 * i for i in range(5)
    }
    assert not ray.is_initialized()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_worker_that_dies_every_time_is_lost_and_whole_nodes_are_not_shared(shared, tmp_path):
    spans = [Job(f"span-{i}", span, (0.7,), whole_node=True) for i in range(3)]
    results = run([Job("dies", die, (str(tmp_path),)), *spans], shared, max_retries=1)
    assert results["dies"].lost and "WorkerCrashed" in results["dies"].error
    assert len(list(tmp_path.iterdir())) == 2
    in_order = sorted(results[job.name].value for job in spans)
    assert all(one[1] <= next_[0] for one, next_ in pairwise(in_order))


@pytest.mark.slow
def test_jobs_of_a_lost_node_run_again_and_end_where_none_can_hold_them(shared, tmp_path):
    """Every result comes once; the job that only the lost node could hold is not waited for."""
    doomed = shared.add_node(num_cpus=2, num_gpus=1)
    names = [f"job-{i}" for i in range(4)]

    jobs = [
        Job(name, note_and_sleep, (str(tmp_path), name, 2.0), whole_node=True) for name in names
    ]
    only_there = Job("only-there", time.sleep, (300,), num_cpus=0, num_gpus=1)
    results: dict[str, Result] = {}
    for job, result in fan_out([*jobs, only_there], address=shared.address, patience_s=1):
        assert job.name not in results
        results[job.name] = result
        if len(results) == 1:
            wait_for_a_try_on(doomed.node_id, tmp_path)
            shared.remove_node(doomed, allow_graceful=False)
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


@pytest.mark.slow
def test_what_no_node_has_is_refused_before_anything_runs(shared, tmp_path):
    jobs = [Job("fits", die, (str(tmp_path),)), Job("greedy", double, (1,), num_gpus=9)]
    with pytest.raises(PlatformError, match=r"for 'greedy', got nodes with 2 CPU and 0 GPU"):
        run(jobs, shared)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "head", "head:port", ":6379"])
def test_what_is_no_address_is_refused(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"host:port .* got '" + address):
        ensure_ray()


def test_no_ray_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="pip install 'ray"):
        list(fan_out([]))
