"""The tables that notebooks show."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from row_factory import MIB, SIZES, UNAVAILABLE, cell_rows
from run_factory import MACHINE

from djinn_lib.analysis.tables import (
    cell_table,
    facts_table,
    machine_names,
    machine_numbers,
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


def manifest(started: str, **facts: object) -> dict:
    return {"started_at_utc": started, "machine": {**MACHINE, **facts}}


def test_machines_are_numbered_by_their_first_cell():
    cells = {
        "b": manifest("2026-11-24T07:00", eager_operator_us=4.9, versions={"ray": "2.60.0"}),
        "a": manifest("2026-11-24T08:00", eager_operator_us=3.5),
        "c": manifest("2026-11-24T09:00", eager_operator_us=4.9),
    }
    assert machine_numbers(cells) == {"b": 1, "a": 2, "c": 1}
    table = machines_table(cells)
    assert table["cells"].to_dict() == {1: 2, 2: 1}
    assert table["eager operator (µs)"].to_dict() == {1: 4.9, 2: 3.5}


def test_machines_are_called_as_in_machine_json():
    cells = {
        "b": manifest("2026-11-24T07:00", eager_operator_us=4.9, versions={"ray": "2.60.0"}),
        "a": manifest("2026-11-24T08:00", eager_operator_us=3.5),
        "c": manifest("2026-11-24T09:00", eager_operator_us=6.5),
    }
    assert machine_names(cells) == {1: "1", 2: "2", 3: "3"}
    listed = [
        {"part": "tuesday", "machine": {**MACHINE, "eager_operator_us": 3.5}},
        {"part": "monday", "machine": {**MACHINE, "eager_operator_us": 4.9}},
        {"part": "monday again", "machine": {**MACHINE, "eager_operator_us": 4.9}},
    ]
    names = machine_names(cells, listed)
    assert names == {1: "monday", 2: "tuesday", 3: "3"}  # one is not in the list
    assert list(machines_table(cells, names).index) == ["monday", "tuesday", "3"]


def test_machines_of_older_runs_lack_the_operator():
    cells = {"a": {"started_at_utc": "2026", "machine": dict(MACHINE)}}
    del cells["a"]["machine"]["eager_operator_us"]
    table = machines_table(cells)
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
