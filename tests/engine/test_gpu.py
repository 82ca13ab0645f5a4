"""The CUDA backend; every scenario in a process of its own. Skipped without a GPU."""

import os
import subprocess
import sys

import pytest

from djinn_lib.paths import REPO

SCENARIOS = [
    ["address_space"],
    ["time_to_first_token_counts_the_wait"],
    ["map_does_not_stall"],
    ["map_from_a_new_thread"],
    ["switches", "3", "1000"],
    ["switches", "12", "1000"],
    ["switches", "3", "1000", "graph"],
    ["switches", "12", "1000", "graph"],
    ["switches", "3", "200", "compiled"],
    ["prefill_follows_the_copy"],
    ["sampled_tokens"],
    ["decode_attention"],
    ["faster_steps"],
    ["tables_in_the_host"],
    ["failed_recordings"],
    ["nothing_leaks"],
    ["graph_after_remapping"],
    ["device_contract"],
    ["positions"],
    ["too_much"],
]
SERVING = [
    ["many_at_once"],
    ["larger_than_the_ring"],
    ["blocks_that_layers_share"],
    ["masters_on_disk"],
    ["whole_models_at_fixed_addresses"],
]
LEASES = [["lent_weights"], ["written_weights"], ["lent_layers"], ["collected_objects"]]
COMPRESSED = [
    ["decoded_pages"],
    ["decoding_keeps_up_with_the_link"],
    ["loads_are_faster_than_the_link"],
    ["damage_is_named"],
]


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["plain", "compressed"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids="-".join)
def test_on_a_gpu(scenario, masters):
    assert f"{scenario[0]}: ok" in run("gpu_scenarios.py", scenario, masters)


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["plain", "compressed"])
@pytest.mark.parametrize("scenario", SERVING, ids="-".join)
def test_serving_on_a_gpu(scenario, masters):
    assert f"{scenario[0]}: ok" in run("gpu_serving.py", scenario, masters)


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["plain", "compressed"])
@pytest.mark.parametrize("scenario", LEASES, ids="-".join)
def test_leases_on_a_gpu(scenario, masters):
    assert f"{scenario[0]}: ok" in run("gpu_leases.py", scenario, masters)


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", COMPRESSED, ids="-".join)
def test_compressed_masters_on_a_gpu(scenario):
    assert f"{scenario[0]}: ok" in run("gpu_compressed.py", scenario)


def run(script, scenario, masters="plain"):
    done = subprocess.run(
        [sys.executable, REPO / "tests" / "support" / script, *scenario],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPO}:{os.environ.get('PYTHONPATH', '')}",
            "DJINN_TEST_MASTERS": masters,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
