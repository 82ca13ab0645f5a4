"""An edit reruns what it can change, and only that."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from djinn_lib.experiment.source_files import imported_files
from profile_factory import tiny_profile

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.bench import set_up
from djinn_lib.files import write_json
from djinn_lib.paths import REPO

LIB = REPO / "djinn_lib"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose modules import one another in every way there is."""
    files = {
        "__init__": "import os",
        "first": "from pack import second\nimport os.path",
        "second": "def later():\n    import pack.inner.third",
        "inner/__init__": "",
        "inner/third": "ENGINE = 'pack.worker:Engine'\nPROSE = 'pack.other is not run'",
        "worker": "from pack.loop import name, other",
        "loop": "from pack.worker import Engine",
        "other": "",
    }
    for name, text in files.items():
        path = tmp_path / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pack"


def names(paths: list[Path], package: Path) -> list[str]:
    return [path.relative_to(package).with_suffix("").as_posix() for path in paths]


def test_imports_are_followed_wherever_they_stand(package: Path):
    assert names(imported_files(package / "first.py", package=package), package) == [
        "__init__", "first", "inner/__init__", "inner/third", "loop", "second", "worker",
    ]  # fmt: skip
    alone = imported_files(package / "other.py", package=package)
    assert names(alone, package) == ["other"]


def test_a_notebook_needs_what_its_cells_import(package: Path):
    cells = [
        {"cell_type": "markdown", "source": ["import pack.other"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "from pack import worker\n"]},
    ]
    notebook = package.parent / "a.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    found = imported_files(notebook, package=package)
    assert names(found, package) == ["__init__", "loop", "worker"]


# -- the tasks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dodo() -> ModuleType:
    """The tasks of the profile `cpu`, under a name of their own: `dodo` is for a run's folder."""
    spec = spec_from_file_location("tasks_of_the_profile_cpu", REPO / "dodo.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DJINN_PROFILE", "cpu")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def of_cells(dodo: ModuleType) -> dict[str, set[Path]]:
    """What the cells of a system depend on."""
    cells = {cell.id: dodo.PROFILE.systems[cell.system].system for cell in dodo.CELLS}
    return {cells[task["name"]]: needed(task) for task in dodo.task_cell()}


def needed(task: dict) -> set[Path]:
    return {path for path in task["file_dep"] if path.suffix == ".py"}


def test_a_cell_depends_on_what_makes_its_rows(of_cells: dict[str, set[Path]]):
    of = of_cells
    kernels = {
        LIB / "engine" / f"{name}.py"
        for name in (
            "decode/kernels/triton_kernels",
            "decode/fused_layers",
            "memory/ring",
            "memory/pager",
        )
    }
    assert kernels <= of["djinn"] and not kernels & of["pytorch_lru"]
    assert LIB / "systems" / "pytorch.py" in of["pytorch_lru"] - of["djinn"]
    for files in of.values():
        assert {
            LIB / "experiment" / "cell.py",
            LIB / "experiment" / "bench.py",
            LIB / "systems" / "base.py",
        } <= files
        assert not [path for path in files if path.stem.startswith(("plot", "claim", "analysis"))]


def test_a_notebook_depends_on_what_it_draws_and_judges_with(dodo: ModuleType):
    assert {LIB / "analysis/host_pace.py", LIB / "analysis/claims.py"} <= needed(dodo.task_claims())
    assert {LIB / "analysis/plots/pace.py", LIB / "analysis/replicates.py"} <= needed(
        dodo.task_figures()
    )
    assert LIB / "experiment/fan_out.py" in needed(dodo.task_policies())
    assert LIB / "engine/decode/fused_layers.py" in needed(dodo.task_large_models())
    assert LIB / "analysis/plots/latency.py" not in needed(dodo.task_setup())


# -- what a cell is begun with -----------------------------------------------------------------


def changed(before: dict[str, str], now: dict[str, str]) -> set[str]:
    return {Path(name).name for name in before | now if before.get(name) != now.get(name)}


def test_a_cell_is_begun_with_what_its_process_will_read(dodo: ModuleType, tmp_path, monkeypatch):
    monkeypatch.setattr(dodo, "MACHINE", tmp_path / "machine.json")
    cell = next(cell for cell in dodo.CELLS if cell.system == "djinn")
    before = dodo.inputs_of(cell)
    assert before == dodo.inputs_of(cell, dodo.PROFILE)
    assert {"ring.py", "02_run_system.ipynb", f"{cell.trace}.jsonl", "cpu.yml", "weights"} <= {
        Path(name).name for name in before
    }
    # The profile's file is edited: this process goes by what it read, the cell's by the file.
    edited = dodo.PROFILE.model_copy(update={"new_tokens": dodo.PROFILE.new_tokens + 1})
    monkeypatch.setattr(dodo, "load_profile", lambda name: edited)
    assert changed(before, dodo.inputs_of(cell)) == {"cpu.yml"}
    assert dodo.inputs_of(cell, dodo.PROFILE) == before

    def half_written(name: str) -> None:
        raise ConfigError("cpu.yml cannot be used")

    monkeypatch.setattr(dodo, "load_profile", half_written)
    assert changed(before, dodo.inputs_of(cell)) == {"cpu.yml"}


def test_a_profile_s_other_cells_and_comments_leave_a_cell_alone(dodo: ModuleType, monkeypatch):
    cell = dodo.CELLS[0]
    before = dodo.inputs_of(cell)
    fewer = dodo.PROFILE.model_copy(update={"cells": dodo.PROFILE.cells[:1]})
    monkeypatch.setattr(dodo, "load_profile", lambda name: fewer)
    assert dodo.inputs_of(cell) == before


def test_a_set_up_with_other_weights_has_cells_run_again(dodo: ModuleType, tmp_path, monkeypatch):
    cell, machine = dodo.CELLS[0], tmp_path / "machine.json"
    monkeypatch.setattr(dodo, "MACHINE", machine)
    found = []
    for digest in ("1" * 64, "2" * 64):
        write_json(machine, {"models": {"m": {"digests": {"model.safetensors": digest}}}})
        found.append(dodo.inputs_of(cell))
    assert changed(*found) == {"weights"}


def test_the_page_is_begun_with_the_code_that_makes_it(dodo: ModuleType, tmp_path):
    """It is made in this process, which has loaded that code at its start."""
    assert LIB / "publishing/report.py" in {Path(name) for name in dodo.LOADED}
    task = dodo.task_report()
    assert {Path(name) for name in dodo.LOADED} <= set(task["file_dep"])


RUN = """
import json, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from profile_factory import tiny_profile
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.cell import run_cell
system = sys.argv[2]
cells = [{"traces": ["zipf"], "capacities": ["all"], "systems": [system]}]
profile = tiny_profile(systems={system: {"system": system}}, cells=cells)
run_cell(bench := Bench.open(profile, Path(sys.argv[1])), profile.cell("zipf", "all", system))
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "djinn_lib"]
print(json.dumps(files))
"""


@pytest.mark.parametrize("system", ["djinn", "serverless"])
def test_nothing_that_a_cell_runs_is_overlooked(
    system: str, of_cells: dict[str, set[Path]], tmp_path: Path
):
    set_up(tiny_profile(), tmp_path / "run", tmp_path / "models", progress=print).write_traces()
    arguments = [str(tmp_path / "run"), system, str(REPO / "tests" / "support")]
    ran = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=REPO, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    loaded = {Path(path) for path in json.loads(ran.stdout.splitlines()[-1])}
    assert len(loaded) > 15 and loaded <= of_cells[system]
