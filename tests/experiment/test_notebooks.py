"""Headless execution: real kernels, real deaths, and how an execution ended."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.reader import NotJSONError
from profile_factory import tiny_profile

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.cells.cell_runs import execute_cell
from djinn_lib.experiment.cells.inputs import LIBRARY
from djinn_lib.experiment.execution import notebooks
from djinn_lib.experiment.execution.kernels import fork_context
from djinn_lib.experiment.execution.notebooks import check_parameters, execute, in_a_fork
from djinn_lib.experiment.manifest import Status, keep_status, read_status, read_statuses
from djinn_lib.experiment.profile import Profile
from djinn_lib.experiment.run_folder import CELL_NOTEBOOK, RunFolder
from djinn_lib.experiment.steps import STEPS
from djinn_lib.paths import NOTEBOOKS, REPO


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of notebooks, each a parameters cell and one line of code."""
    codes = {
        "good": "import djinn_lib; print(n + 1)",
        "draws": "import matplotlib.pyplot as plt; plt.plot([1, 2])",
        "raises": "raise ValueError('expected 1, got ' + str(n))",
        "listens": "import json, ipykernel; print(open(ipykernel.get_connection_file()).read())",
        "waits": "import os, time; from pathlib import Path\n"
        f"Path({str(tmp_path)!r}, 'kernel.pid').write_text(str(os.getpid())); time.sleep(600)",
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
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    return tmp_path


def printed(path):
    return path.with_suffix(".log").read_text()


def test_execute_keeps_the_executed_copy(folder):
    output = folder / "out" / "good.ipynb"
    status = execute("good", output, {"n": 41})
    assert (status.task, status.state, status.error) == ("good", "ok", "")
    assert "42" in printed(output)
    assert not list(output.parent.glob("*.partial*"))


@pytest.mark.parametrize("name", ["{0} {n} {{n}}", "}{", "%s ${HOME} [a] *", "a'b\"c\\"])
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
    monkeypatch.setattr(notebooks, "NOTEBOOKS", inside)
    monkeypatch.setattr(notebooks.papermill, "execute_notebook", run_here)
    output = inside / "out" / "good.ipynb"
    status = execute("good", output, {"n": 1})
    assert status.state == "ok", status
    assert given == [inside / "good.ipynb", output.with_suffix(".partial.ipynb")]
    assert output.read_text() == "{}"


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


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("kernel"), "oom"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (RuntimeError("Kernel didn't respond"), "kernel_died"),
        (NotJSONError("Notebook does not appear to be JSON"), "other"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_whatever_the_libraries_raise_is_a_status(folder, monkeypatch, error, kind):
    def refuse(*_):
        raise error

    monkeypatch.setattr(notebooks, "_papermill", refuse)
    status = execute("good", folder / "out" / "good.ipynb", {})
    assert (status.state, status.error_kind) == ("failed", kind)
    assert str(error) in status.error


@pytest.mark.parametrize("long", [False, True])
def test_kernels_take_no_ports_that_others_may_take(folder, monkeypatch, long):
    scratch = folder / ("a-folder-of-a-long-name-" * 4 if long else "tmp")
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert execute("listens", folder / "out" / "listens.ipynb", {}).state == "ok"
    heading, _, text = printed(folder / "out" / "listens.ipynb").partition("\n")
    connection = json.loads(text)
    assert heading == "--- code cell 2"  # after the parameters
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


def test_every_notebook_of_the_package_takes_the_parameters_it_is_given(tmp_path):
    profile, run = tiny_profile(), RunFolder(tmp_path)
    given = {step.notebook: step.parameters(run, profile) for step in STEPS}
    names = ("profile", "run_dir", "system", "trace", "capacity_label", "mode")
    given[CELL_NOTEBOOK] = dict.fromkeys(names, "x")
    assert sorted(given) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name, parameters in given.items():
        check_parameters(NOTEBOOKS / f"{name}.ipynb", parameters)


def test_a_cell_s_notebook_is_given_its_cell(tmp_path, monkeypatch):
    profile, given = tiny_profile(), {}
    (cell,) = profile.all_cells()

    def execute(notebook, output, parameters, **_):
        given.update(parameters, notebook=notebook)
        return Status(output.stem, "ok", 1.0)

    monkeypatch.setattr(notebooks, "execute", execute)
    execute_cell(RunFolder(tmp_path), profile, cell)
    assert given.pop("notebook") == CELL_NOTEBOOK
    check_parameters(NOTEBOOKS / f"{CELL_NOTEBOOK}.ipynb", given)
    names = ("trace", "capacity_label", "system", "mode", "start")
    assert profile.cell(*(given[n] for n in names)) == cell


def test_every_file_that_a_notebook_is_made_from_is_there():
    for step in STEPS:
        assert not [part for part in step.code if not (LIBRARY / part).exists()], step.name
        assert not [path for path in step.data if not path.exists()], step.name
        assert set(step.profile) <= set(Profile.model_fields), step.name


# -- how executions ended ------------------------------------------------------------------------


def test_a_status_is_kept_in_the_executed_copy(tmp_path):
    run = RunFolder(tmp_path)
    path = run.notebook("04_figures")
    path.parent.mkdir()
    path.write_text(json.dumps({"cells": [], "metadata": {"papermill": {}}}))
    assert read_status(path) is None
    status = Status("04_figures", "failed", 2.0, "oom", "zu groß", {"code": "1"}, ["a.png"])
    keep_status(status, path)
    assert read_status(path) == status and read_statuses(tmp_path) == [status]
    assert "papermill" in json.loads(path.read_text())["metadata"]
    for content in ("", "{}", '{"metadata": {"djinn": {"colour": 1}}}', '{"metadata": []}'):
        path.write_text(content)
        assert read_status(path) is None
    assert read_statuses(tmp_path) == []


# -- forked kernels ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_forked_kernel_is_a_process_of_its_own_like_any_other(folder):
    assert execute("good", folder / "out" / "good.ipynb", {"n": 41}, fork=True).state == "ok"
    assert "42" in printed(folder / "out" / "good.ipynb")
    assert execute("dies", folder / "out" / "dies.ipynb", {}, fork=True).error_kind == "kernel_died"
    assert "ValueError" in execute("raises", folder / "out" / "r.ipynb", {}, fork=True).error
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_forked_kernel_keeps_figures_as_pictures(folder):
    execute("draws", folder / "out" / "draws.ipynb", {}, fork=True)
    outputs = nbformat.read(folder / "out" / "draws.ipynb", as_version=4).cells[-1].outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_a_forked_process_forks_from_the_process_with_the_imports_that_the_run_has():
    of_worker, of_its_fork = in_a_fork(_parents)
    assert of_its_fork == of_worker != os.getpid()


def _parents() -> tuple[int, int]:
    with ProcessPoolExecutor(1, fork_context()) as pool:
        return os.getppid(), pool.submit(os.getppid).result()


@pytest.mark.slow
def test_a_forked_kernel_ends_with_its_run_even_if_that_is_killed(folder):
    script = (
        "import sys; from pathlib import Path\n"
        "from djinn_lib.experiment.execution import notebooks\n"
        "notebooks.NOTEBOOKS = Path(sys.argv[1])\n"
        "notebooks.execute('waits', Path(sys.argv[1]) / 'out.ipynb', {}, fork=True)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=REPO)
    mark, until_s = folder / "kernel.pid", time.monotonic() + 120
    while not (mark.exists() and mark.read_text()):
        assert run.poll() is None and time.monotonic() < until_s
        time.sleep(0.05)
    kernel = psutil.Process(int(mark.read_text()))
    run.kill()
    run.wait()
    assert not psutil.wait_procs([kernel], timeout=20)[1]
