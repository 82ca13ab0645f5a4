"""How steady decoding is, and what the host did meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import on_another_machine, run_of

from djinn_lib.analysis import host_pace
from djinn_lib.analysis.host_pace import (
    decode_table,
    loop_table,
    one_pace_table,
    rows_of_one_machine,
    rows_with_pace,
)
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import CPU_CLOCKS, NotMeasured
from djinn_lib.metrics import ratio_interval


def with_noted(run: Run, **fields: Any) -> Run:
    """The run with fields of every manifest set."""
    return replace(run, manifests={cell: {**m, **fields} for cell, m in run.manifests.items()})


def test_decodes_are_those_of_the_model_with_the_slowest_one(gpu: Run):
    rows = gpu.rows.copy()
    of_lru = (rows["system"] == "pytorch_lru") & (rows["capacity_label"] == "25")
    slowest = rows[of_lru & (rows["model"] == "mistral-mini")].index[3]
    rows.loc[slowest, "decode_ms"] = 9_870.0
    table = decode_table(replace(gpu, rows=rows))
    assert table.index.name == "requests for mistral-mini"
    assert table.loc["PyTorch LRU", "slowest (ms)"] == 9_870.0
    graph = gpu.cells("paper", "25").query("system == 'djinn' and model == 'mistral-mini'")
    assert table.loc["Djinn", "median (ms)"] == graph["decode_ms"].median()
    assert (
        table.loc["Djinn", "requests"] == len(graph)
        and not table.loc["Djinn", "transformers' steps"]
    )


def test_the_first_request_of_a_new_process_is_shown_apart(gpu: Run):
    rows = gpu.rows.copy()
    ray = rows["system"] == "ray_actors"
    loads = rows.loc[ray, "loaded_bytes"] > 0
    rows.loc[ray, "decode_ms"] = loads.map({True: 9000.0, False: 3000.0})
    line = decode_table(replace(gpu, rows=rows)).loc["Ray actors"]
    assert line["after a load, median (ms)"] == 9000.0
    assert line["otherwise, median (ms)"] == 3000.0


def test_the_baseline_is_given_its_fastest_decode(gpu: Run):
    rows = gpu.cells("paper", "25")
    eager = rows[rows["ok"] & ~rows["system"].isin(gpu.other_steps)]
    pinned, fastest = eager.query("system == 'pytorch_pinned'"), eager.groupby("model")["decode_ms"]
    at_best = pinned["total_ms"] - pinned["decode_ms"] + pinned["model"].map(fastest.min())
    table = decode_table(gpu)["P50 at best (ms)"]
    assert table["PyTorch pinned"] == at_best.median() and np.isnan(table["Djinn"])


def test_rows_are_those_of_the_machine_with_most_eager_systems(gpu: Run):
    moved = on_another_machine(gpu, "djinn")
    rows = rows_of_one_machine(moved)  # the replicate of djinn ran with all others
    assert set(rows.query("system == 'djinn'")["run_id"]) == {"paper-25-djinn-test"}
    forgotten = replace(moved, replicates=gpu.rows.iloc[:0], replicate_manifests={})
    with pytest.raises(NotMeasured, match="no machine ran both"):
        rows_of_one_machine(forgotten)
    assert "no machine ran both" in decode_table(forgotten)["not measured because"].iloc[0]


def test_without_clocks_nothing_is_compared(cpu: Run):
    for table in (decode_table(cpu), loop_table(cpu), one_pace_table(cpu)):
        assert table["not measured because"].tolist() == [CPU_CLOCKS]


def test_on_each_machine_requests_are_taken_to_decode_equally_fast(gpu: Run):
    slower = {"decode_ms": lambda ms: 2 * ms, "total_ms": lambda ms: ms + 1000}
    two = on_another_machine(on_another_machine(gpu, "djinn_eager", **slower), "pytorch_pinned")
    table = one_pace_table(two)
    assert table.index.tolist() == [("25", "1"), ("25", "2")]
    decodes = table["decode, Djinn, eager decode (ms)"]
    assert decodes.iloc[1] == pytest.approx(2 * decodes.iloc[0])
    assert table["decode (x)"].iloc[1] == pytest.approx(table["decode (x)"].iloc[0] / 2)
    by_system = gpu.cells("paper", "25").query("ok").groupby("system")
    pinned, eager = (by_system.get_group(name).groupby("request")[["total_ms", "decode_ms"]].mean()
                     for name in ("pytorch_pinned", "djinn_eager"))  # fmt: skip
    mean_ms = (pinned["decode_ms"] + eager["decode_ms"]) / 2
    totals = [part["total_ms"] - part["decode_ms"] + mean_ms for part in (pinned, eager)]
    line = table.loc[("25", "1")]
    assert line["P50, at the mean pace (x)"] == pytest.approx(
        totals[0].median() / totals[1].median()
    )
    pinned_ms, eager_ms = totals
    low_and_high = ratio_interval(pinned_ms, eager_ms, "p50")[1:]
    assert (line["low (x)"], line["high (x)"]) == pytest.approx(low_and_high) and line["n"] == 30
    own = gpu.cells("paper", "25").query("system in ('pytorch_pinned', 'djinn_eager') and ok")
    fastest = own.groupby("model")["decode_ms"].min()
    fast_ms = own.groupby("request")["model"].first().map(fastest)
    totals = [part["total_ms"] - part["decode_ms"] + fast_ms for part in (pinned, eager)]
    at_best = totals[0].median() / totals[1].median()
    assert line["P50, at the fastest pace (x)"] == pytest.approx(at_best)
    before = [(part["total_ms"] - part["decode_ms"]).mean() for part in (pinned, eager)]
    assert line["without decoding (x)"] == pytest.approx(before[0] / before[1])
    assert line["P50, as measured (x)"] == pytest.approx(
        pinned["total_ms"].median() / eager["total_ms"].median()
    )


def test_without_a_machine_that_ran_both_there_is_no_common_pace(gpu: Run):
    rows = gpu.rows[gpu.rows["system"] != "djinn_eager"]
    (reason,) = one_pace_table(replace(gpu, rows=rows))["not measured because"]
    assert reason == "no machine served a request with both pytorch_pinned and djinn_eager"


def pairs_at(label: str, n_bytes: int) -> list[pd.DataFrame]:
    cells = (cell_rows(name, gpu=True) for name in ("pytorch_pinned", "djinn_eager"))
    where = {"capacity_label": label, "capacity_bytes": n_bytes}
    return [rows.assign(**where, run_id=f"{rows['run_id'].iloc[0]}-{label}") for rows in cells]


def test_every_capacity_has_its_rows_in_order_of_their_bytes():
    rows = pd.concat([*pairs_at("100", 100 << 20), *pairs_at("25", 25 << 20)])
    assert one_pace_table(run_of(rows)).index.get_level_values("capacity").tolist() == ["25", "100"]


def test_only_requests_that_both_served_count_at_one_pace():
    pinned, eager = pairs_at("25", 25 << 20)
    model = pinned["model"].iloc[0]
    gone = pinned.assign(ok=pinned["model"] == model)
    times = [name for name in gone if name.endswith("_ms")]
    gone.loc[~gone["ok"], times] = np.nan
    table = one_pace_table(run_of(pd.concat([gone, eager])))
    few = pd.concat([pinned, eager]).query("model == @model")
    only = one_pace_table(run_of(few))
    pd.testing.assert_frame_equal(table, only)
    assert table["n"].tolist() == [gone["ok"].sum()]


def test_a_machine_that_served_nothing_leaves_the_others_in_the_table(gpu: Run):
    failed = on_another_machine(gpu, "pytorch_pinned", ok=lambda ok: ok & False)
    both = on_another_machine(failed, "djinn_eager")
    assert one_pace_table(both).equals(one_pace_table(gpu))


def test_a_loop_on_the_host_is_compared_with_the_decode_that_followed(gpu: Run):
    assert rows_with_pace(gpu).empty and "not measured because" in loop_table(gpu)
    factor = pd.Series(np.random.default_rng(1).uniform(1, 3, 30))
    factor[[0, 1, 3]] = 1.0  # each model once at its best
    rows = gpu.rows.copy()
    eager = ~rows["system"].isin(gpu.other_steps)
    rows.loc[eager, "decode_ms"] = 100.0 * rows.loc[eager, "request"].map(factor)
    run = with_noted(replace(gpu, rows=rows), host_loop_us=[list(200.0 * factor)])
    line = loop_table(run).loc["eager"]
    assert {"ray_actors", "vllm_sleep"} <= gpu.other_processes  # where no loop was timed
    here = rows["ok"] & eager & ~rows["system"].isin(gpu.other_processes)
    loop = rows.loc[here, "request"].map(factor)
    slow = loop > host_pace.SLOW  # and so are the decodes, by the same factor
    assert line["requests"] == len(loop) and line["slow decodes"] == slow.sum()
    assert line["loop / its best, median (x)"] == pytest.approx(loop.median())
    assert line["loop / its best, P99 (x)"] == pytest.approx(loop.quantile(0.99))
    assert line["slow loop before any decode (%)"] == pytest.approx(100 * slow.mean())
    assert line["slow loop before a slow decode (%)"] == 100
    assert line["correlation"] == pytest.approx(1)
    own = rows[(rows["system"] == "djinn") & rows["ok"]]
    longest = (own["decode_ms"] / own.groupby("model")["decode_ms"].transform("min")).max()
    djinn = loop_table(run).loc["Djinn"]
    assert djinn["decode / fastest, greatest (x)"] == pytest.approx(longest)
    shorter = with_noted(run, host_loop_us=[[1.0, 2.0]])  # of a cell that died
    assert rows_with_pace(shorter)["request"].max() == 1


def test_the_pace_is_compared_within_cells_and_models(gpu: Run, monkeypatch):
    run = with_noted(gpu, host_loop_us=[[100.0 + i for i in range(30)]])
    rows = rows_with_pace(run)
    # In each cell and model the later decodes are the longer ones; a slower cell has the best loop.
    factor = rows["system"].map({name: i for i, name in enumerate(sorted(set(rows["system"])))})
    rows = rows.assign(longer=rows["request"] + 100.0 * factor)
    rows["slower"] = rows["request"] - 100.0 * factor
    monkeypatch.setattr(host_pace, "rows_with_pace", lambda _: rows)
    assert loop_table(run).loc["eager", "correlation"] == pytest.approx(1)
    assert rows["slower"].corr(rows["longer"], method="spearman") < 0


def test_each_machine_has_a_best_of_its_own(gpu: Run):
    slow = {**gpu.manifests["paper-25-pytorch_lru"]["machine"], "eager_operator_us": 9.0}
    run = with_noted(gpu, host_loop_us=[[100.0] * 30])
    lru = {**run.manifests["paper-25-pytorch_lru"], "machine": slow, "host_loop_us": [[300.0] * 30]}
    rows = rows_with_pace(replace(run, manifests={**run.manifests, "paper-25-pytorch_lru": lru}))
    assert set(rows["slower"]) == {1.0} and set(rows["host_loop_us"]) == {100.0, 300.0}
    assert rows.groupby(["machine", "eager", "model"])["longer"].min().eq(1.0).all()
