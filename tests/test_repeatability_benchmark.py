"""benchmarks/repeatability.py goes through on a CPU, and finds what does not repeat itself."""

import argparse
import json
import sys

import pytest
import torch
from forked import run_script

from djinn_lib.engine.decode import reference
from djinn_lib.paths import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import repeatability

SCRIPT = REPO / "benchmarks" / "repeatability.py"


@pytest.mark.slow
def test_on_a_cpu_everything_repeats(tmp_path):
    done = run_script(SCRIPT, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["variant"] for row in found["rows"]] == [
        "as it is",
        "not recorded",
        "as it is, watched",
    ]
    assert all(row["repeats that differ"] == 0 and row["of"] == 2 for row in found["rows"])


@pytest.fixture
def unsteady(monkeypatch):
    """A model whose second layer gives another output at every step of one token."""

    class Unsteady(repeatability.ModelSpec):
        def build(self, device="cpu"):
            model = super().build(device)
            model.model.layers[1].mlp.register_forward_hook(
                lambda _m, _a, output: output * (1 + torch.rand(()) * (output.shape[1] == 1))
            )
            return model

    monkeypatch.setattr(repeatability, "ModelSpec", Unsteady)
    monkeypatch.setattr(reference.References, "ensure_alike", lambda *_: 0.0)


def rows_of(*variants):
    options = argparse.Namespace(
        variants=variants, shape="tiny", layers=2, dtype="float32", tokens=4, repeats=3
    )
    return {row.pop("variant"): row for row in repeatability.measured(options)}


def test_what_differs_is_found_and_the_module_named(unsteady):
    rows = rows_of("as it is", "as it is, watched", "a recording for each layer")
    differs = {"repeats that differ": 2, "of": 2, "in the prefill": 0}
    assert rows == {
        "as it is": {**differs, "first difference": "step 1: logits"},
        "as it is, watched": {**differs, "first difference": "step 1: model.layers.1.mlp"},
        "a recording for each layer": {**differs, "first difference": "step 1: logits"},
    }


def test_a_variant_that_cannot_run_is_a_row(monkeypatch, tmp_path):
    broken = repeatability.Variant(around=lambda: 1 / 0)
    monkeypatch.setitem(repeatability.VARIANTS, "no split-K", broken)
    rows = rows_of("no split-K", "as it is")
    assert rows["no split-K"] == {"error": "ZeroDivisionError: division by zero"}
    assert rows["as it is"]["repeats that differ"] == 0
    options = argparse.Namespace(variants=["as it is", "no split-K"], shape="tiny", layers=2,
                                 dtype="float3", tokens=4, repeats=3)  # fmt: skip
    dead = list(repeatability.in_processes(options))
    assert [row["variant"] for row in dead] == ["as it is", "no split-K"]
    assert all("its process ended with status 1" in row["error"] for row in dead)
