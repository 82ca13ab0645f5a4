"""Results in the form of the paper's scripts."""

from __future__ import annotations

import json

import pandas as pd
from row_factory import cell_rows

from djinn_lib.experiment.paper_form import results_of, summary, write_results


def test_the_summary_has_the_published_keys_and_whole_numbers(tmp_path):
    rows = [cell_rows(name) for name in
            ("djinn", "pytorch_pinned", "vllm_recreate", "serverless_warm")]  # fmt: skip
    elsewhere = cell_rows("djinn", "20"), cell_rows("djinn").assign(start="warm", total_ms=1.0)
    write_results(results_of(pd.concat([*rows, *elsewhere]), "paper", "25"), tmp_path)
    found = json.loads((tmp_path / "comparison_summary.json").read_text())
    assert list(found) == ["djinn_sequential", "pytorch_pinned_sequential", "vllm_sequential",
                           "serverless_sequential"]  # fmt: skip
    for cell in found.values():
        assert cell.keys() == {"p50_total_ms", "p99_total_ms", "mean_total_ms", "completed"}
        assert all(type(value) is int for value in cell.values())
    totals_ms = cell_rows("djinn")["total_ms"]
    assert found["djinn_sequential"]["p50_total_ms"] == round(totals_ms.median())
    assert found["djinn_sequential"]["p99_total_ms"] == round(totals_ms.max())
    assert found["vllm_sequential"]["completed"] == 22  # as published
    result = json.loads((tmp_path / "vllm_sequential_results.json").read_text())
    assert result["stats"]["failed"] == 8 and len(result["results"]) == 30


def test_repeats_count_once_and_modes_are_apart():
    rows = cell_rows("djinn", repeats=3)
    concurrent = cell_rows("djinn").assign(mode="concurrent", total_ms=1e4)
    found = summary(results_of(pd.concat([rows, concurrent]), "paper", "25"))
    assert found["djinn_sequential"]["completed"] == 30
    assert found["djinn_concurrent"]["p50_total_ms"] == 10_000
    assert found["djinn_sequential"]["p99_total_ms"] < 10_000


def test_what_served_nothing_has_no_times_and_what_cannot_run_is_left_out():
    rows = cell_rows("djinn").assign(ok=False, error_kind="oom", error="out of memory")
    found = summary(results_of(pd.concat([rows, cell_rows("vllm_sleep")]), "paper", "25"))
    assert found == {"djinn_sequential": {"completed": 0}}
