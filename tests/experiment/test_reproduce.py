"""A run in parts: which cells are handed to doit, in what order, and with what status it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from djinn_lib.experiment.schedule import Limit

from djinn_lib import nvml
from djinn_lib.experiment import reproduce
from djinn_lib.experiment.notebooks import Status, read_statuses, write_status
from djinn_lib.experiment.profile import load_profile
from djinn_lib.experiment.reproduce import INCOMPLETE, main
from djinn_lib.paths import REPO

CELLS = load_profile("smoke").all_cells()


class Doit:
    """Stands for doit: remembers what it is told to run; cells in `takes` take some seconds."""

    def __init__(self, clock: dict[str, float], takes: dict[str, float]) -> None:
        self.clock, self.takes, self.told = clock, takes, list[str]()

    def __call__(self, arguments: list[str]) -> int:
        self.told.append(" ".join(arguments))
        self.clock["now_s"] += self.takes.get(arguments[-1] if arguments else "", 0.0)
        return 0


@pytest.fixture
def doit(monkeypatch) -> Callable[..., Doit]:
    def make(takes: dict[str, float]) -> Doit:
        clock = {"now_s": 0.0}
        made = Doit(clock, takes)

        def limit(seconds: float | None) -> object:
            return Limit(seconds, lambda: clock["now_s"])

        monkeypatch.setattr(reproduce, "Limit", limit)
        monkeypatch.setattr(reproduce, "_doit", made)
        monkeypatch.setattr(reproduce, "_stale_cells", lambda tasks: CELLS[:3])
        return made

    return make


def run(tmp_path: Path, *arguments: str) -> int:
    return main(["--profile", "smoke", "--run-dir", str(tmp_path), *arguments])


def test_cells_are_handed_to_doit_one_by_one_and_then_the_rest(doit, tmp_path):
    told = doit({})
    assert run(tmp_path) == 0
    cells = [f"--single cell:{cell.id}" for cell in CELLS[:3]]
    assert told.told == ["setup trace", *cells, ""]


def test_cells_that_are_named_run_in_the_order_of_their_names(doit, tmp_path):
    told = doit({})
    first, second, third = (f"cell:{cell.id}" for cell in CELLS[:3])
    assert run(tmp_path, third, first) == 0
    cells = [f"--single {cell}" for cell in (third, first, second)]
    assert told.told == ["setup trace", *cells, f"{third} {first}"]


def test_what_does_not_fit_is_left_over_and_the_rest_is_not_begun(doit, tmp_path, capsys):
    told = doit({f"cell:{CELLS[0].id}": 50.0, f"cell:{CELLS[1].id}": 60.0})
    assert run(tmp_path, "--time-limit", "100") == INCOMPLETE
    assert told.told[-1] == f"--single cell:{CELLS[1].id}"
    assert f"cell:{CELLS[2].id}" in capsys.readouterr().out


def test_reading_needs_time_too(doit, tmp_path, capsys):
    told = doit({f"cell:{cell.id}": 15.0 for cell in CELLS[:3]})
    assert run(tmp_path, "--time-limit", "100") == INCOMPLETE
    assert told.told[-1].startswith("--single") and "only reads rows" in capsys.readouterr().out
    assert run(tmp_path, "--time-limit", "1000") == 0


def test_cells_that_failed_before_come_last(doit, tmp_path):
    told = doit({})
    task = f"02_run_system.{CELLS[0].id}"
    write_status(Status(task, "failed", 1.0, "oom", "no memory"), tmp_path / "status")
    assert run(tmp_path) == 1  # what failed is still said
    assert told.told[1:4] == [f"--single cell:{CELLS[i].id}" for i in (1, 2, 0)]


def test_a_cell_that_was_tried_is_not_tried_again_by_the_rest(doit, tmp_path):
    import dodo

    doit({})
    dodo.TRIED.clear()
    run(tmp_path)
    assert {cell.id for cell in CELLS[:3]} <= dodo.TRIED
    dodo.TRIED.clear()


def test_being_told_to_stop_is_incomplete_and_no_error(doit, tmp_path, monkeypatch, capsys):
    doit({})
    monkeypatch.setattr(reproduce, "_doit", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "arguments", [["--time-limit", "0"], ["--time-limit", "x"],
                  ["--time-limit", "9", "--executor", "ray"]]
)  # fmt: skip
def test_a_limit_that_cannot_be_is_refused(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, *arguments)
    assert refused.value.code == 2 and "--time-limit" in capsys.readouterr().err


def test_memory_of_the_gpu_is_waited_for(monkeypatch):
    used = iter([9 << 30, 5 << 30, 1 << 30])
    monkeypatch.setattr(nvml, "used_bytes", lambda: next(used))
    assert nvml.await_memory(1 << 30) == ""
    assert nvml.await_memory(None) == ""  # without a driver there is nothing to wait for
    monkeypatch.setattr(nvml, "used_bytes", lambda: 9 << 30)
    monkeypatch.setattr(nvml, "gpu_processes", lambda with_this_one: ["12 python 8589934592"])
    said = nvml.await_memory(1 << 30, patience_s=0)
    assert "as before, got 9,663,676,416" in said and "12 python" in said


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_its_cells(tmp_path):
    """For real: killed in its second cell, the run goes on with that one and keeps the first."""
    command = [sys.executable, "-m", "djinn_lib.experiment.reproduce", "--profile", "smoke",
               "--run-dir", str(tmp_path)]  # fmt: skip
    cells = [f"cell:{cell.id}" for cell in CELLS[:2]]
    first, second = (tmp_path / "requests" / f"{cell.id}.parquet" for cell in CELLS[:2])
    process = subprocess.Popen([*command, *cells], cwd=REPO, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 120
    while not (tmp_path / "status" / f"02_run_system.{CELLS[0].id}.json").exists():
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.2)
    time.sleep(2.0)
    process.kill()
    process.wait()
    assert first.exists() and not second.exists()
    before = first.stat().st_mtime_ns
    done = subprocess.run([*command, *cells], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert first.stat().st_mtime_ns == before and second.exists()
    assert {status.state for status in read_statuses(tmp_path / "status")} == {"ok"}


@pytest.mark.slow
def test_a_file_edited_while_a_cell_runs_has_it_run_again(tmp_path):
    """For real, in a checkout of its own: the rows belong to the ring as it was at the start."""
    repo = tmp_path / "checkout"
    of_runs = shutil.ignore_patterns(".*", "runs", "models", "__pycache__")
    shutil.copytree(REPO, repo, ignore=of_runs)
    command = [sys.executable, "-m", "djinn_lib.experiment.reproduce", "--profile", "smoke"]
    cell, environment = CELLS[0], {**os.environ, "PYTHONPATH": str(repo)}
    rows = repo / "data" / "runs" / "smoke" / "requests" / f"{cell.id}.parquet"
    ring = repo / "djinn_lib" / "engine" / "memory" / "ring.py"

    def run() -> subprocess.Popen[str]:
        return subprocess.Popen([*command, f"cell:{cell.id}"], cwd=repo, env=environment,
                                stdout=subprocess.PIPE, text=True)  # fmt: skip

    first = run()
    while not rows.with_name(f"{cell.id}.journal.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.1)
    ring.write_text(ring.read_text() + "\n# another ring\n")
    said, _ = first.communicate()
    assert first.returncode == 0, said
    assert f"cell:{cell.id}: ring.py changed while it ran: the next run does it again" in said
    times = [rows.stat().st_mtime_ns]
    for _ in range(2):
        again = run()
        said, _ = again.communicate()
        assert again.returncode == 0, said
        times.append(rows.stat().st_mtime_ns)
    assert times[0] < times[1] == times[2]  # once more, and then it is up to date
