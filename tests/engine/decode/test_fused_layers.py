"""Hand-written kernels against transformers' own layers, in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

from djinn_lib.paths import REPO

pytestmark = pytest.mark.slow  # the interpreter takes a minute

LAYERS = ["llama-biased-attention", "llama-dynamic", "mistral-sliding", "qwen2-tied", "phi"]
ONE_LAYER = ["mistral", "qwen2", "phi"]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, REPO / "tests" / "support" / "interpreted.py"],
        env={**os.environ, "PYTHONPATH": str(REPO), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_transformers(found, name):
    case = found[f"layers {name} float32"]
    assert case["distance"] < 2e-6 and case["differs"]  # other kernels, rounding elsewhere
    assert case["itself_again"]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_wide_layers(found, name):
    case = found[f"layers {name} row by row"]
    assert case["distance"] < 2e-6 and case["differs"]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_layers_in_half_precision(found, name):
    assert found[f"layers {name} float16"]["distance"] < 5e-3


@pytest.mark.parametrize("name", ["16", "20 grouped"])
def test_attention_looks_at_what_the_mask_allows_only(found, name):
    assert found[f"attention {name}"]["distance"] < 1e-6


@pytest.mark.parametrize(
    "name, said",
    [("gpt2", "decoder layers out of"), ("phi-normed-queries", "queries and keys without a norm"),
     ("llama-biased-mlp", "gated network without biases"), ("llama-relu", "activation out of"),
     ("too-wide", "at most 32 weights")],
)  # fmt: skip
def test_other_layers_are_refused(found, name, said):
    assert said in found[f"refused {name}"]["said"]


def test_a_decoder_uses_them_where_it_can(found):
    assert found["decoder"] == {"way": "fused layers", "mode": "compiled", "alike": True}


def test_a_decoder_does_not_use_what_computes_something_else(found):
    assert found["decoder broken"] == {"way": "plain", "mode": "graph", "alike": True}
