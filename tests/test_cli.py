"""The command line: every command and option of the paper's scripts has its equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import djinn_lib as dj
from djinn_lib import cli
from djinn_lib.cli import app
from djinn_lib.errors import ConfigError
from djinn_lib.experiment import comparison, paper_form
from djinn_lib.experiment.profile import load_profile
from djinn_lib.paths import REFERENCE
from djinn_lib.trace import paper_trace, write_trace


# What the paper's README calls, script by script.
def called(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_the_papers_trace_is_written_and_read_in_both_forms(tmp_path, ending):
    path = tmp_path / f"trace.{ending}"
    assert called("trace", "--n-agents", 30, "--output", path).exit_code == 0
    assert paper_form.load_trace(path).requests == paper_trace().requests


def test_options_of_another_kind_of_trace_are_refused(tmp_path):
    said = called("trace", "--output", tmp_path / "t.jsonl", "--rate", "3")
    assert said.exit_code == 2 and "add --kind zipf" in said.output
    assert not (tmp_path / "t.jsonl").exists()


def test_a_trace_replaces_a_file_only_when_asked(tmp_path):
    path = tmp_path / "new" / "trace.jsonl"
    first = called("trace", "--seed", 1, "--output", path)
    assert first.exit_code == 0
    before = path.read_bytes()
    second = called("trace", "--seed", 2, "--output", path)
    assert second.exit_code == 2 and "already exists" in second.output
    assert "--replace" in second.output and path.read_bytes() == before
    third = called("trace", "--seed", 2, "--output", path, "--replace")
    assert third.exit_code == 0
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a trace in the paper's form"),
        ("[]", "not a trace in the paper's form"),
        ('{"agents": []}', "one or more agents"),
        ('{"agents": [{"model": "m"}]}', "'arrival_time'"),
        ('{"agents": [{"model": "m", "arrival_time": "soon"}]}', "not a trace in the paper's form"),
        ('{"agents": [{"model": "m", "arrival_time": -1}]}', "a finite arrival time"),
    ],
)
def test_a_trace_that_is_none_is_refused_before_anything_runs(tmp_path, text, said):
    path = tmp_path / "trace.json"
    path.write_text(text)
    ended = called("run", "--output-dir", tmp_path / "out", "--config-file", "smoke",
                   "--baselines", "djinn", "--trace-file", path)  # fmt: skip
    assert ended.exit_code == 2 and said in ended.stderr
    assert not (tmp_path / "out" / "machine.json").exists()


def test_baselines_have_the_papers_names_or_ours():
    gpu = comparison.describe("gpu", [25], ["all"])
    assert list(gpu.systems) == list(paper_form.BASELINES.values())
    assert gpu.capacities == {"25": "25GiB"}
    smoke = comparison.describe("smoke", [25], ["all"])  # which lacks some of them
    assert list(smoke.systems) == ["djinn", "pytorch_pinned"]
    with pytest.raises(ConfigError, match="no baseline 'pytorch_pageable': choose from djinn, "):
        comparison.describe("smoke", [25], ["pytorch_pageable"])
    cpu = comparison.describe("cpu", [22.5, 25], ["vllm", "pytorch_lru"], "both", repeats=2)
    assert cpu.capacities == {"22.5": "22.5/31.3", "25": load_profile("cpu").capacities["25"]}
    assert [c.id for c in cpu.all_cells()][:2] == [
        "paper-22.5-vllm_recreate",
        "paper-22.5-pytorch_lru",
    ]
    assert {c.mode for c in cpu.all_cells()} == {"sequential", "concurrent"}
    assert {c.repeats for c in cpu.all_cells()} == {2}


@pytest.mark.parametrize("given", [{"baselines": ["nobody"]}, {"baselines": [" "]},
                                   {"buffers_gb": [0]}, {"buffers_gb": [float("nan")]},
                                   {"speed": 0.0, "mode": "concurrent"},
                                   {"speed": float("nan"), "mode": "concurrent"}, {"speed": 5.0},
                                   {"config": "nothing"}, {"config": "no/file.yml"}])  # fmt: skip
def test_options_without_a_meaning_are_refused(given):
    options = {"config": "smoke", "buffers_gb": [25], "baselines": ["djinn"], **given}
    with pytest.raises(ConfigError):
        comparison.describe(**options)
    with pytest.raises(ConfigError, match="no list of sizes"):
        comparison.parse_sizes("20,many")


def test_the_version_is_that_of_the_library():
    assert called("--version").output.split() == ["djinn", dj.__version__]
    assert "djinn reproduce" in called("--help").output


@pytest.mark.parametrize(("n_gpus", "profile"), [(0, "cpu"), (1, "gpu")])
def test_the_profile_is_that_of_the_machine(monkeypatch, n_gpus, profile):
    driver = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: n_gpus,
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert cli.default_config() == profile


def test_the_papers_configuration_names_models_of_the_hub(tmp_path):
    path = tmp_path / "multimodel_7b.yaml"
    models = {"llama-7b": {"model_id": "meta-llama/Llama-2-7b-hf", "size_gb": 14}}
    path.write_text(yaml.safe_dump({"models": models, "experiment": {"max_tokens": 20}}))
    profile = comparison.describe(str(path), [25], ["djinn"])
    assert profile.models["llama-7b"].hub_id == "meta-llama/Llama-2-7b-hf"
    assert profile.new_tokens == 20
    models["someone-else"] = {"model_id": "a/b"}
    path.write_text(yaml.safe_dump({"models": models}))
    with pytest.raises(ConfigError, match="no counterpart"):
        comparison.describe(str(path), [25], ["djinn"])


@pytest.mark.slow
def test_any_capacity_has_figures_and_requests_as_they_arrive_have_none(tmp_path):
    trace, out = tmp_path / "few.jsonl", tmp_path / "out"
    write_trace(paper_trace(n=4), trace)
    given = ("run", "--config-file", "smoke", "--baselines", "djinn", "--trace-file", trace)
    ended = called(*given, "--output-dir", out, "--buffer-gb", 22)
    assert ended.exit_code == 0, ended.output
    assert (out / "figures" / "latency_cdf.png").exists()
    page = (out / "index.html").read_text()
    assert "at capacity 22" in page and "No rows of" not in page
    other = tmp_path / "other"
    ended = called(*given, "--output-dir", other, "--mode", "concurrent", "--speed", 100)
    assert ended.exit_code == 0, ended.output
    assert "--mode both has both" in ended.output and not list(other.glob("figures/*"))


@pytest.mark.slow
def test_a_comparison_runs_through_the_notebooks_and_leaves_the_papers_files(tmp_path):
    trace, out = tmp_path / "few.jsonl", tmp_path / "out"
    write_trace(paper_trace(n=5), trace)
    arguments = ("run", "--output-dir", out, "--config-file", "smoke",
                 "--baselines", "djinn,pytorch_pinned", "--trace-file", trace)  # fmt: skip
    ended = called(*arguments)
    assert ended.exit_code == 0, ended.output
    summary = json.loads((out / "comparison_summary.json").read_text())
    assert {name: found["completed"] for name, found in summary.items()} == {
        "djinn_sequential": 5,
        "pytorch_pinned_sequential": 5,
    }
    result = json.loads((out / "djinn_sequential_results.json").read_text())
    assert [agent["agent_id"] for agent in result["results"]] == list(range(5))
    assert paper_form.load_trace(out / "trace_n5.json").requests
    assert (out / "notebooks" / "02_run_system.paper-25-djinn.ipynb").exists()
    assert Path(out / "figures" / "latency_cdf.png").exists()
    rows = out / "requests" / "paper-25-djinn.parquet"
    before = rows.stat().st_mtime_ns
    assert called(*arguments).exit_code == 0 and rows.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_figure_is_drawn_from_the_published_rows(tmp_path):
    before = sorted(REFERENCE.rglob("*"))
    ended = called("plot", "sensitivity", "--output", tmp_path / "drawn.png")
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(REFERENCE.rglob("*")) == before


def test_a_figure_without_rows_or_with_another_ending_is_refused(tmp_path):
    assert called("plot", "cdf", "--run-dir", tmp_path).exit_code == 2
    assert called("plot", "cdf", "--output", tmp_path / "drawn.gif").exit_code == 2
