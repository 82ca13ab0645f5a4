"""benchmarks/masters.py goes through every step on a CPU."""

import json
import subprocess
import sys

import pytest

from djinn_lib.paths import REPO


@pytest.mark.slow
def test_every_case_is_measured(tmp_path):
    done = subprocess.run(
        [sys.executable, REPO / "benchmarks" / "masters.py", "--profile", "smoke", "--repeats", "1",
         "--models", "llama-tiny", "phi-tiny", "--models-dir", tmp_path / "models",
         "--out", tmp_path / "masters.json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "masters.json").read_text())
    cases = {(row["dtype"], row["model"], row["form"]): row for row in result["rows"]}
    assert len(cases) == 8 and (tmp_path / "masters.pdf").exists()
    for (dtype, model, form), row in cases.items():
        assert row["load_ms"] > 0 and row["ms_per_token_beside"] > 0, (dtype, model, form)
        assert (row["share"] < 0.95) == (form == "compressed")
    unknown = subprocess.run(
        [sys.executable, REPO / "benchmarks" / "masters.py", "--profile", "smoke", "--models", "x"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert unknown.returncode == 2 and "choose --models out of" in unknown.stderr
