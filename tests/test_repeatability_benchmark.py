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
    assert [row["variant"] for row in found["rows"]] == ["as it is", "without graphs"]
    assert all(row["repeats that differ"] == 0 and row["of"] == 2 for row in found["rows"])


def test_the_module_that_differs_is_named(monkeypatch):
    class Unsteady(repeatability.ModelSpec):
        def build(self, device="cpu"):
            model = super().build(device)
            model.model.layers[1].mlp.register_forward_hook(
                lambda _m, _a, output: output * (1 + torch.rand(()) * (output.shape[1] == 1))
            )
            return model

    monkeypatch.setattr(repeatability, "ModelSpec", Unsteady)
    monkeypatch.setattr(reference.References, "ensure_alike", lambda *_: None)
    options = argparse.Namespace(
        one="as it is", shape="tiny", layers=2, dtype="float32", tokens=4, repeats=3
    )
    assert repeatability.measured(options) == {
        "repeats that differ": 2, "of": 2, "in the prefill": 0,
        "first difference": "step 1: model.layers.1.mlp",
    }  # fmt: skip
