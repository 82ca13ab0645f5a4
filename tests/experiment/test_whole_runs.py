"""Whole runs for real: a small profile through the command, stopped and killed in every way."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import yaml

from djinn_lib.experiment.locks import run_locks
from djinn_lib.experiment.manifest import read_execution, read_statuses
from djinn_lib.experiment.profile import load_profile
from djinn_lib.experiment.run_folder import CellFiles, RunFolder
from djinn_lib.paths import REPO
from djinn_lib.rows import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FIRST, SECOND = "paper-25-djinn", "paper-25-pytorch_lru"
NAMES = [f"cell:{FIRST}", f"cell:{SECOND}"]
N_REQUESTS = 30  # of a cell


CELLS = [
    {"traces": ["paper"], "capacities": ["25"],
     "systems": ["djinn", "pytorch_pinned", "pytorch_lru", "vllm_sleep"]},
    {"traces": ["paper"], "capacities": ["40"], "systems": ["djinn", "pytorch_pinned"]},
    {"traces": ["paper"], "capacities": ["25"], "systems": ["djinn"], "mode": "concurrent",
     "speed": math.inf},
]  # fmt: skip


FOLDER = TemporaryDirectory(prefix="djinn-profile-")  # removed at the end of the process


@cache
def profile() -> str:
    """The profile smoke with half of its cells, as a file."""
    smoke = yaml.safe_load((REPO / "params" / "smoke.yml").read_text())
    path = Path(FOLDER.name) / "few.yml"
    path.write_text(yaml.safe_dump({**smoke, "cells": CELLS}))
    return str(path)


def command(run: RunFolder, *names: str) -> list[str]:
    python = [sys.executable, "-m", "djinn_lib.cli", "reproduce"]
    return [*python, "--profile", profile(), "--run-dir", str(run.path), *names]


def reproduce(run: RunFolder, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run, *names), cwd=REPO, capture_output=True, text=True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> tuple[RunFolder, subprocess.CompletedProcess[str]]:
    """The profile, run once for all tests, in a folder whose name papermill would fill."""
    run = RunFolder(tmp_path_factory.mktemp("whole") / "{profile} {0} [x] %s")
    return run, reproduce(run)


@pytest.fixture
def run(whole, tmp_path) -> RunFolder:
    """A copy of that run, in which two cells have yet to be run."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(whole[0].path, run.path)
    for cell in (run.cell(FIRST), run.cell(SECOND)):
        cell.rows.unlink(), cell.manifest.unlink()
    return run


def started(run: RunFolder) -> subprocess.Popen[str]:
    """The command in a group of its own, as a terminal has it, with the two cells to run."""
    return subprocess.Popen(
        command(run, *NAMES), cwd=REPO, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # Tests that a shell runs in the background ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def n_rows(cell: CellFiles) -> int:
    return len(cell.journal.read_text().splitlines()) if cell.journal.exists() else 0


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + 120
    while not what():
        assert process.poll() is None and time.monotonic() < until_s
        time.sleep(0.02)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_every_step_goes_well_and_a_second_run_does_nothing(whole):
    run, done = whole
    assert done.returncode == 0, done.stdout + done.stderr
    states = {s.task: s.state for s in read_statuses(run.path)}
    cells = load_profile(profile()).all_cells()
    assert {run.cell(cell.id).task for cell in cells} < set(states)
    assert states.pop("02_run_system.paper-25-vllm_sleep") == "unavailable"
    assert set(states.values()) == {"ok"} and run.page.exists()
    drawn = {path.stem for path in run.figures.glob("*.pdf")}
    assert {"latency_cdf", "latency_breakdown", "residency_over_time", "bytes_loaded"} <= drawn
    assert {"sensitivity", "simulator_validation"} <= drawn
    assert all(claim["verdict"] for claim in json.loads(run.claims.read_text()))
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and p != run.lock}
    again = reproduce(run)
    assert again.returncode == 0 and "..." not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name]


def test_a_run_that_is_killed_goes_on_with_the_cell_that_it_was_in(run):
    first, second = run.cell(FIRST), run.cell(SECOND)
    process = started(run)
    wait_for(lambda: n_rows(second) >= 3, process)
    left = descendants(process)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(left, timeout=20)[1] == []  # none goes on measuring
    assert read_execution(first.manifest) and not second.rows.exists()
    before = first.rows.stat().st_mtime_ns
    done = reproduce(run, *NAMES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert first.rows.stat().st_mtime_ns == before and read_rows(second.rows)["ok"].all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_who_stops_a_run_ends_all_its_processes_and_keeps_the_journal(run, number):
    """SIGINT goes to the whole group, as from a terminal, SIGTERM to the process alone."""
    first = run.cell(FIRST)
    process = started(run)
    wait_for(lambda: n_rows(first) >= 3, process)
    left = descendants(process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command continues" in said and "Traceback" not in said
    assert psutil.wait_procs(left, timeout=20)[1] == []
    assert n_rows(first) >= 3 and not first.rows.exists()  # half a cell is not a whole one
    with run_locks(run.path, "cpu"):
        pass  # free for the next run
    done = reproduce(run, NAMES[0])
    assert done.returncode == 0 and read_rows(first.rows)["ok"].all()
    assert not first.journal.exists() and n_rows_aside(first) >= 3


def test_a_cell_that_ray_ran_is_complete_and_up_to_date_for_the_local_executor(run):
    pytest.importorskip("ray")
    cell = run.cell(FIRST)
    done = reproduce(run, "--executor", "ray", NAMES[0])
    assert done.returncode == 0 and f"{FIRST}: 1 of 1 back" in done.stdout, done.stderr
    assert len(read_rows(cell.rows)) == N_REQUESTS and read_rows(cell.rows)["ok"].all()
    before = cell.rows.stat().st_mtime_ns
    assert "..." not in reproduce(run, NAMES[0]).stdout  # no notebook was executed
    assert cell.rows.stat().st_mtime_ns == before


def n_rows_aside(cell: CellFiles) -> int:
    return len((cell.earlier / cell.journal.name).read_text().splitlines())


def test_a_kernel_that_is_killed_costs_the_requests_that_were_left(run):
    first, second = run.cell(FIRST), run.cell(SECOND)
    process = started(run)
    wait_for(lambda: n_rows(first) >= 3, process)
    kernel = next(p for p in descendants(process) if os.getsid(p.pid) == p.pid)
    kernel.kill()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and f"{first.task}: failed" in said
    rows = read_rows(first.rows)
    n_ok = int(rows["ok"].sum())
    assert 3 <= n_ok < len(rows) == N_REQUESTS
    assert rows["ok"].tolist() == [True] * n_ok + [False] * (N_REQUESTS - n_ok)
    assert set(rows.loc[~rows["ok"], "error_kind"]) == {"kernel_died"}
    assert read_rows(second.rows)["ok"].all()  # the other cell went on
