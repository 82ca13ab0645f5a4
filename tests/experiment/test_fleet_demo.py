"""The demonstration of the fleet: with a stand-in for vLLM, and where there is no vLLM."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import weights_of
from rings import fork_children

from djinn_lib.analysis.plots.style import save_figure
from djinn_lib.analysis.plots.timeline import requests_and_ring
from djinn_lib.errors import ConfigError
from djinn_lib.experiment import fleet_demo
from djinn_lib.fleet import fleet as fleet_module

SUPPORT = Path(__file__).parents[1] / "support"
N_BYTES = 1 << 20


@pytest.fixture
def bench(tmp_path):
    models = {}
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        config = {"model_type": "llama", "vocab_size": 200}
        (folder / "config.json").write_text(json.dumps(config))
        models[name] = SimpleNamespace(n_bytes=N_BYTES, folder=folder, dtype="float32")
    profile = SimpleNamespace(page="64KiB", device="cpu", prompt_tokens=5)
    return SimpleNamespace(
        models=models, profile=profile, total_bytes=2 * N_BYTES, run_dir=tmp_path
    )


def test_without_vllm_it_says_so_and_draws_that(bench, monkeypatch):
    monkeypatch.setattr(fleet_demo.environment, "unavailable", lambda: "vLLM is not installed")
    run = fleet_demo.measure(bench, 0.6, 2, 3)
    assert run.reason == "vLLM is not installed" and run.tokens().empty
    said = json.loads((bench.run_dir / fleet_demo.FILE).read_text())
    assert (said["state"], said["reason"]) == ("unavailable", run.reason)
    figure = requests_and_ring(run.requests, run.residency, run.capacity_bytes, run.reason)
    (axes,) = figure.axes
    assert "vLLM is not installed" in axes.texts[0].get_text()
    assert save_figure(figure, bench.run_dir / "figures", "fleet") == ()  # no empty chart is kept


@pytest.mark.slow
def test_all_models_are_asked_at_once_and_compared_with_plain_vllm(bench, monkeypatch):
    fork_children(monkeypatch)
    paths = [str(SUPPORT), str(SUPPORT / "fake_vllm")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for module in (fleet_demo.environment, fleet_module):
        monkeypatch.setattr(module, "vllm_python", lambda *python: Path(sys.executable))
    monkeypatch.setattr(fleet_demo.environment, "unavailable", lambda: None)

    def options(bench, name, n_tokens):
        return {"max_model_len": 64, "served_model_name": [name]}

    monkeypatch.setattr(fleet_demo, "_options", options)
    run = fleet_demo.measure(bench, 0.7, 3, 4)
    assert run.reason is None and len(run.requests) == 6
    tokens = run.tokens()
    assert list(tokens.equal_to_plain_vllm) == [3, 3]
    ids = run.requests.iloc[0].ids
    assert len(ids) == 4 and set(ids) <= set(weights_of("a", N_BYTES).tolist())
    assert (run.requests.begin_s <= run.requests.first_s).all()
    assert set(run.stats.model) == {"a", "b"}
    assert run.residency.resident_bytes.max() <= N_BYTES
    said = json.loads((bench.run_dir / fleet_demo.FILE).read_text())
    assert said["state"] == "ok" and said["capacity_bytes"] == run.capacity_bytes
    figure = requests_and_ring(run.requests, run.residency, run.capacity_bytes)
    assert len(figure.axes) == 2


@pytest.mark.parametrize("n_requests, n_tokens", [(0, 1), (1, 0)])
def test_nothing_to_ask(bench, n_requests, n_tokens):
    with pytest.raises(ConfigError, match="at least"):
        fleet_demo.measure(bench, 0.6, n_requests, n_tokens)
