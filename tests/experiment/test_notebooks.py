"""Headless execution, tasks and the command line: a real kernel, real deaths."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from profile_factory import tiny_profile

from djinn_lib.errors import ConfigError
from djinn_lib.experiment import notebooks, reproduce, tasks
from djinn_lib.experiment.bench import Bench, set_up
from djinn_lib.experiment.notebooks import (
    Status,
    check_parameters,
    execute,
    read_statuses,
    write_status,
)
from djinn_lib.paths import REPO
from djinn_lib.rows import read_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of notebooks, each a parameters cell and one line of code."""
    codes = {
        "good": "import djinn_lib; print(n + 1)",
        "raises": "raise ValueError('expected 1, got ' + str(n))",
        "listens": "import json, ipykernel; print(open(ipykernel.get_connection_file()).read())",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    }
    for name, code in codes.items():
        notebook = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell(
                    "n: int = 1  # a number", metadata={"tags": ["parameters"]}
                ),
                nbformat.v4.new_code_cell(code),
            ],
            metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
        )
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS_DIR", tmp_path)
    return tmp_path


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_execute_keeps_the_executed_copy(folder):
    output = folder / "out" / "good.ipynb"
    status = execute("good", output, {"n": 41})
    assert (status.task, status.state, status.error) == ("good", "ok", "")
    assert "42" in printed(output)
    assert not list(output.parent.glob("*.partial*"))


BRACES = (
    "with {braces}",
    "{0}",
    "{n}",
    "{{n}}",
    "}{",
    "{n!r:>{n}}",
    "%s ${HOME} [a] *",
    "a'b\"c\\",
)


@pytest.mark.parametrize("name", BRACES)
def test_paths_are_taken_literally(folder, monkeypatch, name):
    """Papermill fills parameters into paths: `{n}` of a notebook that has one went elsewhere."""
    given = []

    def run_here(source, output, parameters, **_):
        parameters = {**parameters, "pm": {}}
        given.extend(Path(path.format(**parameters)) for path in (source, output))
        given[1].write_text("{}")

    inside = folder / name
    inside.mkdir()
    (folder / "good.ipynb").rename(inside / "good.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS_DIR", inside)
    monkeypatch.setattr(notebooks.papermill, "execute_notebook", run_here)
    output = inside / "out" / "good.ipynb"
    status = execute("good", output, {"n": 1})
    assert status.state == "ok", status
    assert given == [inside / "good.ipynb", output.with_suffix(".partial.ipynb")]
    assert output.read_text() == "{}"


@pytest.mark.slow
def test_a_run_below_braces_is_a_run_like_any_other(tmp_path):
    """Set-up and one cell through the real command, in a folder that papermill would fill in."""
    run_dir = tmp_path / "{profile} {0} [x] %s"
    command = [sys.executable, "-m", "djinn_lib.experiment.reproduce", "--profile", "smoke",
               "--run-dir", str(run_dir), "cell:paper-25-pytorch_lru"]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_rows(run_dir / "requests" / "paper-25-pytorch_lru.parquet")["ok"].all()
    assert (run_dir / "notebooks" / "02_run_system.paper-25-pytorch_lru.ipynb").exists()
    assert [path.name for path in tmp_path.iterdir()] == [run_dir.name]


def test_an_error_in_a_notebook_is_a_status(folder):
    output = folder / "out" / "raises.ipynb"
    status = execute("raises", output, {"n": 7})
    assert (status.state, status.error_kind) == ("failed", "other")
    assert "ValueError: expected 1, got 7" in status.error
    assert output.exists()  # up to where it failed, for the reader


def test_a_killed_kernel_is_a_status(folder):
    status = execute("dies", folder / "out" / "dies.ipynb", {})
    assert (status.state, status.error_kind) == ("failed", "kernel_died")


def test_a_kernel_that_does_not_start_is_a_status(folder, monkeypatch):
    spec = folder / "share" / "kernels" / "broken" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-c", "raise SystemExit(3)", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "share"))
    status = execute("good", folder / "out" / "good.ipynb", {}, kernel="broken")
    assert (status.state, status.error_kind) == ("failed", "kernel_died")
    assert "did not start" in status.error
    assert (folder / "out" / "good.ipynb").exists()  # for the page


def test_a_copy_that_a_killed_process_left_is_not_that_of_the_next(folder, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Kernel didn't respond in 180 seconds")

    monkeypatch.setattr(notebooks, "_papermill", refuse)
    output = folder / "out" / "good.ipynb"
    output.parent.mkdir()
    output.with_suffix(".partial.ipynb").write_text("cut")
    assert execute("good", output, {}).error_kind == "kernel_died"
    assert output.read_bytes() == (folder / "good.ipynb").read_bytes()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("error", "kind"), [(KeyError("cells"), "other"), (MemoryError("kernel"), "oom")], ids=repr
)
def test_whatever_the_libraries_raise_is_a_status(folder, monkeypatch, error, kind):
    def refuse(*_):
        raise error

    monkeypatch.setattr(notebooks, "_papermill", refuse)
    status = execute("good", folder / "out" / "good.ipynb", {})
    assert (status.state, status.error_kind) == ("failed", kind)
    assert status.error.startswith(type(error).__name__)


@pytest.mark.parametrize("long", [False, True])
def test_kernels_take_no_ports_that_others_may_take(folder, monkeypatch, long):
    scratch = folder / ("a-folder-of-a-long-name-" * 4 if long else "tmp")
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert execute("listens", folder / "out" / "listens.ipynb", {}).state == "ok"
    connection = json.loads(printed(folder / "out" / "listens.ipynb"))
    assert connection["transport"] == "ipc"
    own = Path(connection["ip"]).parent
    assert own.name.startswith("djinn-kernel-") and not own.exists()  # gone with the kernel
    assert len(str(own)) < 100 and not list(scratch.iterdir())


def test_unknown_notebooks_and_parameters_are_refused_before_anything_runs(folder):
    output = folder / "out" / "good.ipynb"
    with pytest.raises(ConfigError, match=r"out of \['n'\], got \['m'\]"):
        execute("good", output, {"m": 1})
    with pytest.raises(ConfigError, match="expected a notebook out of"):
        execute("nonsense", output, {})
    assert not output.exists()


def test_every_notebook_of_the_package_takes_the_parameters_it_is_given():
    basic = {"profile": "cpu", "run_dir": "x"}
    given = {
        "00_setup": basic,
        "01_trace": basic,
        "02_run_system": {**basic, "system": "", "trace": "", "capacity_label": ""},
        "03_sensitivity": {"run_dir": "x"},
        "04_figures": {"run_dir": "x"},
        "05_claims": {"run_dir": "x"},
    }
    for name, parameters in given.items():
        check_parameters(REPO / "notebooks" / f"{name}.ipynb", parameters)


def test_statuses_round_trip(tmp_path):
    statuses = [Status("a", "ok", 1.5), Status("b", "failed", 2.0, "oom", "too large")]
    for status in statuses:
        write_status(status, tmp_path)
    assert read_statuses(tmp_path) == statuses
    (tmp_path / "a.json").write_text('{"task": "a", "sta')
    (tmp_path / "c.json").write_text('{"task": "c", "colour": 1}')
    torn, whole, other = read_statuses(tmp_path)
    assert whole == statuses[1]
    assert (torn.task, torn.state, other.task, other.state) == ("a", "failed", "c", "failed")
    assert "run the task again" in torn.error and "colour" in other.error


@pytest.fixture
def bench(tmp_path):
    profile = tiny_profile(
        systems={"djinn": {"system": "djinn"}, "vllm_sleep": {"system": "vllm_sleep"}}
    )
    bench = set_up(profile, tmp_path / "run", tmp_path / "models", progress=lambda step: None)
    bench.write_traces()
    return Bench.open(profile, tmp_path / "run")


def test_a_cell_whose_kernel_dies_becomes_failed_rows_and_the_run_goes_on(bench, monkeypatch):
    cell = bench.profile.cell("zipf", "all", "djinn")
    died = Status(f"02_run_system.{cell.id}", "failed", 1.0, "kernel_died", "killed")
    monkeypatch.setattr(tasks, "execute", lambda *_, **__: died)
    assert tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "cell 1 of 1")
    rows = read_rows(bench.run.cell(cell.id).rows)
    assert set(rows["error_kind"]) == {"kernel_died"}
    assert not tasks.is_settled(bench.run_dir, f"02_run_system.{cell.id}")
    assert reproduce._summary(bench.run_dir) == 1


def test_an_unavailable_system_is_settled_and_no_failure(bench, monkeypatch):
    from djinn_lib.experiment.cell import run_cell

    cell = bench.profile.cell("zipf", "all", "vllm_sleep")
    run_cell(bench, cell)
    done = Status(f"02_run_system.{cell.id}", "ok", 1.0)
    monkeypatch.setattr(tasks, "execute", lambda *_, **__: done)
    tasks.run_cell_notebook(bench.profile, cell, bench.run_dir, "cell 1 of 1")
    (status,) = read_statuses(bench.run_dir / "status")
    assert (status.state, status.error_kind) == ("unavailable", "unavailable")
    assert tasks.is_settled(bench.run_dir, status.task)
    assert reproduce._summary(bench.run_dir) == 0


def test_a_task_that_never_ran_is_not_settled(tmp_path):
    assert not tasks.is_settled(tmp_path, "00_setup")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "nonsense"], "expected a profile out of"),
        (["--profile", "../cpu"], "expected a profile out of"),
        (["--profile", "smoke", "--run-dir", "/proc/nowhere"], "written to"),
    ],
)
def test_bad_arguments_end_with_a_message_and_status_2(arguments, message, capsys):
    assert reproduce.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_gpu_profile_needs_a_gpu(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reproduce.main(["--profile", "gpu"]) == 2
    assert "PROFILE=cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_part_of_the_smoke_profile_and_a_rerun_that_does_nothing(tmp_path):
    """Set-up, trace and one cell through the real command; then nothing is left to do."""

    def run():
        command = [sys.executable, "-m", "djinn_lib.experiment.reproduce", "--profile", "smoke",
                   "--run-dir", str(tmp_path), "cell:paper-25-djinn"]  # fmt: skip
        return subprocess.run(
            command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "CI": "1"}
        )

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "02_run_system.paper-25-djinn: ok" in first.stdout
    rows = tmp_path / "requests" / "paper-25-djinn.parquet"
    before = rows.stat().st_mtime_ns
    second = run()
    assert second.returncode == 0
    assert "..." not in second.stdout  # no notebook was executed
    assert rows.stat().st_mtime_ns == before
