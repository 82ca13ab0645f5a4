"""benchmarks/engine.py goes through every step on a CPU, and judges its targets."""

import copy
import json
import sys

import pytest
from forked import run_script

from djinn_lib.paths import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

from engine_targets import targets

SCRIPT = REPO / "benchmarks" / "engine.py"
REFERENCE = json.loads((REPO / "data" / "reference" / "h100" / "engine.json").read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    done = run_script(
        SCRIPT, "--profile", "smoke", "--repeats", 2, "--models-dir", folder / "models",
        "--out", folder / "engine.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "share_of_link" in done.stdout
    manifest = json.loads((folder / "engine.manifest.json").read_text())
    assert manifest["parameters"]["repeats"] == "2" and manifest["weights_sha256"]
    return json.loads((folder / "engine.json").read_text())


@pytest.mark.slow
def test_every_case_is_measured(result):
    models = list(result["sizes"])
    cases = {(c["case"], c["model"]) for c in result["cases"]}
    for model in models:
        others = {f"after {m}" for m in models if m != model}
        single = {"hit", "load", "full miss, overlap on", "full miss, overlap off"}
        assert {case for case, m in cases if m == model} == single | others
    hits = [c for c in result["cases"] if c["case"] == "hit"]
    assert {c["decode"] for c in hits} == {"eager", "graph"}
    assert all(c["loaded_bytes"] == 0 for c in hits)
    assert all(c["tokens_like_first_way"] == c["new_tokens"] for c in hits)


@pytest.mark.slow
def test_bytes_are_those_of_the_models(result):
    for c in result["cases"]:
        if c["case"].startswith(("full miss", "load")):
            assert c["loaded_bytes"] == result["sizes"][c["model"]]
        elif c["case"].startswith("after"):
            assert c["loaded_bytes"] < result["sizes"][c["model"]]
    assert all(result["sizes"][m] < n for m, n in result["model_bytes"].items())  # less tables
    assert 0 <= result["host_master_bytes"] - sum(result["model_bytes"].values()) < 3 * 256
    assert [row["page_bytes"] for row in result["page_curve"]] == sorted(
        row["page_bytes"] for row in result["page_curve"]
    )


def test_targets_of_the_reference_follow_from_its_cases():
    assert REFERENCE["targets"] == targets(REFERENCE)
    names = " ".join(t["name"] for t in REFERENCE["targets"])
    for part in ("cost of the switch", "all weights", "TTFT beyond", "decode, batch 1", "HBM rate",
                 "generate(50)", "copied to the host", "device memory", "host memory"):  # fmt: skip
        assert part in names


def test_a_slower_engine_misses_its_targets():
    slower = copy.deepcopy(REFERENCE)
    slower["copied_bytes"]["d2h"] = 1
    for case in slower["cases"]:
        if case["case"] == "hit":
            case["ms_per_token"] *= 2
        elif case["case"] == "full miss, overlap on":
            case["ttft_ms"] += 20
    met = {t["name"]: t["met"] for t in targets(slower)}
    assert not met["bytes copied to the host by evictions"]
    assert not any(met[f"decode, batch 1, {m}"] for m in slower["sizes"])
    assert not any(met[f"full miss: TTFT beyond max(load, prefill), {m}"] for m in slower["sizes"])


def test_a_case_that_is_missing_is_named():
    broken = copy.deepcopy(REFERENCE)
    broken["cases"] = [c for c in broken["cases"] if c["case"] != "load"]
    with pytest.raises(ValueError, match="case 'load' of 'llama-7b', got none"):
        targets(broken)


def test_an_unknown_profile_is_an_error_and_no_traceback():
    done = run_script(SCRIPT, "--profile", "no-such")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no profile") and "Traceback" not in done.stderr
