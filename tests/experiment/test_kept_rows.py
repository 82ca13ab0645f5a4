"""Rows on disk win: what failures may replace, and what stays whatever fails later."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from row_factory import cell_rows
from run_factory import MACHINE, manifest_of

from djinn_lib.experiment.cells import kept_rows
from djinn_lib.experiment.cells.kept_rows import DIED, keep, read_journal, set_aside, whole_frame
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.run_folder import CellFiles, RunFolder
from djinn_lib.rows import COLUMNS, read_rows, rows_frame

MANIFEST = manifest_of("paper-25-djinn", cell_rows("djinn").iloc[0], MACHINE)
TIMES = ["queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms"]


def execution(
    run_id: str, n_served: int, died: bool = False, **changed: Any
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of 30 requests, of which so many were served, and their manifest."""
    rows = cell_rows("djinn").assign(run_id=run_id)[list(COLUMNS)]
    failed = rows.index >= n_served
    rows.loc[failed, ["ok", "error_kind", "error", "n_tokens"]] = [False, "kernel_died", "gone", 0]
    rows.loc[failed, TIMES] = float("nan")
    notes = [*MANIFEST["notes"], *[f"{DIED}killed by signal 9"] * died]
    return rows, {**MANIFEST, "run_id": run_id, "notes": notes, **changed}


@pytest.fixture
def cell(tmp_path: Path) -> CellFiles:
    return RunFolder(tmp_path).cell("paper-25-djinn")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def aside(cell: CellFiles) -> list[str]:
    return sorted(path.name for path in cell.earlier.glob("*"))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("earlier", "later", "stays"),
    [
        ((30, False), (0, True), True),  # 30 of 30 served once became 0 of 30
        ((30, False), (30, True), True),  # it died after it had measured everything
        ((12, False), (28, True), False),
        ((0, False), (0, True), True),  # it could not run here, and says why
        ((28, True), (12, True), True),
        ((12, True), (12, True), False),  # the latest cause of two that died
        ((30, False), (28, False), False),  # a measurement that came to its end is the newest
    ],
    ids=str,
)
def test_what_an_execution_may_replace(cell, earlier, later, stays):
    of_earlier = keep(cell, *execution("earlier", *earlier))
    before = contents(cell.run)
    rows, manifest = execution("later", *later)
    kept = keep(cell, rows, manifest)
    pd.testing.assert_frame_equal(kept, of_earlier if stays else rows)
    pd.testing.assert_frame_equal(read_rows(cell.rows), kept)
    assert read_manifest(cell.manifest)["run_id"] == kept["run_id"][0]
    if stays:
        assert contents(cell.run) == before
    elif earlier[0] > later[0]:
        assert aside(cell) == ["earlier.manifest.json", "earlier.parquet"]
        assert read_rows(cell.earlier / "earlier.parquet")["ok"].sum() == earlier[0]
    else:
        assert not aside(cell)


@pytest.mark.parametrize(
    "changed",
    [
        {"parameters": {"page_bytes": 1 << 20, "repeats": 1, "new_tokens": 7}},
        {"options": {"decode": "eager"}},
        {"trace_sha256": "f" * 64},
        {"models": {n: {**m, "sha256": "f" * 64} for n, m in MANIFEST["models"].items()}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_rows_that_answer_another_question_go_but_not_for_ever(cell, changed):
    keep(cell, *execution("earlier", 30))
    assert not keep(cell, *execution("later", 0, True, **changed))["ok"].any()
    assert aside(cell) == ["earlier.manifest.json", "earlier.parquet"]


def test_rows_of_other_code_or_of_another_day_answer_the_same_question(cell):
    keep(cell, *execution("earlier", 30))
    of_now = {"git_commit": "f" * 16, "git_dirty": True, "versions": {"torch": "3"}, "wall_s": 0.1}
    assert keep(cell, *execution("later", 0, True, **of_now))["ok"].all()
    manifest = read_manifest(cell.manifest)
    assert (manifest["git_commit"], manifest["run_id"]) == ("0123456789abcdef", "earlier")


@pytest.mark.parametrize("manifest", [None, "of another run", "broken"])
def test_rows_without_a_manifest_of_their_own_go_but_not_for_ever(cell, manifest):
    """The process died after it had written the rows; what died later tells nothing of them."""
    rows, own = execution("finished", 30)
    keep(cell, rows, {**own, "run_id": "another"})
    if manifest is None:
        cell.manifest.unlink()
    elif manifest == "broken":
        cell.manifest.write_text("{")
    assert not keep(cell, *execution("later", 0, True))["ok"].any()
    assert read_rows(cell.earlier / "finished.parquet").equals(rows)
    assert read_manifest(cell.manifest)["run_id"] == "later"


def test_a_full_disk_takes_no_rows(cell, monkeypatch):
    rows, manifest = execution("earlier", 30)
    keep(cell, rows, manifest)
    before = cell.rows.read_bytes()
    monkeypatch.setattr(kept_rows.os, "link", full)
    monkeypatch.setattr(kept_rows.shutil, "copy", full)
    with pytest.raises(OSError, match="No space"):  # before anything is replaced
        keep(cell, *execution("later", 0, False))
    assert cell.rows.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PAR1 cut"])
def test_what_cannot_be_read_does_not_stay(cell, content):
    cell.rows.parent.mkdir()
    cell.rows.write_bytes(content)
    assert len(keep(cell, *execution("later", 0, True))) == 30
    assert read_rows(cell.rows)["run_id"].eq("later").all()


# -- rows that break the schema ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [("loaded_bytes", 1.5), ("ttft_ms", float("nan")), ("n_tokens", None), ("power_w", 300.0)],
)
def test_a_row_that_is_wrong_costs_no_other(column, value):
    rows = cell_rows("djinn")[:6].to_dict("records")
    good = rows_frame(rows)
    rows[4][column] = value
    frame = whole_frame(rows)
    pd.testing.assert_frame_equal(frame.drop(index=4), good.drop(index=4))
    (wrong,) = frame.iloc[[4]].to_dict("records")
    assert (wrong["ok"], wrong["error_kind"], wrong["request"]) == (False, "other", 4)
    assert "breaks the schema" in wrong["error"] and f'"{column}": ' in wrong["error"]


# -- journals ----------------------------------------------------------------------------------


def test_a_journal_gives_what_can_be_read_of_it(tmp_path):
    journal = tmp_path / "cell.journal.jsonl"
    assert read_journal(journal) == []
    rows = cell_rows("vllm_recreate").to_dict("records")
    lines = [json.dumps(row) for row in rows]
    journal.write_text("\n".join(lines) + "\n")
    pd.testing.assert_frame_equal(rows_frame(read_journal(journal)), rows_frame(rows))
    odd = ["12", "[1]", '{"repeat": 0}', "\0\0", lines[3][:-20], ""]
    odd.append(json.dumps({**rows[4], "repeat": [0]}))
    journal.write_bytes("\n".join([*lines[:3], *odd, lines[5]]).encode() + b"\xff\xfe\n{")
    assert [row["request"] for row in read_journal(journal)] == [0, 1, 2]
    journal.write_text("\n".join([lines[0], json.dumps({**rows[1], "colour": "red"})]))
    good, wrong = read_journal(journal)
    assert good["request"] == 0 and good["error_kind"] != "other"
    assert (wrong["request"], wrong["ok"]) == (1, False) and "colour" in wrong["error"]


def test_a_journal_that_is_set_aside_is_kept(cell):
    set_aside(cell)
    assert not list(cell.run.iterdir())
    cell.journal.parent.mkdir()
    for text in ("first", "second"):
        cell.journal.write_text(text)
        set_aside(cell)
        assert (cell.earlier / cell.journal.name).read_text() == text
        assert not cell.journal.exists()
