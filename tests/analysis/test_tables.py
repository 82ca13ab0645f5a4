"""The tables that notebooks show."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from row_factory import MIB, SIZES, UNAVAILABLE, cell_rows
from run_factory import GPU_MACHINE, MACHINE, run_of

from djinn_lib.analysis.tables import (
    as_text,
    cell_table,
    facts_table,
    machines_table,
    request_table,
    trace_table,
)
from djinn_lib.trace import paper_trace, zipf_trace


def test_facts_are_in_units_for_people():
    facts = facts_table({**MACHINE, "hbm_rate_bytes_per_s": 2.88e12})["value"].to_dict()
    assert facts["link rate"] == "8.0 GB/s" and facts["hbm rate"] == "2880.0 GB/s"
    assert facts["d2h rate"] == "not measured: no GPU"
    assert facts["host memory"] == facts["device memory"] == "8.0 GiB"
    assert facts["eager operator"] == "3.5 µs"
    assert facts["cores"] == "2" and facts["version of torch"] == "2.13.0"
    assert "versions" not in facts


def test_machines_have_their_measures_and_their_cells():
    run = run_of(pd.concat([cell_rows("djinn"), cell_rows("pytorch_lru")]))
    one, other = run.manifests.values()
    later = {**other, "machine": {**GPU_MACHINE, "eager_operator_us": 9.0},
             "started_at_utc": "2026-11-30", "stolen_share": 0.125}  # fmt: skip
    table = machines_table(replace(run, manifests={"a": later, "b": one}))
    assert list(table.index) == ["1", "2"] and list(table["cells"]) == [1, 1]
    assert list(table["eager operator (µs)"]) == [3.5, 9.0]
    assert list(table["d2h_rate (GB/s)"]) == [6.0, 6.0]
    assert list(table["time of others (%)"]) == [0.0, 12.5]
    older = {name: value for name, value in GPU_MACHINE.items() if name != "eager_operator_us"}
    table = machines_table(replace(run, manifests={"b": {**one, "machine": older}}))
    assert table["eager operator (µs)"].isna().all() and list(table["cells"]) == [1]


def test_texts_have_three_digits_and_say_where_nothing_is():
    table = pd.DataFrame({"ms": [1234.5, 0.123456, math.nan], "n": [9000, 1, 2],
                          "ok": [True, False, True], "why": ["", "late", ""]})  # fmt: skip
    assert as_text(table).to_dict("list") == {
        "ms": ["1,234", "0.123", "-"], "n": ["9,000", "1", "2"],
        "ok": ["yes", "no", "yes"], "why": ["-", "late", "-"],
    }  # fmt: skip


def test_a_trace_is_counted():
    traces = {"paper": paper_trace(), "zipf": zipf_trace(9, 100.0, ["a", "b"], 1, 1.0)}
    table = trace_table(traces)
    paper, zipf = table.loc["paper"], table.loc["zipf"]
    assert (paper["requests"], paper["switches"]) == (30, 19)
    counts = [paper[f"requests for {model}"] for model in ("llama-7b", "mistral-7b", "phi-2")]
    assert counts == [13, 9, 8] and paper["sha256"] == traces["paper"].sha256[:12]
    assert (zipf["switches"], zipf["requests for a"]) == (0, 9)
    assert math.isnan(zipf["requests for phi-2"])


def test_a_cell_that_served_all():
    values = cell_table(cell_rows("djinn"))["value"]
    assert values["completed"] == values["n"] == 30 and "first error" not in values
    assert values["hit"] == (cell_rows("djinn")["loaded_bytes"] == 0).mean()
    assert bool(values["p99_is_max"]) is True


def test_a_cell_with_failures_shows_the_first():
    values = cell_table(cell_rows("vllm_recreate"))["value"]
    assert (values["failed"], values["first error"]) == (8, "out of memory")


def test_a_cell_that_cannot_run_here_says_why():
    table = cell_table(cell_rows("vllm_sleep"))
    assert table["value"].to_dict() == {"first error": UNAVAILABLE["vllm_sleep"]}


def test_requests_are_in_mib_and_ms():
    rows = cell_rows("djinn", repeats=2)
    table = request_table(rows)
    assert list(table.index[:2]) == [(0, 0), (0, 1)] and len(table) == 60
    first = table.loc[(0, 0)]
    assert first["model"] == "mistral-mini"
    assert first["loaded_mib"] == SIZES["mistral-mini"] / MIB == 554.0
    assert first["total_ms"] == pytest.approx(rows["total_ms"].iloc[0], abs=0.05)
    assert first["failed because"] == ""


def test_failed_requests_have_no_times():
    table = request_table(cell_rows("vllm_recreate"))
    failed = table[table["failed because"] != ""]
    assert len(failed) == 8 and failed["total_ms"].isna().all()
    assert isinstance(table, pd.DataFrame) and table["total_ms"].notna().sum() == 22
