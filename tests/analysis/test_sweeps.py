"""Tables of a sweep over capacities."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from row_factory import CAPACITIES, cell_rows, run_rows
from run_factory import on_another_machine, run_of

from djinn_lib.analysis.plots.sensitivity import sensitivity
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import sweep, usual_baseline
from djinn_lib.analysis.sweeps import speedup_table, sweep_table
from djinn_lib.rows import no_rows


def test_speedup_is_a_ratio_of_medians_inside_its_interval():
    rows = run_rows()
    table = speedup_table(rows, "pytorch_pinned")
    cells = dict(iter(rows[rows["ok"]].groupby(["capacity_label", "system"])))
    for row in table.itertuples():
        slow, fast = (cells[row.capacity_label, name] for name in ("pytorch_pinned", row.system))
        totals = [part.set_index("request")["total_ms"] for part in (slow, fast)]
        both = totals[0].index.intersection(
            totals[1].index
        )  # requests that one failed are left out
        ratio = totals[0].loc[both].median() / totals[1].loc[both].median()
        assert (row.speedup, row.n) == (pytest.approx(ratio), len(both))
        assert row.low <= row.speedup <= row.high
        before = [(part["total_ms"] - part["decode_ms"]).mean() for part in (slow, fast)]
        assert row.without_decoding == pytest.approx(before[0] / before[1])
    assert set(table[table["system"] == "djinn"]["capacity_label"]) == set(CAPACITIES)


def test_the_sweep_has_every_capacity_of_the_systems_swept(gpu: Run):
    table = sweep_table(gpu)
    assert len(table) == 3 * len(CAPACITIES) and "machine" not in table
    djinn = table.xs("Djinn", level="system")
    assert djinn["bytes / optimum (x)"].between(1, 1.25).all()
    assert (djinn["could load nothing (%)"] == 90).all()  # three models in thirty requests
    assert (djinn["loaded nothing (%)"] <= djinn["could load nothing (%)"]).all()
    assert list(djinn.index) == [f"{CAPACITIES[label] / 2**30:.4g}" for label in CAPACITIES]
    pinned = table.xs("PyTorch pinned", level="system")
    assert pinned["speed-up of the P50 (x)"].isna().all()
    fast, slow = cell_rows("djinn", "40"), cell_rows("pytorch_pinned", "40")
    ratio = slow["total_ms"].median() / fast["total_ms"].median()
    assert djinn["speed-up of the P50 (x)"].iloc[-1] == pytest.approx(ratio)


def test_the_sweep_compares_with_pytorch_pinned_or_else_with_the_slowest(gpu: Run, cpu: Run):
    assert usual_baseline(gpu) == usual_baseline(cpu) == "pytorch_pinned"
    few = [cell_rows("djinn", "20"), cell_rows("djinn", "40"), cell_rows("pytorch_lru", "20")]
    assert usual_baseline(run_of(pd.concat(few))) == "djinn"  # at most capacities
    other = run_of(pd.concat([*few, cell_rows("pytorch_lru", "40")]))
    assert usual_baseline(other) == "pytorch_lru"
    rows = sweep(other, baseline="pytorch_lru")
    assert len(sensitivity(rows, "pytorch_lru").axes) == 3
    assert usual_baseline(run_of(cell_rows("vllm_sleep"))) == "vllm_sleep"  # it could not run


def test_the_sweep_tells_machines_apart(gpu: Run):
    again = on_another_machine(gpu, "djinn")
    table = sweep_table(replace(again, replicates=no_rows(), replicate_manifests={}))
    places = table["machine"].unstack()
    differs = places["Djinn"] != places["PyTorch pinned"]
    assert list(differs[differs].index) == [f"{CAPACITIES['25'] / 2**30:.4g}"]
    speedups = table["speed-up of the P50 (x)"].xs("Djinn", level="system")
    assert list(speedups[speedups.isna()].index) == list(differs[differs].index)
