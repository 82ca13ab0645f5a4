"""A run's folder: what set-up leaves there, and what is said when it is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from profile_factory import LLAMA, entry, tiny_profile

from djinn_lib.errors import CheckpointError, ConfigError
from djinn_lib.experiment import bench as bench_module
from djinn_lib.experiment.bench import Bench, set_up
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.systems.base import ModelFiles
from djinn_lib.trace import read_trace

FACTS = {"device": "cpu", "link_rate_bytes_per_s": 8e9}


@pytest.fixture(autouse=True)
def facts(monkeypatch) -> None:
    """Measuring the machine takes a second; test_machine does it."""
    monkeypatch.setattr(
        bench_module, "describe_machine", lambda device: {**FACTS, "device": device}
    )


def silent(_: str) -> None:
    """Tell nobody."""


def set_up_in(folder: Path) -> Bench:
    return set_up(tiny_profile(), folder / "run", folder / "models", silent)


def bench_of(sizes: dict[str, int], **fields: Any) -> Bench:
    """A bench over models of these sizes, without any files."""
    models = {name: ModelFiles(name, Path("/none"), n, "float32") for name, n in sizes.items()}
    profile = tiny_profile({name: entry(LLAMA) for name in sizes}, **fields)
    return Bench(profile, RunFolder(Path("/run")), models, FACTS)


def test_what_set_up_leaves_is_what_a_cell_opens(tmp_path):
    told: list[str] = []
    run_dir = tmp_path / "new" / "run"
    made = set_up(tiny_profile(), run_dir, tmp_path / "models", told.append)
    assert told == ["measuring this machine", "preparing llama", "preparing gpt2"]
    assert [path.name for path in run_dir.iterdir()] == ["machine.json"]
    opened = Bench.open(tiny_profile(), run_dir)
    assert (opened.models, opened.run.path) == (made.models, made.run.path)
    assert opened.machine == made.machine == FACTS
    assert all(files.folder.is_absolute() for files in opened.models.values())


def test_models_are_found_again_from_another_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_up(tiny_profile(), Path("run"), Path("models"), silent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = Bench.open(tiny_profile(), tmp_path / "run")
    assert (opened.models["llama"].folder / "model.safetensors").is_file()


def test_without_set_up_nothing_opens(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no set-up \(machine\.json\): run notebook 00_setup first"
    ):
        Bench.open(tiny_profile(), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"models": {"llama": {}}}'])
def test_a_broken_set_up_is_refused(tmp_path, content):
    (tmp_path / "machine.json").write_text(content)
    with pytest.raises(ConfigError, match="run notebook 00_setup again"):
        Bench.open(tiny_profile(), tmp_path)


def test_a_set_up_of_other_models_is_refused(tmp_path):
    set_up_in(tmp_path)
    with pytest.raises(ConfigError, match=r"\['other'\] in .*\['llama', 'gpt2'\]: run notebook 00"):
        Bench.open(tiny_profile({"other": entry(LLAMA)}), tmp_path / "run")


def test_a_failed_set_up_leaves_no_facts(tmp_path):
    broken = tiny_profile({"m": {"stands_for": "phi-2", "folder": "/no/such/folder"}})
    with pytest.raises(CheckpointError, match="does not exist"):
        set_up(broken, tmp_path / "run", tmp_path / "models", silent)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"can be written to, got .*file.*choose another folder"):
        set_up(tiny_profile(), tmp_path / "file" / "a" / "run", tmp_path / "models", silent)
    assert not (tmp_path / "models").exists()


def test_capacities_are_shares_of_all_weights_or_sizes():
    bench = bench_of({"a": 1000, "b": 3000}, capacities={"25": "25/31.3", "all": "1GiB"})
    assert bench.total_bytes == 4000
    assert bench.capacity_bytes("25") == 3195 and bench.capacity_bytes("all") == 1 << 30


def test_traces_are_written_over_the_models(tmp_path):
    bench = set_up_in(tmp_path)
    traces = bench.write_traces()
    assert list(traces) == ["zipf"] and read_trace(bench.run.trace("zipf")) == traces["zipf"]
    assert set(traces["zipf"].models) <= {"llama", "gpt2"}
