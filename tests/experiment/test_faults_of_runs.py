"""Faults of a whole run: full disks, folders that refuse, kills, interrupts, two runs at once."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from jupyter_client.utils import run_sync
from nbclient.exceptions import DeadKernelError
from nbformat.reader import NotJSONError
from papermill.exceptions import PapermillExecutionError
from tiny_run import cell_of, copied, prepare

from djinn_lib import files, nvml
from djinn_lib import rows as records
from djinn_lib.errors import ConfigError
from djinn_lib.experiment import cell as cell_module
from djinn_lib.experiment import locks, notebooks, reproduce, tasks
from djinn_lib.experiment.bench import Bench, set_up
from djinn_lib.experiment.cell import close_dead_cell, run_cell
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.notebooks import read_statuses
from djinn_lib.experiment.profile import load_profile
from djinn_lib.paths import REPO
from djinn_lib.rows import read_rows
from djinn_lib.systems.pytorch import PyTorchPinned


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Bench:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def bench(prepared, tmp_path) -> Bench:
    return copied(prepared, tmp_path / "copy")


def without_kernels(bench, monkeypatch):
    """Run cells in this process; what they raise arrives as it would from a notebook."""

    def run_here(_source, output, parameters, _kernel):
        output.write_text("{}")
        names = [parameters[name] for name in ("trace", "capacity_label", "system")]
        try:
            run_cell(bench, bench.profile.cell(*names))
        except Exception as error:
            raise PapermillExecutionError(1, 1, "", type(error).__name__, str(error), []) from error

    monkeypatch.setattr(notebooks, "_papermill", run_here)


@pytest.fixture
def in_process(bench, monkeypatch):
    """Runs the cell of a system as the task of `dodo.py` does, without a kernel."""
    without_kernels(bench, monkeypatch)
    return lambda system: tasks.run_cell_notebook(
        bench.profile, cell_of(bench, system), bench.run_dir, "here"
    )


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def status_of(bench, system) -> notebooks.Status:
    task = f"02_run_system.{cell_of(bench, system).id}"
    return next(s for s in read_statuses(bench.run_dir / "status") if s.task == task)


# -- disks -----------------------------------------------------------------------------------


def test_rows_that_find_no_room_are_kept_once_there_is_some(bench, in_process, monkeypatch):
    real, calls = cell_module.write_rows, []

    def full_once(*arguments):
        calls.append(arguments)
        return full() if len(calls) == 1 else real(*arguments)

    monkeypatch.setattr(cell_module, "write_rows", full_once)
    assert in_process("djinn")
    assert read_rows(bench.rows_path(cell_of(bench, "djinn")))["ok"].all()
    status = status_of(bench, "djinn")
    assert (status.state, status.error_kind) == ("failed", "disk_full")  # so that it runs again
    assert reproduce._summary(bench.run_dir) == 1


def test_a_journal_that_finds_no_room(bench, in_process, monkeypatch):
    """The kernel's own refusal: what is written to /dev/full never fits."""
    real, system = Path.open, "djinn"

    def open_full(path, *arguments, **options):
        if path.name.endswith(".journal.jsonl") and arguments[:1] == ("w",):
            path = Path("/dev/full")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    assert in_process(system)
    rows = read_rows(bench.rows_path(cell_of(bench, system)))
    assert set(rows["error_kind"]) == {"disk_full"} == {status_of(bench, system).error_kind}


def test_a_disk_that_stays_full_loses_no_other_result(bench, in_process, monkeypatch, capsys):
    assert in_process("djinn")
    before = contents(bench.run_dir)
    with monkeypatch.context() as patch:
        for module in (cell_module, tasks):
            patch.setattr(module, "write_json" if module is tasks else "write_rows", full)
        for module in (notebooks, records, files):
            patch.setattr(module, "write_json" if module is notebooks else "write_text", full)
        assert not in_process("pytorch_pinned")  # failed for doit, which goes on with others
    said = capsys.readouterr().out
    assert "failed" in said and "disk_full" in said and "No space left" in said
    after = contents(bench.run_dir)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if "partial" in name]
    assert in_process("pytorch_pinned")  # with room again, as if nothing had been
    assert read_rows(bench.rows_path(cell_of(bench, "pytorch_pinned")))["ok"].all()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_an_executed_notebook_that_cannot_be_kept(bench, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(notebooks, "_papermill", refuse)
    cell = cell_of(bench, "djinn")
    assert tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "here")
    kind = {errno.ENOSPC: "disk_full", errno.EROFS: "other"}[number]
    assert set(read_rows(bench.rows_path(cell))["error_kind"]) == {kind}
    assert os.strerror(number) in status_of(bench, "djinn").error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=os.strerror)
def test_a_run_folder_that_refuses_is_found_before_anything_runs(
    bench, tmp_path, monkeypatch, capsys, number
):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(reproduce, "_run", None)
    assert reproduce.main(["--profile", "smoke", "--run-dir", str(tmp_path)]) == 2
    assert os.strerror(number) in capsys.readouterr().err
    monkeypatch.setattr(cell_module, "_rows", None)
    with pytest.raises(ConfigError, match="choose another run_dir or mend"):
        run_cell(bench, cell_of(bench, "djinn"))


def test_a_run_folder_below_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert reproduce.main(["--profile", "smoke", "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "choose another run_dir" in capsys.readouterr().err


# -- rows that were measured before something failed -------------------------------------------


def after_the_cell(bench, monkeypatch, failure, keeps_the_copy=True):
    """Let a notebook measure its cell, and then fail."""

    def run_here(_source, output, parameters, _kernel):
        if keeps_the_copy:
            output.write_text("{}")
        names = [parameters[name] for name in ("trace", "capacity_label", "system")]
        run_cell(bench, bench.profile.cell(*names))
        raise failure

    monkeypatch.setattr(notebooks, "_papermill", run_here)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (PapermillExecutionError(9, 9, "", "ValueError", "a picture of nothing", []), "other"),
        (PapermillExecutionError(9, 9, "", "OutOfMemoryError", "no room", []), "oom"),
        (DeadKernelError("Kernel died"), "kernel_died"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (RuntimeError("Kernel didn't respond"), "kernel_died"),
        (NotJSONError("Notebook does not appear to be JSON"), "other"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_notebook_that_fails_after_its_cell_was_measured_loses_no_row(
    bench, monkeypatch, failure, kind
):
    """6 of 6 served once became 0 of 6."""
    after_the_cell(bench, monkeypatch, failure, keeps_the_copy=kind != "disk_full")
    cell = cell_of(bench, "pytorch_pinned")
    assert tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "here")
    rows, manifest = read_rows(bench.rows_path(cell)), read_manifest(bench.manifest_path(cell))
    assert rows["ok"].all() and set(rows["run_id"]) == {manifest["run_id"]}
    status = status_of(bench, "pytorch_pinned")
    assert (status.state, status.error_kind) == ("failed", kind)
    assert "6 of 6 requests had been served, and their rows are kept" in status.error
    assert manifest["notes"][-1].startswith("after these rows were measured an execution failed: ")
    assert reproduce._summary(bench.run_dir) == 1
    assert not tasks.is_settled(bench.run_dir, status.task)
    assert (bench.run_dir / "notebooks" / f"{status.task}.ipynb").exists()  # for the page
    assert not bench.journal_path(cell).exists()


def test_a_system_that_fails_in_closing_loses_no_row(bench, in_process, monkeypatch):
    def audit(_):
        raise AssertionError("frame 3 is mapped twice")

    monkeypatch.setattr(PyTorchPinned, "close", audit)
    assert in_process("pytorch_pinned")
    assert read_rows(bench.rows_path(cell_of(bench, "pytorch_pinned")))["ok"].all()
    status = status_of(bench, "pytorch_pinned")
    assert status.state == "failed" and "frame 3 is mapped twice" in status.error


def test_an_execution_that_dies_leaves_an_earlier_one_its_rows(bench, in_process, monkeypatch):
    assert in_process("pytorch_pinned")
    cell = cell_of(bench, "pytorch_pinned")
    before = bench.rows_path(cell).read_bytes()

    def die(*_):
        raise DeadKernelError("Kernel died")

    with monkeypatch.context() as patch:
        patch.setattr(notebooks, "_papermill", die)
        assert tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "here")
    assert bench.rows_path(cell).read_bytes() == before
    assert status_of(bench, "pytorch_pinned").error_kind == "kernel_died"
    assert in_process("pytorch_pinned")  # the next one is measured, and takes their place
    assert bench.rows_path(cell).read_bytes() != before
    assert status_of(bench, "pytorch_pinned").state == "ok"
    notes = read_manifest(bench.manifest_path(cell))["notes"]
    assert not [note for note in notes if "failed" in note]


def test_an_execution_that_dies_half_way_does_not_replace_a_whole_one(
    bench, in_process, monkeypatch
):
    assert in_process("pytorch_pinned")
    cell = cell_of(bench, "pytorch_pinned")
    before = bench.rows_path(cell).read_bytes()
    real, calls = PyTorchPinned.serve, []

    def serve(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2 + 4:
            raise KeyboardInterrupt  # as a kill: no row of it
        return real(self, *arguments)

    def die(*arguments):
        try:
            run_cell(bench, cell)
        except KeyboardInterrupt:
            raise DeadKernelError("Kernel died") from None

    monkeypatch.setattr(PyTorchPinned, "serve", serve)
    monkeypatch.setattr(notebooks, "_papermill", die)
    assert tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "here")
    assert bench.rows_path(cell).read_bytes() == before
    assert n_rows(bench.journal_path(cell)) == 3  # what it did measure is there too
    bench.rows_path(cell).unlink()
    close_dead_cell(bench, cell, "kernel_died", "killed")
    rows, manifest = read_rows(bench.rows_path(cell)), read_manifest(bench.manifest_path(cell))
    assert rows["ok"].tolist() == [True] * 3 + [False] * 3
    assert set(rows["run_id"]) == {manifest["run_id"]}
    assert manifest["wall_s"] > rows["start_s"][2] > manifest["setup_s"] > 0
    assert not bench.journal_path(cell).exists()


def test_rows_of_an_interrupted_execution_are_not_those_of_the_next(bench, monkeypatch):
    """Its kernel does not even start: the journal that is there was another's."""
    cell, journal = cell_of(bench, "djinn"), bench.journal_path(cell_of(bench, "djinn"))
    run_cell(bench, cell)
    row = read_rows(bench.rows_path(cell)).iloc[0].to_dict()
    bench.rows_path(cell).unlink()
    journal.write_text(json.dumps(row, default=str) + "\n")

    def die(*_):
        raise RuntimeError("Kernel didn't respond in 180 seconds")

    monkeypatch.setattr(notebooks, "_papermill", die)
    assert tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "here")
    assert not read_rows(bench.rows_path(cell))["ok"].any()
    assert n_rows(journal.parent / "earlier" / journal.name) == 1


def test_rows_whose_manifest_finds_no_room_get_one_later(bench, in_process, monkeypatch):
    cell = cell_of(bench, "pytorch_pinned")
    with monkeypatch.context() as patch:
        patch.setattr(cell_module, "write_manifest", full)
        patch.setattr("djinn_lib.experiment.kept_rows.write_manifest", full)
        assert not in_process("pytorch_pinned")
    rows = read_rows(bench.rows_path(cell))
    assert rows["ok"].all() and not bench.manifest_path(cell).exists()
    close_dead_cell(bench, cell, "disk_full", "No space left on device")
    assert read_rows(bench.rows_path(cell)).equals(rows)
    assert read_manifest(bench.manifest_path(cell))["run_id"] == rows["run_id"][0]


def test_a_system_that_exits_at_its_start_fails_its_requests(bench, in_process, monkeypatch):
    monkeypatch.setattr(PyTorchPinned, "start", lambda *_: sys.exit("no licence"))
    assert in_process("pytorch_pinned")
    rows = read_rows(bench.rows_path(cell_of(bench, "pytorch_pinned")))
    assert rows["error"].str.contains("could not start: SystemExit: no licence").all()


# -- two runs at once ------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "_run", lambda *_: 0)
    arguments = ["--profile", "smoke", "--run-dir", str(tmp_path)]
    with locks.run_locks(tmp_path, "cpu"):
        assert reproduce.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"process {os.getpid()}" in said and f"run folder {tmp_path}" in said
        assert "--run-dir" in said
    assert reproduce.main(arguments) == 0


def test_one_run_a_gpu_whatever_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_shared_folder", lambda: tmp_path)
    monkeypatch.setattr(nvml, "first_gpu", lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    with locks.run_locks(one, "cuda"):
        with pytest.raises(ConfigError, match=rf"GPU-1 to be free, .*{one}.*VISIBLE_DEVICES"):
            locks.run_locks(other, "cuda").__enter__()
        with locks.run_locks(other, "cpu"):
            pass  # nor does the attempt keep the other folder
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2")
        with locks.run_locks(other, "cuda"):
            pass
    with pytest.raises(KeyError), locks.run_locks(one, "cuda"):
        raise KeyError
    with locks.run_locks(one, "cuda"):
        pass


def test_a_cell_that_ray_brings_here_asks_for_the_gpu_too(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_shared_folder", lambda: tmp_path)
    profile = bench.profile.model_copy(update={"device": "cuda"})
    arguments = (profile, cell_of(bench, "djinn"), {}, bench.run_dir, tasks.Driver("here", None))
    with locks.gpu_lock(tmp_path), pytest.raises(ConfigError, match=r"the GPU .* to be free"):
        tasks.run_cell_apart(*arguments)


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path, nothing_leaks):
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from djinn_lib.experiment.locks import run_locks\n"
        "with run_locks(Path(sys.argv[1]), 'cpu'):\n    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with nothing_leaks():
        holder = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            cwd=REPO,
        )  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "):
            locks.run_locks(tmp_path, "cpu").__enter__()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        with locks.run_locks(tmp_path, "cpu"):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_files_that_are_none(tmp_path):
    (tmp_path / ".lock").write_text("not JSON")
    with locks.run_locks(tmp_path, "cpu"):
        (tmp_path / ".lock").write_text("[]")
        with pytest.raises(ConfigError, match="has not given its name"):
            locks.run_locks(tmp_path, "cpu").__enter__()
    (tmp_path / ".lock").unlink()
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="a file for a lock"):
        locks.run_locks(tmp_path, "cpu").__enter__()
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("", "GPU-a1"), ("1", "GPU-b2"), ("1,0", "GPU-b2"), ("GPU-b", "GPU-b2"), ("7", "gpu7"),
     ("GPU-c", "GPU-c"), ("MIG-x-1", "MIG-x-1"), ("../../x", "GPU-a1")],
)  # fmt: skip
def test_the_gpu_that_cuda_shows_first(monkeypatch, visible, expected):
    class NVMLError(Exception):
        pass

    def handle(index):
        if index > 1:
            raise NVMLError
        return index

    driver = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetUUID=["GPU-a1", "GPU-b2"].__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvml.first_gpu() == expected


# -- processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Bench:
    """A run folder of the smoke profile, after set-up and traces."""
    root = tmp_path_factory.mktemp("smoke")
    profile = load_profile("smoke")
    bench = set_up(profile, root / "run", root / "models", progress=lambda step: None)
    bench.write_traces()
    return bench


def n_rows(journal: Path) -> int:
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def wait_for_rows(journal: Path, n: int) -> None:
    until_s = time.perf_counter() + 120
    while n_rows(journal) < n:
        assert time.perf_counter() < until_s, f"expected {n} rows in {journal}"
        time.sleep(0.02)


def kernels_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [p for p in children if "ipykernel" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_a_kernel_killed_mid_cell_costs_the_requests_that_were_left(
    smoke, nothing_leaks, monkeypatch
):
    cell, other = (smoke.profile.cell("paper", "25", s) for s in ("djinn", "vllm_sleep"))

    def kill():
        wait_for_rows(smoke.journal_path(cell), 3)
        kernels_of(os.getpid())[0].kill()

    killer = threading.Thread(target=kill)
    run_sync(asyncio.sleep)(0)  # papermill's event loop stays for the next notebook
    with nothing_leaks():
        killer.start()
        assert tasks.run_cell_notebook(smoke.profile, cell, smoke.run_dir, "1 of 2")
        killer.join()
    rows = read_rows(smoke.rows_path(cell))
    n_ok = int(rows["ok"].sum())
    assert 3 <= n_ok < len(rows) == 60
    assert rows["ok"].tolist() == [True] * n_ok + [False] * (60 - n_ok)
    assert set(rows.loc[~rows["ok"], "error_kind"]) == {"kernel_died"}
    without_kernels(smoke, monkeypatch)
    assert tasks.run_cell_notebook(smoke.profile, other, smoke.run_dir, "2 of 2")
    assert set(read_rows(smoke.rows_path(other))["error_kind"]) == {"unavailable"}
    assert reproduce._summary(smoke.run_dir) == 1


@pytest.mark.slow
def test_a_kernel_killed_after_its_cell_was_measured_costs_no_request(smoke):
    """While it draws what it has measured."""
    cell = smoke.profile.cell("paper", "20", "pytorch_pinned")

    def kill():
        until_s = time.perf_counter() + 500
        while not smoke.rows_path(cell).exists():
            assert time.perf_counter() < until_s
            time.sleep(0.005)
        kernels_of(os.getpid())[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert tasks.run_cell_notebook(smoke.profile, cell, smoke.run_dir, "1 of 1")
    killer.join()
    rows, manifest = read_rows(smoke.rows_path(cell)), read_manifest(smoke.manifest_path(cell))
    assert len(rows) == 60 and rows["ok"].all()
    assert set(rows["run_id"]) == {manifest["run_id"]}
    statuses = {status.task: status for status in read_statuses(smoke.run_dir / "status")}
    status = statuses[f"02_run_system.{cell.id}"]
    assert (status.state, status.error_kind) == ("failed", "kernel_died")
    assert "60 of 60 requests had been served" in status.error


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_keeps_the_journal(smoke):
    """To the whole process group, as a terminal sends it."""
    cell = smoke.profile.cell("paper", "25", "pytorch_lru")
    command = [sys.executable, "-m", "djinn_lib.experiment.reproduce", "--profile", "smoke",
               "--run-dir",
               str(smoke.run_dir), f"cell:{cell.id}"]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=REPO, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        # Tests that a shell runs in the background ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for_rows(smoke.journal_path(cell), 3)
    started = psutil.Process(run.pid).children(recursive=True)
    assert kernels_of(run.pid)
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "interrupted: the same command goes on" in said and "Traceback" not in said
    assert [p for p in started if p.is_running()] == []
    assert n_rows(smoke.journal_path(cell)) >= 3
    assert not smoke.rows_path(cell).exists()  # half a cell is not taken for a whole one
    assert not list((smoke.run_dir / "notebooks").glob(f"*{cell.id}*"))
    with locks.run_locks(smoke.run_dir, "cpu"):
        pass  # free for the next run
    assert run_cell(smoke, cell)["ok"].all()  # which begins the cell again
    assert not smoke.journal_path(cell).exists()
