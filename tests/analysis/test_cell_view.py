"""What notebook 02 shows of a cell."""

from __future__ import annotations

import pytest
from row_factory import MIB, SIZES, UNAVAILABLE, cell_rows

from djinn_lib.analysis import cell_view


def test_a_cell_with_failures_shows_the_first_reason_whole():
    rows = cell_rows("vllm_recreate")
    why = "out of memory: " + "other processes hold the device; " * 8
    rows.loc[~rows["ok"], "error"] = why
    assert why in cell_view.summary(rows).to_html()
    table = cell_view.request_table(rows)
    failed = table[table["failed because"] != ""]
    assert len(failed) == 8 and failed["total (ms)"].isna().all()
    html = cell_view.requests(rows).to_html()
    assert why in html and "nan" not in html.lower()


def test_requests_of_the_first_repeat_are_in_mib_and_ms():
    rows = cell_rows("djinn", repeats=2)
    table = cell_view.request_table(rows)
    assert list(table.index) == list(range(30)) and "failed because" not in table
    assert table.loc[0, "model"] == "mistral-mini"
    assert table.loc[0, "loaded (MiB)"] == SIZES["mistral-mini"] / MIB == 554.0
    assert table.loc[0, "total (ms)"] == pytest.approx(rows["total_ms"].iloc[0])


def test_of_a_system_that_cannot_run_here_there_is_one_sentence():
    rows = cell_rows("vllm_sleep")
    said = cell_view.summary(rows).data
    reason = UNAVAILABLE["vllm_sleep"].rstrip(".")
    assert said == f"**vLLM sleep** cannot run on this machine: {reason}."
    assert cell_view.requests(rows) is None
    assert cell_view.held(rows, "vllm_sleep") is None
