"""Tables of a run, against numbers that the rows give."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import GPU_MACHINE, on_another_machine, run_of, write_large_rows

from djinn_lib.analysis.arriving import load_ratio_table, rates_table, waiting_table
from djinn_lib.analysis.results import (
    ablation_table,
    large_table,
    measures,
    replicates_table,
    systems_table,
)
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, usual_capacity
from djinn_lib.analysis.sweeps import sweep_table
from djinn_lib.metrics import later_touches
from djinn_lib.trace import paper_trace, zipf_trace


def with_machine(run: Run, system: str, **facts: float) -> Run:
    """The run as if another machine had served a system's main cell."""
    cell = f"paper-25-{system}"
    manifest = {**run.manifests[cell], "machine": {**GPU_MACHINE, **facts}}
    return replace(run, manifests={**run.manifests, cell: manifest})


def test_measures_are_those_of_the_rows():
    rows = pd.concat([cell_rows("vllm_recreate"), cell_rows("djinn", repeats=3)])
    table = measures(run_of(rows), rows)
    assert list(table.index) == ["djinn", "vllm_recreate"]  # the figures' order
    own, line = rows[rows["system"] == "djinn"], table.loc["djinn"]
    assert (line["requests"], line["served (%)"], line["repeats"]) == (30, 100, 3)
    totals = own.groupby("request")["total_ms"].mean()  # repeats are no requests
    assert line["P50 (ms)"] == totals.median() and line["P90 (ms)"] == totals.quantile(0.9)
    assert line["max (ms)"] == line["P99 (ms)"] == totals.max()
    assert line["without decoding (ms)"] == (own["total_ms"] - own["decode_ms"]).mean()
    assert line["loaded (GiB)"] == pytest.approx(own["loaded_bytes"].sum() / 3 / 2**30)
    assert line["loaded nothing (%)"] == 100 * (own["loaded_bytes"] == 0).mean()
    assert table.loc["vllm_recreate", "served (%)"] == pytest.approx(100 * 22 / 30)
    assert measures(run_of(rows), rows.iloc[:0]).empty


def test_the_link_share_is_what_the_bytes_need_of_the_switches(gpu: Run):
    pinned = cell_rows("pytorch_pinned", gpu=True)
    there = pinned["loaded_bytes"].mean() / GPU_MACHINE["link_rate_bytes_per_s"]
    back = pinned["writeback_bytes"].mean() / GPU_MACHINE["d2h_rate_bytes_per_s"]
    share = 1e5 * (there + back) / pinned["switch_ms"].mean()
    table = systems_table(gpu)
    assert table.loc["PyTorch pinned", "link share (%)"] == pytest.approx(share)
    assert "machine" not in table and "not run because" not in table  # they say nothing


def test_a_system_that_cannot_run_has_the_reason(cpu: Run):
    table = systems_table(cpu)
    assert table.loc["vLLM sleep", "not run because"].startswith("sleep mode needs CUDA")
    assert math.isnan(table.loc["vLLM sleep", "P50 (ms)"])
    assert table.loc["Djinn", "not run because"] == ""
    assert table["ceiling reached (%)"].isna().all()  # no rate of device memory


def test_a_run_in_which_nothing_could_run_has_tables_that_say_so():
    run = run_of(cell_rows("vllm_sleep"))
    assert systems_table(run)["not run because"].str.startswith("sleep mode").all()
    for table in (sweep_table(run), ablation_table(run)):
        assert list(table.columns) == ["not measured because"]
    assert replicates_table(run).empty and waiting_table(run).empty


def test_each_step_of_the_ablation_is_measured_against_the_one_before(gpu: Run):
    table = ablation_table(gpu)
    steps = ["djinn_whole", "djinn_partial_no_overlap", "djinn_eager", "djinn_graph",
             "djinn_compiled", "djinn"]  # fmt: skip
    assert list(table.index.get_level_values("system")) == steps
    means = table["mean (ms)"].to_numpy()
    assert math.isnan(table["mean saved (ms)"].iloc[0])
    assert table["mean saved (ms)"].iloc[1:].to_numpy() == pytest.approx(means[:-1] - means[1:])
    assert (table["low (ms)"] < table["mean saved (ms)"])[1:].all()
    assert "machine" not in table
    apart = ablation_table(with_machine(gpu, "djinn_eager", eager_operator_us=9.0))
    unknown = apart.index.get_level_values("system")[apart["mean saved (ms)"].isna()]
    assert list(unknown) == [
        "djinn_whole",
        "djinn_eager",
        "djinn_graph",
    ]  # no ratio across machines
    again = on_another_machine(gpu, "djinn", total_ms=lambda ms: ms + 100)
    last = ablation_table(again).iloc[-1]  # of the older measurement, beside the step before it
    assert last["mean saved (ms)"] == pytest.approx(table["mean saved (ms)"].iloc[-1])
    assert (last["saved on"], last["machine"]) == ("1", "2")


def test_cells_that_were_measured_again_stand_next_to_each_other(gpu: Run):
    assert replicates_table(gpu).empty
    faster = on_another_machine(
        gpu, "djinn", decode_ms=lambda ms: ms.mask(ms.index == ms.index[3], ms / 5)
    )
    table = replicates_table(faster)
    assert list(table.index) == ["paper-25-djinn"] * 2 and list(table["machine"]) == ["1", "2"]
    before, after = table["slowest / fastest decode (x)"]
    assert after > 4 > 2 > before > 1
    assert len(systems_table(faster)) == len(systems_table(gpu))  # of the run's own cells


def test_requests_that_wait_are_shown_with_those_that_do_not(gpu: Run):
    rows = cell_rows("djinn", repeats=2)
    start_s = rows.groupby("repeat")["total_ms"].cumsum().sub(rows["total_ms"]) / 1e3
    waiting = rows.assign(
        mode="concurrent", run_id="other", start_s=5.0 + start_s, queue_ms=7.0,
        total_ms=rows["total_ms"] + 7.0, switch_ms=rows["switch_ms"] / 100,
    )  # fmt: skip
    unfair = cell_rows("vllm_sleep", gpu=True).assign(mode="concurrent", run_id="unfair")
    table = waiting_table(run_of(pd.concat([rows, waiting, unfair])))
    assert list(table.index) == [("sequential", "Djinn"), ("concurrent", "Djinn")]  # no vLLM
    alone, queued = table.iloc[0], table.iloc[1]
    later = later_touches(rows)["switch_ms"]
    assert alone["mean later switch (ms)"] == pytest.approx(later.mean())
    assert queued["longest later switch (ms)"] == pytest.approx(later.max() / 100)
    done_s = rows.groupby("repeat")["total_ms"].sum().mean() / 1e3
    assert queued["all done (s)"] == pytest.approx(done_s) == alone["all done (s)"]
    assert alone["machine"] == queued["machine"] == "1"
    fair = run_of(pd.concat([rows, waiting, unfair.assign(run_id="fair")]))
    batched = {**fair.manifests["fair"], "batches": True}
    fair = replace(fair, manifests={**fair.manifests, "fair": batched})
    assert ("concurrent", "vLLM sleep") in waiting_table(fair).index
    assert waiting_table(run_of(cell_rows("pytorch_lru"))).empty


def arriving(*systems: str, rate: float = 2.0) -> Run:
    """A run of concurrent requests at one rate, each system with a manifest."""
    trace = f"load_{rate:g}"
    parts = [cell_rows(name, gpu=True).assign(trace=trace, mode="concurrent") for name in systems]
    run = run_of(pd.concat(parts, ignore_index=True))
    batches = {run_id: {**m, "batches": True, "serving_device_bytes": 3 << 30}
               for run_id, m in run.manifests.items()}  # fmt: skip
    traces = {trace: zipf_trace(30, 1.0, ["x", "y"], 1, rate)}
    return replace(run, manifests=batches, traces=traces)


def test_requests_in_time_have_an_interval_and_each_rate_its_memory():
    run = arriving("djinn", "vllm_sleep")
    rows = run.rows[run.rows["system"] == "djinn"]
    late_ms = float(rows["total_ms"].quantile(0.8))
    line = rates_table(run, "load", late_ms).reset_index().set_index("system").loc["Djinn"]
    share = next(name for name in line.index if name.startswith("within"))
    assert line[share] == pytest.approx(80, abs=4)
    assert 40 < line["low (%)"] < line[share] < line["high (%)"] <= 100
    assert (line["memory, serving (GiB)"], line["arrivals (/s)"]) == (3.0, 2.0)
    every = rates_table(run, "load", 1e9).reset_index().set_index("system").loc["Djinn"]
    assert (every["low (%)"], every["high (%)"]) == (pytest.approx(88.4, abs=0.1), 100)  # 30 of 30
    with pytest.raises(NotMeasured, match=r"no rows of a trace named pair or pair_\*"):
        rates_table(run, "pair", 1000.0)
    own = replace(run, traces={"load_2": paper_trace(("x", "y", "z"))})  # it has a mean gap of 2 s
    assert list(rates_table(own, "load_2", 1000.0).index) == [0.5, 0.5]


def test_the_capacity_to_draw_is_the_papers_or_that_of_most_systems(gpu: Run):
    assert usual_capacity(gpu) == "25"
    small = cell_rows("djinn", "20"), cell_rows("djinn", "40"), cell_rows("pytorch_lru", "40")
    assert usual_capacity(run_of(pd.concat(small))) == "40"
    assert usual_capacity(run_of(pd.concat(small[:2]))) == "20"
    assert usual_capacity(run_of(small[0].assign(mode="concurrent"))) == "25"  # nothing to draw


def test_the_start_of_a_system_is_no_part_of_the_memory_that_serving_takes(gpu: Run):
    def noted(**facts: object) -> Run:
        cell = "paper-25-djinn"
        return replace(gpu, manifests={**gpu.manifests, cell: {**gpu.manifests[cell], **facts}})

    def shown(run: Run) -> tuple[float, float]:
        line = measures(run, run.rows[run.rows["run_id"] == "paper-25-djinn-test"]).loc["djinn"]
        return line["memory, serving (GiB)"], line["memory, starting (GiB)"]

    started = {"peak_device_bytes": 59 << 30}
    assert shown(noted(**started, serving_device_bytes=38 << 30)) == (38, 59)
    serving, starting = shown(noted(**started))  # of an older cell, which noted one peak
    assert math.isnan(serving) and starting == 59
    serving, starting = shown(noted(**started, running_since="another"))
    assert serving == 59 and math.isnan(starting)
    older = noted(**started)
    later = {"run_id": "later", "cell": "load_1-25-djinn", "running_since": "paper-25-djinn",
             "peak_device_bytes": 38 << 30,
             "started_at_utc": "2026-11-23T06:30:00+00:00"}  # fmt: skip
    began = older.manifests["paper-25-djinn"]
    assert shown(replace(older, replicate_manifests={"later": {**began, **later}})) == (38, 59)
    elsewhere = {**began, **later, "gpu_uuid": "GPU-other"}
    assert math.isnan(shown(replace(older, replicate_manifests={"later": elsewhere}))[0])


def test_latencies_under_load_are_compared_on_one_machine():
    run = arriving("djinn", "vllm_sleep", "pytorch_lru")
    table = load_ratio_table(run, "load", to="vllm_sleep").set_index("system")
    assert list(table.index) == ["Djinn", "PyTorch LRU"] and set(table["n"]) == {30}
    means = run.rows.groupby("system")["total_ms"].mean()
    line = table.loc["Djinn"]
    assert line["mean (x)"] == pytest.approx(means["djinn"] / means["vllm_sleep"])
    assert line["mean, low (x)"] < line["mean (x)"] < line["mean, high (x)"] < 1
    djinn = next(cell for cell, m in run.manifests.items() if m["system"] == "djinn")
    other = {**run.manifests[djinn], "gpu_uuid": "GPU-elsewhere"}
    apart = replace(run, manifests={**run.manifests, djinn: other})
    table = load_ratio_table(apart, "load", to="vllm_sleep")
    assert list(table["system"]) == ["PyTorch LRU"]  # no ratio across machines
    with pytest.raises(NotMeasured, match="no machine ran djinn_vllm and another system"):
        load_ratio_table(run, "load")


def test_models_larger_than_the_ring_have_the_share_of_their_ceiling(tmp_path):
    rows = write_large_rows(tmp_path)
    table = large_table(rows).xs("llama", level="model")
    link_ms = (6 << 30) / 8e9 * 1e3
    assert list(table.index) == ["resident", "djinn", "accelerate"]
    assert table.loc["djinn", "these at the link's rate (ms)"] == pytest.approx(link_ms)
    assert table.loc["djinn", "share of the ceiling (%)"] == pytest.approx(100 * link_ms / 900)
    assert table.loc["resident", "share of the ceiling (%)"] == 100
    failed = rows.assign(error="", ms_per_token=rows["ms_per_token"].mask(rows.index == 2))
    failed.loc[2, ["ok", "error"]] = [False, "no room"]
    table = large_table(failed).xs("llama", level="model")
    assert table.loc["accelerate", "failed because"] == "no room"
    assert math.isnan(table.loc["accelerate", "per token (ms)"])
