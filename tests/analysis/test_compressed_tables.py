"""Tables of compressed masters, against the rows that they are made from."""

from __future__ import annotations

import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import run_of

from djinn_lib.analysis.compressed import compressed_trace_table, masters_table
from djinn_lib.analysis.selection import NotMeasured
from djinn_lib.errors import RecordError
from djinn_lib.files import write_json


def row(form: str, **changed: float) -> dict[str, object]:
    return {
        "dtype": "bfloat16", "model": "m", "form": form, "plain_bytes": 4e9, "share": 0.67,
        "add_s": 2.0, "load_ms": 50.0, "by_link": 0.7, "ttft_ms": 7.0, "ms_per_token": 2.0,
        "ms_per_token_beside": 2.5, **changed,
    }  # fmt: skip


def test_what_each_form_costs(tmp_path):
    with pytest.raises(RecordError, match=r"run benchmarks/masters\.py"):
        masters_table(tmp_path)
    write_json(tmp_path / "masters-a.json", {"rows": [row("plain"), row("compressed", add_s=8.0)]})
    write_json(tmp_path / "masters-b.json", {"rows": [row("plain", dtype="float16")]})
    table = masters_table(tmp_path)
    assert list(table.index.get_level_values("weights")) == ["bfloat16", "bfloat16", "float16"]
    assert table["added at (GB/s)"].tolist() == [2.0, 0.5, 2.0]
    assert table["slower beside a load (%)"].tolist() == pytest.approx([25.0] * 3)


def test_a_trace_with_both_forms():
    plain = pd.concat([cell_rows("djinn", label, repeats=2) for label in ("20", "25")])
    faster = plain.assign(system="djinn_compressed", run_id="c", total_ms=plain["total_ms"] - 3)
    table = compressed_trace_table(run_of(pd.concat([plain, faster])))
    assert list(table.index.get_level_values("masters")) == ["plain", "compressed"] * 2
    saved = table[["mean saved (ms)", "low (ms)", "high (ms)"]]
    assert saved.iloc[0].isna().all() and saved.iloc[1].tolist() == pytest.approx([3.0] * 3)
    own = plain[plain["capacity_label"] == "25"]
    line = table.iloc[2]
    assert line["mean (ms)"] == pytest.approx(own["total_ms"].mean())
    assert line["mean switch (ms)"] == pytest.approx(own["switch_ms"].mean())
    assert line["loaded (GiB)"] == pytest.approx(own["loaded_bytes"].sum() / 2 / 2**30)
    with pytest.raises(NotMeasured, match="djinn_compressed"):
        compressed_trace_table(run_of(plain))
