"""What a latency, a gain and the baseline are made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import GPU_MACHINE, on_another_machine

from djinn_lib.analysis.parts import decomposition, gain_table, pinned_table
from djinn_lib.analysis.run import Run, published

PAPER = published()
PARTS = ["copy (ms)", "write-back (ms)", "rest of the switch (ms)", "prefill (ms)", "decode (ms)"]


def test_the_gain_is_taken_apart(gpu: Run):
    table = gain_table(gpu)
    rows = {name: cell_rows(name, gpu=True) for name in ("djinn", "pytorch_pinned")}
    less_ms = rows["pytorch_pinned"]["total_ms"].mean() - rows["djinn"]["total_ms"].mean()
    assert table.loc["total", "less (ms)"] == pytest.approx(less_ms)
    switch_ms = rows["pytorch_pinned"]["switch_ms"].mean() - rows["djinn"]["switch_ms"].mean()
    share = table["share of the gain (%)"]
    assert share["switch"] == pytest.approx(100 * switch_ms / less_ms)
    assert share[["switch", "prefill", "decode"]].sum() == pytest.approx(share["total"]) == 100
    assert table.index.name == "part"  # one machine ran all
    moved = on_another_machine(gpu, "djinn", total_ms=lambda ms: 2 * ms)
    pd.testing.assert_frame_equal(gain_table(moved), table, check_names=False)
    assert gain_table(moved).index.name == "part, on machine 1"


def test_the_baseline_is_taken_apart(gpu: Run):
    rows = gpu.rows.copy()
    pageable = (rows["system"] == "pytorch_pageable") & rows["ok"]
    rows.loc[pageable, "ttft_ms"] -= 50.0  # the way back comes after the last token
    value = pinned_table(replace(gpu, rows=rows), PAPER)["value"]
    pinned = cell_rows("pytorch_pinned", gpu=True)
    assert value["P50 (s)"] == pytest.approx(pinned["total_ms"].median() / 1e3)
    moved = (pinned["loaded_bytes"] + pinned["writeback_bytes"]).mean()
    computing_s = (pinned["total_ms"] - pinned["switch_ms"]).mean() / 1e3
    assert value["mean prefill and decode (s)"] == pytest.approx(computing_s)
    implied = moved / (4.302 - computing_s) / 1e9
    assert value["implied rate in the paper (GB/s)"] == pytest.approx(implied)
    there_ms = rows.loc[pageable, "switch_ms"] - 50.0
    rate = rows.loc[pageable, "loaded_bytes"].sum() / there_ms.sum() / 1e6
    assert value["from pageable memory: rate (GB/s)"] == pytest.approx(rate)
    assert value["to pageable memory: mean (s)"] == pytest.approx(0.05)
    without = replace(gpu, rows=rows[~pageable])
    assert len(pinned_table(without, PAPER)) == len(value) - 3


def test_the_parts_add_up_to_the_total(gpu: Run):
    parts = decomposition(gpu, PAPER)
    assert (parts[PARTS].sum(axis=1) - parts["total (ms)"]).abs().max() < 1e-6
    assert parts.loc["pytorch_pinned", "paper: P50 (ms)"] == 4302
    assert parts.loc[["djinn_whole", "vllm_sleep"], "paper: P50 (ms)"].isna().all()
    assert (parts["n"] == 30).sum() == len(parts) - 1 and parts.loc["vllm_recreate", "n"] == 22


def test_copies_cost_their_bytes_at_the_rates_of_the_machine_that_ran_the_cell(gpu: Run):
    mean_bytes = cell_rows("pytorch_pinned", gpu=True)["loaded_bytes"].mean()
    before = decomposition(gpu, PAPER)
    parts, link = before.loc["pytorch_pinned"], GPU_MACHINE["link_rate_bytes_per_s"]
    back = GPU_MACHINE["d2h_rate_bytes_per_s"]
    assert parts["copy (ms)"] == pytest.approx(mean_bytes / link * 1e3)
    assert parts["write-back (ms)"] == pytest.approx(mean_bytes / back * 1e3)
    cell = "paper-25-pytorch_pinned"
    slow = {**gpu.manifests[cell], "machine": {**GPU_MACHINE, "link_rate_bytes_per_s": link / 2}}
    elsewhere = decomposition(replace(gpu, manifests={**gpu.manifests, cell: slow}), PAPER)
    copy_ms = elsewhere["copy (ms)"]
    assert copy_ms["pytorch_pinned"] == pytest.approx(2 * parts["copy (ms)"])
    assert copy_ms["djinn"] == before.loc["djinn", "copy (ms)"]


def test_the_ceiling_is_bytes_over_the_link_and_tokens_out_of_memory(gpu: Run, cpu: Run):
    rows = gpu.cells("paper", "25").query("system == 'djinn'")
    read = (rows["model"].map(gpu.needed_sizes) * (rows["n_tokens"] - 1)).mean()
    parts = decomposition(gpu, PAPER).loc["djinn"]
    decode_ms = read / GPU_MACHINE["hbm_read_rate_bytes_per_s"] * 1e3
    assert parts["ceiling (ms)"] == pytest.approx(parts["copy (ms)"] + decode_ms)
    reached = 100 * parts["ceiling (ms)"] / parts["total (ms)"]
    assert parts["ceiling reached (%)"] == pytest.approx(reached)
    assert math.isnan(decomposition(cpu, PAPER).loc["djinn", "ceiling reached (%)"])
