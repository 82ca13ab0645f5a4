"""benchmarks/neighbours.py measures each lane alone and beside the others."""

import json
import sys

import pandas as pd
import pytest
from forked import run_script

from djinn_lib.paths import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import neighbours

SCRIPT = REPO / "benchmarks" / "neighbours.py"


@pytest.mark.slow
def test_two_lanes_on_a_cpu(tmp_path):
    done = run_script(SCRIPT, "--device", "cpu", "--rounds", 1, "--out", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["lane"], row["beside"]) for row in rows] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(row["link_rate_bytes_per_s"] > 1e8 for row in rows)
    assert all(row["eager_operator_us"] > 0 for row in rows)
    assert "beside the others" in done.stdout


def test_the_summary_compares_medians():
    rows = pd.DataFrame(
        {
            "lane": [0, 0, 0, 0],
            "beside": [0, 0, 0, 1],
            "link_rate_bytes_per_s": [10.0, 20.0, 90.0, 15.0],
            "hbm_rate_bytes_per_s": [None] * 4,
        }
    )
    (row,) = neighbours.summary(rows).to_dict("records")
    assert (row["alone"], row["beside the others"], row["ratio"]) == (20.0, 15.0, 0.75)


def test_more_lanes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(neighbours.nvml, "n_gpus", lambda: 1)
    with pytest.raises(SystemExit):
        neighbours.main(["--lanes", "2"])
    assert "2 lanes need as many GPUs, and there are 1" in capsys.readouterr().err
