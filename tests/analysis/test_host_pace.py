"""How steady decoding is, and what the host did meanwhile: sentences made of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_factory import GPU_MACHINE, on_another_machine, write_run

from djinn_lib.analysis.evidence import NotMeasured
from djinn_lib.analysis.explanations import explanations, pace
from djinn_lib.analysis.host_pace import _correlation, rows_of_one_machine, rows_with_pace, told
from djinn_lib.analysis.run import Run, load_run, published


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("gpu"), gpu=True))


def with_noted(run: Run, **fields: Any) -> Run:
    """The run with fields of every manifest set."""
    return replace(run, manifests={cell: {**m, **fields} for cell, m in run.manifests.items()})


def eager_rows(run: Run) -> pd.DataFrame:
    rows = run.cells("paper", "25")
    return rows[rows["ok"] & ~rows["system"].isin(run.other_steps)]


def test_the_fastest_and_the_slowest_decode_of_a_model_are_told(gpu: Run):
    rows = gpu.rows.copy()
    of_lru = (rows["system"] == "pytorch_lru") & (rows["capacity_label"] == "25")
    slowest = rows[of_lru & (rows["model"] == "mistral-mini")].index[3]
    rows.loc[slowest, "decode_ms"] = 9_870.0
    run = replace(gpu, rows=rows)
    said = told(run)
    assert "On one machine requests for mistral-mini" in said and "to 9.87 s to decode" in said
    assert f"of {eager_rows(run)['system'].nunique()} systems" in said
    assert said in pace(run, published()) and said in explanations(run, published())


def test_the_same_kernels_without_the_host_are_told_where_they_were_run(gpu: Run):
    graph = gpu.cells("paper", "25").query("system == 'djinn_graph' and model == 'phi-mini'")
    eager = eager_rows(gpu)
    rows = gpu.rows.copy()
    slowest = eager[eager["model"] == "phi-mini"].index[0]
    rows.loc[slowest, "decode_ms"] = 9_870.0
    said = told(replace(gpu, rows=rows))
    assert f"decodes phi-mini in {graph['decode_ms'].median():,.0f} ms (`djinn_graph`)" in said
    rows = gpu.rows[gpu.rows["system"] != "djinn_graph"]
    assert "djinn_graph" not in told(replace(gpu, rows=rows))


def test_the_baseline_is_given_its_fastest_decode(gpu: Run):
    eager = eager_rows(gpu)
    pinned, fastest = eager.query("system == 'pytorch_pinned'"), eager.groupby("model")["decode_ms"]
    at_best = pinned["total_ms"] - pinned["decode_ms"] + pinned["model"].map(fastest.min())
    djinn = gpu.cells("paper", "25").query("system == 'djinn'")["total_ms"].median()
    ratio = at_best.median() / djinn
    assert f"its median would be {at_best.median():,.0f} ms, {ratio:.1f}x that of Djinn" in told(
        gpu
    )


def test_rows_are_those_of_the_machine_with_most_eager_systems(gpu: Run):
    assert "machine 1" not in told(gpu)
    moved = on_another_machine(gpu, "djinn")
    rows = rows_of_one_machine(moved)  # the replicate of djinn ran beside all others
    assert set(rows.query("system == 'djinn'")["run_id"]) == {"paper-25-djinn-test"}
    assert "On machine 1 requests" in told(moved)
    named = replace(moved, listed_machines=[{"part": "Monday/A", "machine": GPU_MACHINE}])
    assert "On machine Monday/A requests" in told(named)
    forgotten = replace(moved, replicates=gpu.rows.iloc[:0], replicate_manifests={})
    with pytest.raises(NotMeasured, match="no machine ran both"):
        rows_of_one_machine(forgotten)


def test_graphs_alone_tell_nothing(gpu: Run):
    rows = gpu.rows[gpu.rows["system"].isin(["djinn", "vllm_sleep"])]
    with pytest.raises(NotMeasured, match="no machine ran both"):
        told(replace(gpu, rows=rows))


def test_a_loop_on_the_host_is_set_beside_the_decode_that_followed(gpu: Run):
    assert rows_with_pace(gpu).empty and "loop" not in told(gpu)  # none was timed
    factor = pd.Series(np.random.default_rng(1).uniform(1, 3, 30))
    factor[[0, 1, 3]] = 1.0  # each model once at its best
    rows = gpu.rows.copy()
    eager = ~rows["system"].isin(gpu.other_steps)
    rows.loc[eager, "decode_ms"] = 100.0 * rows.loc[eager, "request"].map(factor)
    run = with_noted(replace(gpu, rows=rows), host_loop_us=[list(200.0 * factor)])
    said = told(run)
    here = ~rows["system"].isin(gpu.other_processes)  # where the loop was timed
    assert {"ray_actors", "vllm_sleep"} <= gpu.other_processes
    loop = rows.loc[rows["ok"] & here & (rows["mode"] == "sequential"), "request"].map(factor)
    assert f"took {loop.median():.2f}x its best in the median" in said
    assert f"{loop.quantile(0.99):.1f}x or more in one of a hundred" in said
    slow = int((loop[eager[loop.index]] > 1.5).sum())  # and their decodes, by the same factor
    assert f"before {slow / eager[loop.index].sum():.0%} of all" in said
    assert f"and before 100% of the {slow} that took more than 1.5x" in said
    steady = rows.assign(decode_ms=100.0 + rows["request"])
    assert "more than 1.5x" not in told(replace(run, rows=steady))
    assert "is 1.00 where that was eager" in said
    own = rows[(rows["system"] == "djinn") & rows["ok"]]
    longest = (own["decode_ms"] / own.groupby("model")["decode_ms"].transform("min")).max()
    assert f"None of Djinn's {len(own)} decodes took more than {longest:.2f}x the fastest." in said
    djinn = rows_with_pace(run).query("system == 'djinn' and capacity_label == '25'")
    assert list(djinn.sort_values("request")["host_loop_us"]) == list(200.0 * factor)
    shorter = with_noted(run, host_loop_us=[[1.0, 2.0]])  # of a cell that died
    assert rows_with_pace(shorter)["request"].max() == 1


def test_the_pace_is_compared_within_cells_and_models(gpu: Run):
    run = with_noted(gpu, host_loop_us=[[100.0 + i for i in range(30)]])
    rows = rows_with_pace(run)
    # In each cell and model the later decodes are the longer ones; a slower cell has the best loop.
    factor = rows["system"].map({name: i for i, name in enumerate(sorted(set(rows["system"])))})
    rows = rows.assign(longer=rows["request"] + 100.0 * factor)
    rows["slower"] = rows["request"] - 100.0 * factor
    assert _correlation(rows) == pytest.approx(1)
    assert rows["slower"].corr(rows["longer"], method="spearman") < 0


def test_the_first_request_of_a_new_process_is_told_apart(gpu: Run):
    rows = gpu.rows.copy()
    ray = rows["system"] == "ray_actors"
    rows.loc[ray, "decode_ms"] = (
        rows.loc[ray, "loaded_bytes"].gt(0).map({True: 900.0, False: 300.0})
    )
    said = told(replace(gpu, rows=rows))
    assert "their first request decodes in 900 ms in the median, 3.0x those after it." in said
    assert "Ray" not in told(replace(gpu, rows=rows[~ray]))
    always = rows.assign(loaded_bytes=rows["loaded_bytes"].mask(ray, 1))
    assert "Ray" not in told(replace(gpu, rows=always))


def test_each_machine_has_a_best_of_its_own(gpu: Run):
    slow = {**gpu.manifests["paper-25-pytorch_lru"]["machine"], "eager_operator_us": 9.0}
    run = with_noted(gpu, host_loop_us=[[100.0] * 30])
    lru = {**run.manifests["paper-25-pytorch_lru"], "machine": slow, "host_loop_us": [[300.0] * 30]}
    rows = rows_with_pace(replace(run, manifests={**run.manifests, "paper-25-pytorch_lru": lru}))
    assert set(rows["slower"]) == {1.0} and set(rows["host_loop_us"]) == {100.0, 300.0}
    assert rows.groupby(["machine", "eager", "model"])["longer"].min().eq(1.0).all()


def test_stolen_time_is_told_if_there_was_any(gpu: Run):
    for share in (None, 0.0):
        assert "hypervisor" not in told(with_noted(gpu, stolen_share=share))
    assert "gave less than 0.1% of" in told(with_noted(gpu, stolen_share=0.0004))
    assert "gave 12.5% to 12.5%" in told(with_noted(gpu, stolen_share=0.125))
