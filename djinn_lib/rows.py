"""Rows of measurements, one per request: schema, checks, reading and writing.

Rows are checked when they are written and when they are read. The schema does not check clocks:
rows whose times contradict each other are kept, and `clock_warning` reports them.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from djinn_lib.errors import DjinnError, RecordError
from djinn_lib.files import write_atomically

ERROR_KINDS = (
    "oom", "engine_died", "kernel_died", "timeout", "unavailable", "bad_input", "disk_full",
    "other",
)  # fmt: skip
_BYTES = ("loaded_bytes", "evicted_bytes", "writeback_bytes", "resident_before_bytes")
_TIMES = ("switch_ms", "ttft_ms", "decode_ms", "total_ms")
_TOLERANCE_MS = 0.5  # the clocks are not read at the same instant


def _text(*values: str) -> pa.Column:
    return pa.Column(str, pa.Check.isin(values) if values else None)


def _count(at_least: int = 0) -> pa.Column:
    return pa.Column("int64", pa.Check.ge(at_least))


def _time() -> pa.Column:
    return pa.Column(float, pa.Check.in_range(0, 1e10), nullable=True)


SCHEMA = pa.DataFrameSchema(
    {
        "run_id": _text(),
        "system": _text(),
        "mode": _text("sequential", "concurrent"),
        "start": _text("cold", "warm"),
        "capacity_bytes": _count(1),
        "capacity_label": _text(),
        "trace": _text(),
        "repeat": _count(),
        "request": _count(),
        "model": _text(),
        "arrival_s": pa.Column(float, pa.Check.ge(0)),
        "start_s": pa.Column(float, pa.Check.ge(0)),
        "queue_ms": _time(),
        "loaded_bytes": _count(),
        "evicted_bytes": _count(),
        "writeback_bytes": _count(),
        "resident_before_bytes": _count(),
        "switch_ms": _time(),
        "ttft_ms": _time(),
        "decode_ms": _time(),
        "total_ms": _time(),
        "n_tokens": _count(),
        "token_sha": _text(),
        "ok": pa.Column(bool),
        "error_kind": _text("", *ERROR_KINDS),
        "error": _text(),
        "note": _text(),
        "resident_bytes": _text(),
    },
    checks=[
        pa.Check(
            lambda rows: rows["ok"] == (rows["error_kind"] == ""),
            error="a row is ok exactly when its error_kind is empty",
        ),
        pa.Check(
            lambda rows: rows[["queue_ms", *_TIMES]].notna().eq(rows["ok"], axis=0).all(axis=1),
            error="ok rows have all times, failed rows have none",
        ),
        pa.Check(
            lambda rows: ~rows["ok"] | (rows["n_tokens"] > 0) & (rows["token_sha"] != ""),
            error="ok rows have tokens",
        ),
    ],
    strict=True,
    ordered=True,
    unique=["run_id", "repeat", "request"],
)  # fmt: skip
COLUMNS = tuple(SCHEMA.columns)


def token_sha(token_ids: Sequence[int]) -> str:
    """Hash a sequence of token ids to 16 hex digits."""
    data = b"".join(int(i).to_bytes(8, "little", signed=True) for i in token_ids)
    return hashlib.sha256(data).hexdigest()[:16]


def failed_row(*, error_kind: str, error: str, **keys: Any) -> dict[str, Any]:
    """Return the row of a request that failed, which `keys` identify.

    Such a row can always be written: a kind that is not of `ERROR_KINDS` becomes "other", and
    characters of the message that no file can hold (half a character of a broken path) become "?".
    """
    kind = error_kind if error_kind in ERROR_KINDS else "other"
    return {
        **dict.fromkeys(_BYTES, 0),
        **dict.fromkeys(("queue_ms", *_TIMES), math.nan),
        "n_tokens": 0,
        "token_sha": "",
        "resident_bytes": "{}",
        "note": "",
        **keys,
        "ok": False,
        "error_kind": kind,
        "error": (error or kind).encode("utf-8", "replace").decode(),
    }


_DEAD = ("RayActorError", "ActorDiedError", "WorkerCrashedError", "EngineDeadError", "EngineDied")


def classify_error(error: BaseException) -> str:
    """Return the member of `ERROR_KINDS` that fits an exception or its cause."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return "oom"
    if "out of memory" in str(error).lower():
        return "oom"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    if "no space left on device" in str(error).lower():  # from libraries that drop errno
        return "disk_full"
    if isinstance(error, (EOFError, BrokenPipeError, ConnectionError)):
        return "engine_died"
    if any(name in type(error).__name__ for name in _DEAD):
        return "engine_died"
    if isinstance(error, DjinnError) and isinstance(error, ValueError):
        return "bad_input"
    return classify_error(error.__cause__) if error.__cause__ else "other"


def rows_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a checked frame in the schema's order of columns.

    Raises:
        RecordError: a column is missing, unknown or of the wrong type, or a rule is broken.
    """
    frame = pd.DataFrame(list(rows))
    known = [column for column in COLUMNS if column in frame]
    unknown = [column for column in frame if column not in COLUMNS]
    return check_rows(frame[[*known, *unknown]], "new rows")


def check_rows(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the frame if it fits the schema.

    Raises:
        RecordError: it does not, or it is empty; the message names the first broken rule.
    """
    if frame.empty:
        raise RecordError(f"{where}: expected at least 1 row, got none")
    try:
        SCHEMA.validate(frame.reset_index(drop=True))
    except (pa.errors.SchemaError, pa.errors.SchemaErrors) as error:
        first = error.schema_errors[0] if isinstance(error, pa.errors.SchemaErrors) else error
        raise RecordError(
            f"{where}: expected rows of the schema in djinn_lib/rows.py, got: "
            f"{str(first).splitlines()[0][:300]}"
        ) from error
    return frame


def clock_warning(frame: pd.DataFrame) -> str:
    """Report served requests whose parts exceed their total; "" if there are none.

    Only a measuring error explains that. The other measurements remain valid.
    """
    parts_ms = frame[["queue_ms", "switch_ms", "decode_ms"]].sum(axis=1)
    longest_ms = parts_ms.where(parts_ms > frame["ttft_ms"], frame["ttft_ms"])
    odd = frame[frame["ok"] & (longest_ms > frame["total_ms"] + _TOLERANCE_MS)]
    if odd.empty:
        return ""
    first = odd.iloc[0]
    return (
        f"parts of {len(odd)} of {len(frame)} requests take longer than the whole, the first is "
        f"request {first['request']} of repeat {first['repeat']}: check its system's clocks"
    )


def write_rows(frame: pd.DataFrame, path: Path) -> None:
    """Write checked rows as parquet, atomically.

    Raises:
        RecordError: the rows break the schema; nothing is written.
        OSError: the disk is full or the folder cannot be written to; nothing is left behind.
    """
    check_rows(frame, str(path))
    write_atomically(path, lambda partial: frame.to_parquet(partial, index=False))


def read_rows(path: Path) -> pd.DataFrame:
    """Read and check the rows of a cell.

    Raises:
        RecordError: the file is missing, truncated or breaks the schema.
    """
    return check_rows(_read(path), str(path))


def read_cells(paths: Sequence[Path]) -> pd.DataFrame:
    """Read and check the rows of several cells; they are checked together, which is much faster.

    Raises:
        RecordError: a file is missing, truncated or breaks the schema; the message names it.
    """
    frames = [_read(path) for path in paths]
    rows = pd.concat(frames, ignore_index=True)
    try:
        if len({(frame.empty, *frame.dtypes.items()) for frame in frames}) == 1:
            return check_rows(rows, "all rows")
    except RecordError:
        pass  # which file it is, the checks of each will say
    for path, frame in zip(paths, frames, strict=True):
        check_rows(frame, str(path))
    return rows


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"expected rows in {path}, got {error}: delete the file and run its cell again"
        ) from error


def no_rows() -> pd.DataFrame:
    """Return an empty frame with every column."""
    return pd.DataFrame(columns=list(COLUMNS))


def read_run(run_dir: Path) -> pd.DataFrame:
    """Read the rows of every cell of a run.

    Raises:
        RecordError: there are none, or one file cannot be used.
    """
    paths = sorted((run_dir / "requests").glob("*.parquet"))
    if not paths:
        raise RecordError(
            f"expected rows in {run_dir / 'requests'}, got none: run notebook 02_run_system first"
        )
    return read_cells(paths)
