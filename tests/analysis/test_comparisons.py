"""What the headline comparisons rest on: ratios and tokens."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import on_another_machine

from djinn_lib.analysis.claims import judge, load_claims
from djinn_lib.analysis.comparisons import machine_ratio_table, ratio_table, token_table
from djinn_lib.analysis.run import Run, published
from djinn_lib.analysis.selection import CPU_CLOCKS
from djinn_lib.rows import no_rows

PAPER = published()
SLEEP = "vLLM sleep, the best form"


def changed(run: Run, system: str, **columns: object) -> Run:
    """The run with columns of one system's main cell set."""
    rows = run.rows.copy()
    own = (rows["system"] == system) & (rows["capacity_label"] == "25")
    for name, values in columns.items():
        rows.loc[own, name] = values
    return replace(run, rows=rows)


# -- ratios ----------------------------------------------------------------------------------


def test_ratios_are_those_of_the_rows_and_of_the_paper(gpu: Run):
    table = ratio_table(gpu, PAPER).loc["paper"]
    medians = {name: cell_rows(name, gpu=True)["total_ms"].median()
               for name in ("pytorch_pinned", "djinn", "djinn_eager")}  # fmt: skip
    alike = table.loc["PyTorch pinned", "Djinn, eager decode", "P50"]
    assert alike["measured (x)"] == medians["pytorch_pinned"] / medians["djinn_eager"]
    assert alike["low (x)"] < alike["measured (x)"] < alike["high (x)"]
    own = table.loc["PyTorch pinned", "Djinn", "P50"]
    assert own["measured (x)"] == medians["pytorch_pinned"] / medians["djinn"]
    assert own["paper (x)"] == alike["paper (x)"] == 4302 / 1392
    assert table.loc["vLLM re-created", "Djinn", "P50"]["paper (x)"] == 18213 / 1392
    assert table.xs(SLEEP)["paper (x)"].isna().all()


def test_each_statistic_is_compared_with_the_form_that_is_best_in_it(gpu: Run):
    run = changed(gpu, "vllm_sleep", total_ms=[100.0] * 27 + [9000.0] * 3)
    run = changed(run, "vllm_sleep_naive", total_ms=[800.0] * 30)
    found = ratio_table(run, PAPER).loc["paper"].xs(SLEEP).xs("Djinn")["measured (x)"]
    djinn = cell_rows("djinn", gpu=True)["total_ms"]
    assert found["P50"] == pytest.approx(100 / djinn.median())
    assert found["mean"] == pytest.approx(800 / djinn.mean())
    assert found["P90"] == pytest.approx(800 / djinn.quantile(0.9))
    assert found["max"] == pytest.approx(800 / djinn.max())
    listed = {claim.id: claim for claim in load_claims()}
    verdicts = judge([listed[f"ours-{name}-vs-sleep"] for name in ("p50", "mean", "p90")], run)
    assert [v.measured for v in verdicts] == [found[name] for name in ("P50", "mean", "P90")]


def test_the_longer_trace_has_ratios_of_its_own_where_it_was_run(gpu: Run):
    assert set(ratio_table(gpu, PAPER).index.get_level_values("trace")) == {"paper"}
    ran = gpu.rows["system"].isin(["djinn", "vllm_sleep"]) & (gpu.rows["capacity_label"] == "25")
    zipf = gpu.rows[ran].assign(trace="zipf", run_id="zipf-" + gpu.rows["run_id"])
    manifests = {f"zipf-25-{m['system']}": {**m, "run_id": f"zipf-{m['run_id']}"}
                 for cell, m in gpu.manifests.items() if cell.startswith("paper-25")}  # fmt: skip
    run = replace(
        gpu,
        rows=pd.concat([gpu.rows, zipf]),
        traces={**gpu.traces, "zipf": gpu.traces["paper"]},
        manifests={**gpu.manifests, **manifests},
    )
    table = ratio_table(run, PAPER).sort_index()
    longer, usual = (table.loc[trace, "vLLM sleep", "Djinn"]["measured (x)"]
                     for trace in ("zipf", "paper"))  # fmt: skip
    assert longer.to_dict() == usual.drop("max").to_dict()
    assert table.loc["zipf", "vLLM sleep, read-only", "Djinn"]["measured (x)"].isna().all()


def test_systems_are_compared_on_a_machine_that_ran_both(gpu: Run):
    elsewhere = on_another_machine(gpu, "djinn", total_ms=lambda ms: ms / 2)
    values = ["paper (x)", "measured (x)", "low (x)", "high (x)"]
    expected = ratio_table(gpu, PAPER)[values]
    pd.testing.assert_frame_equal(ratio_table(elsewhere, PAPER)[values], expected)
    forgotten = replace(elsewhere, replicates=no_rows(), replicate_manifests={})
    table = ratio_table(forgotten, PAPER)
    of_djinn = table[table.index.get_level_values("over that of") == "Djinn"]
    assert of_djinn["measured (x)"].isna().all()  # no ratio across machines
    assert "no machine ran all of pytorch_pinned, djinn" in set(of_djinn["remark"].str[:43])


def test_a_machine_that_was_shared_is_the_last_choice(gpu: Run):
    busy = on_another_machine(
        on_another_machine(gpu, "djinn", total_ms=lambda ms: ms / 2), "pytorch_pinned"
    )
    for cell in ("paper-25-djinn", "paper-25-pytorch_pinned"):
        busy.manifests[cell]["busy_neighbours"] = ["GPU-b"]
    pair = ("paper", "PyTorch pinned", "Djinn")
    alone, shared = (ratio_table(run, PAPER).loc[pair] for run in (gpu, busy))
    assert shared["measured (x)"].equals(alone["measured (x)"])
    assert set(shared["remark"]) == {"on machine 1"}
    both = machine_ratio_table(busy).loc[[("paper", "25", *pair[1:])]]
    assert both["machine"].tolist() == ["1", "2 (shared)"]
    only = replace(busy, replicates=no_rows(), replicate_manifests={})
    found = ratio_table(only, PAPER).loc[pair]
    assert set(found["remark"]) == {"on machine 2 (shared)"}
    assert found["measured (x)"].tolist() == pytest.approx(2 * alone["measured (x)"].to_numpy())


def test_a_ratio_has_a_row_for_each_machine_that_ran_both(gpu: Run, cpu: Run):
    pair = ("paper", "25", "PyTorch pinned", "Djinn")
    single = machine_ratio_table(gpu).loc[[pair]]
    ratios = ratio_table(gpu, PAPER).loc["paper", "PyTorch pinned", "Djinn"]
    assert single["P50 (x)"].tolist() == [ratios.loc["P50", "measured (x)"]]
    assert single["mean low (x)"].tolist() == [ratios.loc["mean", "low (x)"]]
    faster = on_another_machine(gpu, "djinn", total_ms=lambda ms: ms / 2)
    table = machine_ratio_table(on_another_machine(faster, "pytorch_pinned"))
    both = table.loc[[pair]].sort_values("P50 (x)")
    assert both["machine"].nunique() == 2 and both["measured"].nunique() == 2
    assert both["P50 (x)"].tolist() == pytest.approx([1, 2] * single["P50 (x)"].to_numpy())
    alike = table.loc[[(*pair[:3], "Djinn, eager decode")]]  # only the first machine ran it
    assert len(alike) == 1 and set(alike["machine"]) < set(both["machine"])
    assert set(table.index.get_level_values("capacity")) == {"20", "25", "32", "40"}
    (reason,) = machine_ratio_table(cpu)["not measured because"]
    assert reason == CPU_CLOCKS


def test_ratios_that_cannot_be_measured_have_the_reason(gpu: Run, cpu: Run):
    table = ratio_table(cpu, PAPER)
    assert set(table["remark"]) == {CPU_CLOCKS} and table["measured (x)"].isna().all()
    no_vllm = replace(gpu, rows=gpu.rows[~gpu.rows["system"].str.startswith("vllm")])
    table = ratio_table(no_vllm, PAPER)
    assert table["measured (x)"].notna().sum() == 4
    reasons = table["remark"][table["measured (x)"].isna()]
    assert all("no rows of system 'vllm" in why or "_decoder'" in why for why in reasons)


# -- tokens ----------------------------------------------------------------------------------


def test_requests_with_other_tokens_are_counted(gpu: Run):
    assert (token_table(gpu)["with other tokens"] == 0).all()
    shas = cell_rows("djinn", gpu=True)["token_sha"].tolist()
    run = changed(gpu, "djinn", token_sha=["other"] * 13 + shas[13:])
    again = cell_rows("djinn_graph", gpu=True).assign(repeat=1)
    again.loc[:3, "token_sha"] = "changed"
    table = token_table(replace(run, rows=pd.concat([run.rows, again], ignore_index=True)))
    djinn, graph = (table.loc["paper", name] for name in ("Djinn", "Djinn, not compiled"))
    assert (djinn["requests"], djinn["with other tokens"]) == (30, 13)
    assert djinn["with other tokens (%)"] == pytest.approx(100 * 13 / 30)
    assert (djinn["in another repeat"], graph["in another repeat"]) == (0, 4)
    assert "PyTorch pinned" not in table.index.get_level_values("system")  # the reference
    assert "logits apart (%)" not in table
    apart = {"a": {"mode": "compiled", "logits_distance": 0.002},
             "b": {"mode": "graph", "logits_distance": 0.004}}  # fmt: skip
    cell = "paper-25-djinn"
    told = {**gpu.manifests, cell: {**gpu.manifests[cell], "decoding": apart}}
    column = token_table(replace(gpu, manifests=told)).loc["paper"]["logits apart (%)"]
    assert column["Djinn"] == pytest.approx(0.4) and column.notna().sum() == 1
