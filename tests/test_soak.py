"""benchmarks/soak.py finds what it looks for, in a few hundred requests."""

import json
import sys

from djinn_lib.paths import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import pytest
import soak
from forked import run_script


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    out = tmp_path / "soak.json"
    done = run_script(
        REPO / "benchmarks" / "soak.py", "--device", "cpu", "--requests", 300, "--models", 6,
        "--cancelled", 0.1, "--out", out,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert done.returncode == 0 or not result["flat"], done.stdout + done.stderr
    assert set(result["outcomes"]) == {"ok", "cancelled"} and not result["errors"]
    assert sum(result["outcomes"].values()) == 300
    assert result["loaded_bytes"] > sum(result["models"].values())  # models came and went
    assert 0 < result["prefetched_bytes"] <= result["loaded_bytes"]
    assert result["growth"]["fds"] <= 2


def test_growth_is_seen():
    def samples(rss_of):
        return [{"request": i, "rss_bytes": rss_of(i), "fds": 20, "threads": 30} for i in range(50)]

    assert soak.judge(samples(lambda i: 1e9 + (i < 5) * -5e8))[1]
    growth, flat = soak.judge(samples(lambda i: 1e9 + i * 2e6))
    assert not flat and growth["rss_bytes"] > 5e7
    leaking = [{**s, "fds": 20 + i} for i, s in enumerate(samples(lambda i: 1e9))]
    assert not soak.judge(leaking)[1]


def test_a_wrong_token_is_counted():
    tally = soak.Tally()
    generation = type("G", (), {"total_ms": 1.0, "loaded_bytes": 0, "prefetched_bytes": 0})()
    tally.served(generation, as_expected=False)
    assert tally.outcomes == {"mismatched": 1}
