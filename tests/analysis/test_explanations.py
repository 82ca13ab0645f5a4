"""Where the time goes and what did not reproduce: sums, rates, and sentences made of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import GPU_MACHINE, write_run

from djinn_lib.analysis.decomposition import COLUMNS, decomposition, decomposition_table
from djinn_lib.analysis.explanations import explanations
from djinn_lib.analysis.run import Run, load_run, published

PAPER = published()
PARTS = ["copy_ms", "writeback_ms", "rest_ms", "prefill_ms", "decode_ms"]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("gpu"), gpu=True))


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("cpu")))


def test_the_parts_add_up_to_the_total(gpu: Run):
    parts = decomposition(gpu, PAPER)
    assert (parts[PARTS].sum(axis=1) - parts["total_ms"]).abs().max() < 1e-6
    assert parts.loc["pytorch_pinned", "paper_p50_ms"] == 4302
    assert parts.loc[["djinn_whole", "vllm_sleep"], "paper_p50_ms"].isna().all()
    assert (parts["n"] == 30).sum() == len(parts) - 1 and parts.loc["vllm_recreate", "n"] == 22


def test_copies_cost_their_bytes_at_the_rates_of_the_machine_that_ran_the_cell(gpu: Run):
    rows = gpu.cells("paper", "25")
    pinned = rows[rows["system"] == "pytorch_pinned"]
    mean_bytes = pinned["loaded_bytes"].mean()
    parts = decomposition(gpu, PAPER).loc["pytorch_pinned"]
    assert parts["copy_ms"] == pytest.approx(
        mean_bytes / GPU_MACHINE["link_rate_bytes_per_s"] * 1e3
    )
    assert parts["writeback_ms"] == pytest.approx(
        mean_bytes / GPU_MACHINE["d2h_rate_bytes_per_s"] * 1e3
    )
    slow = {**GPU_MACHINE, "link_rate_bytes_per_s": GPU_MACHINE["link_rate_bytes_per_s"] / 2}
    cell = "paper-25-pytorch_pinned"
    manifests = {**gpu.manifests, cell: {**gpu.manifests[cell], "machine": slow}}
    elsewhere = decomposition(replace(gpu, manifests=manifests), PAPER)
    assert elsewhere.loc["pytorch_pinned", "copy_ms"] == pytest.approx(2 * parts["copy_ms"])
    assert elsewhere.loc["djinn", "copy_ms"] == decomposition(gpu, PAPER).loc["djinn", "copy_ms"]


def test_the_ceiling_is_bytes_over_the_link_and_tokens_out_of_memory(gpu: Run):
    rows = gpu.cells("paper", "25").query("system == 'djinn'")
    read = (rows["model"].map(gpu.needed_sizes) * (rows["n_tokens"] - 1)).mean()
    parts = decomposition(gpu, PAPER).loc["djinn"]
    decode_ms = read / GPU_MACHINE["hbm_read_rate_bytes_per_s"] * 1e3
    assert parts["ceiling_ms"] == pytest.approx(parts["copy_ms"] + decode_ms)
    assert parts["reached"] == pytest.approx(100 * parts["ceiling_ms"] / parts["total_ms"])


def test_a_cpu_run_has_no_share_of_a_ceiling(cpu: Run):
    parts = decomposition(cpu, PAPER)
    assert parts["reached"].isna().all()
    table = decomposition_table(parts)
    assert list(table.columns) == ["n", *COLUMNS.values()] and "Djinn" in table.index


def told(text: str, title: str) -> str:
    (paragraph,) = [p for p in text.split("\n\n") if p.startswith(f"**{title}")]
    return paragraph


def test_the_baseline_is_taken_apart(gpu: Run):
    said = told(explanations(gpu, PAPER), "The baseline")
    link = GPU_MACHINE["link_rate_bytes_per_s"]
    assert f"{link / 1e9:.1f} GB/s" in said and "4.3 s in the median" in said
    assert "of this link's rate" in said and "pageable" in said
    without = gpu.rows[gpu.rows["system"] != "pytorch_pageable"]
    said = told(explanations(replace(gpu, rows=without), PAPER), "The baseline")
    assert "pageable" not in said and "public code" in said


def test_pageable_memory_is_told_there_and_back(gpu: Run):
    rows = gpu.rows.copy()
    pageable = (rows["system"] == "pytorch_pageable") & rows["ok"]
    rows.loc[pageable, "ttft_ms"] -= 50.0  # the way back comes after the last token
    there_ms = rows.loc[pageable, "switch_ms"] - 50.0
    rate = rows.loc[pageable, "loaded_bytes"].sum() / there_ms.sum() / 1e6
    said = told(explanations(replace(gpu, rows=rows), PAPER), "The baseline")
    assert f"pageable: {rate:.1f} GB/s to the GPU" in said and "takes 0.05 s" in said


def test_failures_are_counted_or_said_not_to_reproduce(gpu: Run):
    title = "Requests that fail"
    assert "completed 22 of 30 here (oom: 8)" in told(explanations(gpu, PAPER), title)
    others = gpu.rows[gpu.rows["system"] != "vllm_recreate"]
    whole = cell_rows("vllm_sleep", gpu=True).assign(system="vllm_recreate")
    rows = pd.concat([others, whole], ignore_index=True)
    said = told(explanations(replace(gpu, rows=rows), PAPER), title)
    assert "all 30 here, so the failures do not reproduce" in said


def test_first_touches_bound_the_hits(gpu: Run):
    said = told(explanations(gpu, PAPER), "Hits")
    assert "at most 27 of 30 requests (90%)" in said and "27 of 30 do (90%)" in said
    assert "public code loads every model before the first request" in said
    scarce = gpu.rows[gpu.rows["capacity_label"] == "25"]
    said = told(explanations(replace(gpu, rows=scarce), PAPER), "Hits")
    assert "Nothing can be said here: the largest capacity of this run has" in said


def test_what_more_room_does_is_told_before_decoding(gpu: Run):
    title = "The same speed-up"
    said = told(explanations(gpu, PAPER), title)
    assert "is 3.07 to 3.13x lower" in said
    rows = gpu.rows[(gpu.rows["trace"] == "paper") & (gpu.rows["mode"] == "sequential")]
    before_ms = (rows["total_ms"] - rows["decode_ms"]).groupby(
        [rows["system"], rows["capacity_label"]]
    )
    ratio = before_ms.mean()["pytorch_pinned"] / before_ms.mean()["djinn"]
    told_at = [f"{ratio[label]:.1f}x at {label} GiB" for label in ("20", "25", "32", "40")]
    assert said.endswith(f"lower by {', '.join(told_at)}.")
    slower = gpu.rows.copy()
    slower.loc[slower["system"] == "pytorch_pinned", ["total_ms", "decode_ms"]] += 500.0
    again = told(explanations(replace(gpu, rows=slower), PAPER), title)
    assert again != said and again.endswith(f"lower by {', '.join(told_at)}.")
    alone = gpu.rows[gpu.rows["capacity_label"] == "25"]
    said = told(explanations(replace(gpu, rows=alone), PAPER), title)
    assert "Nothing can be said here: rows of one capacity only" in said


def test_without_a_gpu_nothing_is_said_of_times(cpu: Run):
    text = explanations(cpu, PAPER)
    for title in ("The baseline", "The slowest", "The same speed-up"):
        assert "Nothing can be said here: times on a shared CPU" in told(text, title)
    assert "90%" in told(text, "Hits")


def test_a_run_without_the_systems_says_so(tmp_path: Path, gpu: Run):
    rows = gpu.rows[gpu.rows["system"] == "pytorch_lru"]
    text = explanations(replace(gpu, rows=rows), PAPER)
    assert text.count("Nothing can be said here: no rows of system") == 8
    assert "no machine ran both djinn" in told(text, "How steady")
