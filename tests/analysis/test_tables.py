"""The tables that notebooks show."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
from row_factory import cell_rows
from run_factory import GPU_MACHINE, run_of, write_large_rows

from djinn_lib.analysis.tables import (
    large_rows_table,
    machines_table,
    shown,
    trace_table,
)
from djinn_lib.trace import paper_trace, zipf_trace


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


def test_a_trace_is_counted():
    traces = {"paper": paper_trace(), "zipf": zipf_trace(9, 100.0, ["a", "b"], 1, 1.0)}
    table = trace_table(traces)
    paper, zipf = table.loc["paper"], table.loc["zipf"]
    assert (paper["requests"], paper["switches"]) == (30, 19)
    counts = [paper[f"requests for {model}"] for model in ("llama-7b", "mistral-7b", "phi-2")]
    assert counts == [13, 9, 8] and paper["sha256"] == traces["paper"].sha256[:12]
    assert (zipf["switches"], zipf["requests for a"]) == (0, 9)
    assert math.isnan(zipf["requests for phi-2"])


def test_a_table_of_a_notebook_cuts_nothing_off():
    why = "a reason that is much longer than what pandas shows of a text by default: " + "x" * 80
    index = pd.Index([0.5, 1.0], name="skew")
    html = shown(pd.DataFrame({"ms": [math.nan, 1.0], "why": [why, ""]}, index)).to_html()
    assert why in html and "nan" not in html.lower()
    assert ">0.5<" in html and ">1<" in html and "0.500000" not in html
    assert shown(pd.DataFrame({"n": range(400)})).to_html().count("<tr>") == 401


def test_rows_of_large_models_are_for_people(tmp_path):
    rows = write_large_rows(tmp_path)
    table = large_rows_table(rows)
    assert table.loc[("llama", "djinn", 0), "loaded per token (MiB)"] == 6 << 10
    assert "failed because" not in table
    failed = large_rows_table(rows.assign(ok=False, error="out of memory"))
    assert set(failed["failed because"]) == {"out of memory"}
