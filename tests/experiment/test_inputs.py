"""What executions are begun with: what changes a digest, and what leaves it alone."""

from __future__ import annotations

import json
import re

import pytest
from profile_factory import LLAMA, entry, tiny_profile

from djinn_lib.experiment.cells import inputs
from djinn_lib.experiment.cells.inputs import (
    cell_inputs,
    changed,
    code_of,
    digest_files,
    expected_s,
    recorded_digests,
)
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.profile import load_profile
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.paths import REFERENCE, REPO
from djinn_lib.systems import SYSTEMS

SYSTEM_FILES = REPO / "djinn_lib" / "systems"


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.traces.mkdir()
    run.trace("zipf").write_text("a trace")
    set_up_with(run, "1" * 64)
    return run


def set_up_with(run: RunFolder, digest: str) -> None:
    models = {"llama": {"digests": {"model.safetensors": digest}}}
    run.machine.write_text(json.dumps({"machine": {}, "models": models}))


def begun(run: RunFolder, **fields) -> dict[str, str]:
    profile = tiny_profile(**fields)
    return cell_inputs(run, profile, profile.cell("zipf", "all", "djinn"))


def test_what_a_cell_is_made_from(run):
    before = begun(run)
    assert sorted(before) == ["code", "profile", "trace", "weights"]
    run.trace("zipf").write_text("another trace")
    assert changed(before, begun(run)) == ["trace"]
    set_up_with(run, "2" * 64)
    assert changed(before, begun(run)) == ["trace", "weights"]


def test_a_profile_s_other_cells_leave_a_cell_alone(run):
    before = begun(run)
    zipf = {"kind": "zipf", "n": 6, "alpha": 1.0, "seed": 3, "rate_per_s": 2.0}
    djinn = {"system": "djinn"}
    for same in (
        {"capacities": {"half": "1/3", "all": "64MiB", "more": "1GiB"}},
        {"systems": {"djinn": djinn, "lru": {"system": "pytorch_lru"}}},
        {"traces": {"zipf": zipf, "paper": {"kind": "paper"}}},
    ):
        assert begun(run, **same) == before
    for other in (
        {"capacities": {"half": "1/2", "all": "32MiB"}},
        {"systems": {"djinn": {**djinn, "options": {"decode": "eager"}}}},
        {"new_tokens": 3},
        {"repeats": 2},
        {"models": {"llama": entry(LLAMA, 9)}},
    ):
        assert changed(before, begun(run, **other)) == ["profile"]


def test_the_code_of_a_cell_is_the_engine_and_its_own_system():
    for system, (module, _) in SYSTEMS.items():
        files = code_of(system)
        assert {REPO / "djinn_lib" / "engine", SYSTEM_FILES / "base.py"} < set(files)
        assert SYSTEM_FILES / f"{module}.py" in files and all(path.exists() for path in files)
    assert SYSTEM_FILES / "pytorch.py" not in code_of("djinn")
    fleet = SYSTEM_FILES.parent / "fleet"
    assert fleet in code_of("djinn_vllm") and fleet not in code_of("djinn")


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_module_of_another_system_is_overlooked(system):
    files = {path.stem for path in code_of(system) if path.parent == SYSTEM_FILES}
    text = "".join((SYSTEM_FILES / f"{name}.py").read_text() for name in files)
    assert set(re.findall(r"djinn_lib\.systems\.(\w+)", text)) <= files


def test_a_digest_is_of_names_and_contents_and_not_of_the_place(tmp_path):
    for place in ("here", "there"):
        folder = tmp_path / place / "engine"
        folder.mkdir(parents=True)
        (folder / "ring.py").write_text("ring")
    here, there = tmp_path / "here", tmp_path / "there"
    digest = digest_files([here / "engine"], here)
    assert digest == digest_files([there / "engine"], there)
    (there / "engine" / "__pycache__").mkdir()
    (there / "engine" / "__pycache__" / "ring.pyc").touch()
    assert digest == digest_files([there / "engine"], there)
    (there / "engine" / "ring.py").rename(there / "engine" / "pager.py")
    assert digest != digest_files([there / "engine"], there)
    (here / "engine" / "ring.py").write_text("another")
    assert digest != digest_files([here / "engine"], here)
    assert digest_files([here / "none"], here) != digest_files([], here)


@pytest.mark.parametrize("content", ["", "{}", '{"models": [1]}'])
def test_what_is_no_set_up_records_nothing(tmp_path, content):
    (tmp_path / "machine.json").write_text(content)
    assert recorded_digests(tmp_path / "machine.json") == {}


def test_a_kernel_of_its_own_is_part_of_what_a_cell_is_begun_with(run, monkeypatch):
    systems = {name: {"system": name} for name in ("djinn", "vllm_recreate")}
    profile = tiny_profile(systems=systems)
    cell = profile.cell("zipf", "all", "vllm_recreate")
    monkeypatch.setattr(inputs, "kernel_name", lambda *_: None)
    before = cell_inputs(run, profile, cell)
    monkeypatch.setattr(inputs, "kernel_name", lambda *_: "djinn-vllm")
    assert changed(before, cell_inputs(run, profile, cell)) == ["profile"]


def test_the_reference_run_tells_how_long_a_cell_takes(tmp_path):
    profile = load_profile("gpu")
    cell = profile.cell("paper", "25", "djinn")
    kept = RunFolder(REFERENCE).cell(cell.id).manifest
    assert expected_s(RunFolder(tmp_path), profile, cell) == read_manifest(kept)["wall_s"]
    other = load_profile("cpu")
    assert expected_s(RunFolder(tmp_path), other, other.cell("paper", "25", "djinn")) is None
