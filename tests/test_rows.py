"""Rows and manifests: what the schema takes and refuses; files are whole or absent."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_factory import cell_rows

from djinn_lib import files
from djinn_lib.errors import CapacityError, CheckpointError, RecordError
from djinn_lib.rows import (
    COLUMNS,
    ERROR_KINDS,
    check_rows,
    classify_error,
    clock_warning,
    failed_row,
    read_rows,
    read_run,
    rows_frame,
    token_sha,
    write_rows,
)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return cell_rows("djinn").to_dict("records")


@pytest.fixture
def good() -> pd.DataFrame:
    return rows_frame(cell_rows("vllm_recreate").to_dict("records"))


# -- the schema ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "n_ok"), [("djinn", 60), ("vllm_recreate", 44), ("vllm_sleep", 0)]
)
def test_good_rows_pass_in_the_order_of_the_schema(system, n_ok):
    rows = cell_rows(system, repeats=2).to_dict("records")
    shuffled = [dict(reversed(row.items())) for row in rows]
    frame = rows_frame(shuffled)
    assert tuple(frame.columns) == COLUMNS and len(frame) == 60
    assert frame["ok"].sum() == n_ok and frame["request"].tolist() == [*range(30)] * 2


def refused(rows: list[dict[str, Any]]) -> str:
    with pytest.raises(RecordError, match="new rows: expected rows of the schema") as caught:
        rows_frame(rows)
    return str(caught.value)


@pytest.mark.parametrize("column", ["run_id", "loaded_bytes", "resident_bytes"])
def test_every_column_must_be_there(rows, column):
    for row in rows:
        del row[column]
    assert column in refused(rows)


def test_no_rows_are_refused(good):
    for empty in ([], good.iloc[:0].to_dict("records")):
        with pytest.raises(RecordError, match="expected at least 1 row, got none"):
            rows_frame(empty)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("loaded_bytes", -1, "loaded_bytes"),
        ("capacity_bytes", 0, "capacity_bytes"),
        ("loaded_bytes", 1.5, "loaded_bytes"),
        ("repeat", -1, "repeat"),
        ("request", 2.5, "request"),
        ("system", 5, "system"),
        ("model", None, "model"),
        ("mode", "parallel", "mode"),
        ("arrival_s", -0.1, "arrival_s"),
        ("queue_ms", -1.0, "queue_ms"),
        ("switch_ms", math.inf, "switch_ms"),
        ("error_kind", "bad_luck", "error_kind"),
        ("ok", "yes", "ok"),
        ("ttft_ms", math.nan, "ok rows have all times"),
        ("n_tokens", 0, "ok rows have tokens"),
        ("token_sha", "", "ok rows have tokens"),
        ("error_kind", "oom", "ok exactly when its error_kind is empty"),
        ("ok", False, "ok exactly when its error_kind is empty"),
        ("request", 3, "run_id"),  # as the row before
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(rows, column, value, named):
    rows[4][column] = value
    assert named in refused(rows)


@pytest.mark.parametrize("column", ["queue_ms", "ttft_ms"])
def test_failed_rows_have_no_times(rows, column):
    keys = {name: rows[4][name] for name in COLUMNS[:12]}
    rows[4] = failed_row(**keys, error_kind="oom", error="out of memory")
    assert len(rows_frame(rows)) == 30
    rows[4][column] = 1.0
    assert "failed rows have none" in refused(rows)


@pytest.mark.parametrize("part", ["switch_ms", "ttft_ms"])
def test_rows_whose_clocks_contradict_each_other_are_kept_and_named(rows, part):
    """A finished cell of a model larger than the ring once lost all of its rows to such a rule."""
    assert clock_warning(rows_frame(rows)) == ""
    rows[4][part] = 1e9
    frame = rows_frame(rows)
    assert len(frame) == 30 and frame[part].max() == 1e9
    assert "1 of 30 requests take longer than the whole" in clock_warning(frame)
    assert "request 4 of repeat 0" in clock_warning(frame)


def test_the_same_request_may_stand_in_two_runs_or_repeats(good):
    other = good.assign(run_id="another")
    assert len(check_rows(pd.concat([good, other, good.assign(repeat=1)]), "all")) == 90
    with pytest.raises(RecordError, match="all: expected"):
        check_rows(pd.concat([good, good]), "all")


def test_a_failed_row_can_always_be_written(rows, tmp_path):
    keys = {name: rows[0][name] for name in COLUMNS[:12]}
    row = failed_row(**keys, error_kind="bad_luck", error="no /data/\udcff: " + "\0" * 3)
    write_rows(rows_frame([row]), tmp_path / "cell.parquet")
    (read,) = read_rows(tmp_path / "cell.parquet").to_dict("records")
    assert read["error_kind"] == "other" and read["error"].startswith("no /data/?: ")


# -- files -----------------------------------------------------------------------------------


def test_rows_come_back_as_they_were(tmp_path, good):
    path = tmp_path / "new" / "cell.parquet"
    write_rows(good, path)
    pd.testing.assert_frame_equal(read_rows(path), good)
    assert [file.name for file in path.parent.iterdir()] == ["cell.parquet"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half(_: pd.DataFrame, path: Path, **__: object) -> None:
    path.write_bytes(b"PAR1")
    full_disk()


@pytest.mark.parametrize(
    ("owner", "function", "fails"),
    [(pd.DataFrame, "to_parquet", write_half), (files.os, "fsync", full_disk),
     (files.os, "replace", full_disk)],
    ids=["writing", "syncing", "renaming"],
)  # fmt: skip
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_nothing_new(tmp_path, good, monkeypatch, owner, function, fails, old):
    path = tmp_path / "cell.parquet"
    if old:
        write_rows(good, path)
    monkeypatch.setattr(owner, function, fails)
    with pytest.raises(OSError, match="No space left") as caught:
        write_rows(good.assign(note="new"), path)
    assert classify_error(caught.value) == "disk_full"
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == [path.name] * old
    if old:
        pd.testing.assert_frame_equal(read_rows(path), good)


@pytest.mark.parametrize("keep", [0.0, 0.99])
def test_truncated_rows_are_refused(tmp_path, good, keep):
    path = tmp_path / "cell.parquet"
    write_rows(good, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(RecordError, match=r"cell\.parquet.*delete the file and run its cell again"):
        read_rows(path)


def test_foreign_files_are_refused(tmp_path, good):
    path = tmp_path / "cell.parquet"
    with pytest.raises(RecordError, match="run its cell again"):
        read_rows(path)
    path.write_text("not parquet at all, though long enough for a footer to be looked for")
    with pytest.raises(RecordError, match="run its cell again"):
        read_rows(path)
    for frame in (pd.DataFrame({"a": [1]}), pd.DataFrame({"a": []}), good.iloc[:0]):
        frame.to_parquet(path)
        with pytest.raises(RecordError, match=r"cell\.parquet: expected"):
            read_rows(path)


def test_a_run_is_the_rows_of_all_its_cells(tmp_path):
    for system, label in (("djinn", "25"), ("djinn", "20"), ("vllm_sleep", "25")):
        frame = rows_frame(cell_rows(system, label).to_dict("records"))
        write_rows(frame, tmp_path / "requests" / f"{label}-{system}.parquet")
    rows = read_run(tmp_path)
    assert len(rows) == 90 and list(rows.index) == list(range(90))
    assert set(zip(rows["system"], rows["capacity_label"], strict=True)) == {
        ("djinn", "25"),
        ("djinn", "20"),
        ("vllm_sleep", "25"),
    }


@pytest.mark.parametrize(
    ("column", "value"), [("model", None), ("mode", "parallel"), ("repeat", 0.0), (None, None)]
)
def test_of_a_run_with_a_wrong_file_the_file_is_named(tmp_path, column, value):
    for name in ("a", "b", "c"):
        frame = cell_rows("djinn").assign(run_id=name)[list(COLUMNS)]
        if name == "b":
            frame = frame.assign(**{column: value}) if column else frame[list(COLUMNS[::-1])]
        (tmp_path / "requests").mkdir(exist_ok=True)
        frame.to_parquet(tmp_path / "requests" / f"{name}.parquet")
    with pytest.raises(RecordError, match=r"b\.parquet: expected rows of the schema"):
        read_run(tmp_path)


def test_a_run_without_rows_says_what_to_do(tmp_path):
    with pytest.raises(RecordError, match="got none: run notebook 02_run_system first"):
        read_run(tmp_path)
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "cell.parquet.partial").write_bytes(b"half a file")
    with pytest.raises(RecordError, match="got none"):
        read_run(tmp_path)


# -- errors and tokens -----------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class RayActorError(Exception):
    """Named as Ray's."""


def caused(error: Exception, by: BaseException) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (CapacityError("too small"), "oom"),
        (OutOfMemoryError("tried to allocate 20 GiB"), "oom"),
        (TimeoutError(), "timeout"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (BrokenPipeError(), "engine_died"),
        (EOFError(), "engine_died"),
        (RayActorError("the actor died"), "engine_died"),
        (CheckpointError("truncated"), "bad_input"),
        (ValueError("not ours"), "other"),
        (caused(RuntimeError("engine failed"), MemoryError()), "oom"),
        (caused(RuntimeError("a"), caused(RuntimeError("b"), TimeoutError())), "timeout"),
    ],
    ids=repr,
)
def test_errors_are_classified(error, kind):
    assert classify_error(error) == kind and kind in ERROR_KINDS


def test_token_sha_is_the_same_for_ever():
    assert token_sha([]) == "e3b0c44298fc1c14"
    assert token_sha([1, 2, 3]) == token_sha((1, 2, 3)) == "e2e2033ae7e19d68"


@given(st.lists(st.integers(-1, 2**40), max_size=8), st.lists(st.integers(-1, 2**40), max_size=8))
def test_token_sha_tells_sequences_apart(one, other):
    assert (token_sha(one) == token_sha(other)) == (one == other)
    if one != one[::-1]:
        assert token_sha(one) != token_sha(one[::-1])
