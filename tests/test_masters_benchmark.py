"""benchmarks/masters.py goes through every step on a CPU."""

import json

import pytest
from forked import run_script

from djinn_lib.paths import REPO


@pytest.mark.slow
def test_every_case_is_measured(tmp_path):
    script = REPO / "benchmarks" / "masters.py"
    done = run_script(
        script, "--profile", "smoke", "--repeats", 1, "--models", "llama-tiny", "phi-tiny",
        "--dtypes", "bfloat16",
        "--models-dir", tmp_path / "models", "--out", tmp_path / "masters.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "masters.json").read_text())
    cases = {(row["dtype"], row["model"], row["form"]): row for row in result["rows"]}
    assert len(cases) == 4 and (tmp_path / "masters.pdf").exists()
    for (dtype, model, form), row in cases.items():
        assert row["load_ms"] > 0 and row["ms_per_token_beside"] > 0, (dtype, model, form)
        assert (row["share"] < 0.95) == (form == "compressed")
    unknown = run_script(script, "--profile", "smoke", "--models", "x")
    assert unknown.returncode == 2 and "choose --models out of" in unknown.stderr
