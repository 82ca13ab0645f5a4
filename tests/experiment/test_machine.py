"""Facts of the machine: plain data, rates that can be, the state of a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from djinn_lib import provenance
from djinn_lib.experiment.setup import machine
from djinn_lib.experiment.setup.machine import (
    describe_machine,
    measure_rates,
    other_gpu_processes,
    stolen_share,
    versions,
)
from djinn_lib.provenance import git_state


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return describe_machine("cpu")


def test_the_facts_of_a_cpu(facts):
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["device"] == "cpu" and facts["device_name"] == facts["cpu"] != ""
    assert facts["cores"] >= 1 and facts["host_bytes"] == facts["device_bytes"] > 1 << 28
    assert facts["system"].startswith("Linux") and facts["gpus_of_host"] >= 0
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert 1e8 < facts["link_rate_bytes_per_s"] < 1e12
    assert 0.01 < facts["eager_operator_us"] < 1000
    assert facts["hbm_rate_bytes_per_s"] is None and facts["d2h_rate_bytes_per_s"] is None


def test_a_rate_is_the_bytes_of_a_copy_by_its_median_time(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25, 30.0, 32.0])  # warm-up, then 0.5, 0.25, 2 s
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "_COPY_BYTES", 1 << 10)
    rates = measure_rates("cpu", repeats=3)
    assert rates["link_rate_bytes_per_s"] == (1 << 10) / 0.5


def test_the_share_that_others_took_is_that_of_the_time_since(monkeypatch):
    times = namedtuple("times", "user system idle steal guest")
    counts = iter([times(10, 5, 100, 1, 4), times(40, 15, 140, 21, 30)])
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: next(counts))
    before = psutil.cpu_times()
    assert stolen_share(before) == 20 / (30 + 10 + 40 + 20)  # a guest's time is the user's already


def test_versions_are_those_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found.keys() - {"cuda", "driver"} == {"python", "torch"}
    assert found["torch"] == metadata.version("torch")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_knows_its_commit_and_whether_it_differs(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert len(commit) == 40 and git_state(tmp_path) == (commit, False)
    (tmp_path / "untracked").write_text("a run's own results")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == (commit, True)


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    assert git_state(tmp_path) == ("unknown", True)
    assert git_state(tmp_path / "no-such-folder") == ("unknown", True)
    git(tmp_path, "init")  # and no commit yet
    assert git_state(tmp_path) == ("unknown", True)
    monkeypatch.setenv("PATH", "")  # and no git at all
    assert git_state(tmp_path) == ("unknown", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nobody_else_is_on_it():
    assert other_gpu_processes() == []


class NVMLError(Exception):
    """What NVIDIA's management library raises."""


class Driver:
    """That library, with these processes on the first GPU."""

    NVMLError = NVMLError

    def __init__(self, *pids: int) -> None:
        self.pids, self.n_open = pids, 0

    def nvmlInit(self) -> None:
        self.n_open += 1

    def nvmlShutdown(self) -> None:
        self.n_open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, _: int) -> list[SimpleNamespace]:
        if not self.pids:
            raise NVMLError("not supported")
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=5 if pid == 1 else None) for pid in self.pids
        ]


def test_other_processes_on_the_gpu_are_named(monkeypatch):
    gone = 2**22 + 1  # beyond the greatest process number that Linux gives
    driver = Driver(os.getpid(), 1, gone)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    name = psutil.Process(1).name()
    assert other_gpu_processes() == [f"1 {name} 5", f"{gone} ? 0"] and driver.n_open == 0


def test_a_driver_that_does_not_say_is_no_failure(monkeypatch):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert other_gpu_processes() == [] and driver.n_open == 0
