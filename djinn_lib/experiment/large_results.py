"""Rows of models larger than the ring: written, read and checked.

Rows are next to those of requests in a run's folder, as `large_models.parquet`, and have a manifest
of their own. One row is one repeat of one system on one model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.errors import RecordError
from djinn_lib.files import write_atomically, write_json

NOTEBOOK = "07_large_models"
ROWS, MANIFEST = FILES = "large_models.parquet", "large_models.manifest.json"
SYSTEMS = ("resident", "djinn", "accelerate")
# link_bytes_per_s: of the machine that ran the row, measured before it.
COLUMNS = (
    "model", "system", "repeat", "model_bytes", "capacity_bytes", "link_bytes_per_s", "n_tokens",
    "ms_per_token", "ttft_ms", "loaded_bytes_per_token", "stall_ms_per_token", "token_sha", "ok",
    "error",
)  # fmt: skip


def write_large(rows: pd.DataFrame, manifest: Mapping[str, Any], folder: Path) -> None:
    """Write rows and manifest into a run's folder, each whole or not at all."""
    write_atomically(folder / ROWS, lambda path: rows.to_parquet(path, index=False))
    write_json(folder / MANIFEST, manifest)


def read_large(folder: Path) -> pd.DataFrame:
    """Read the rows of a run's folder.

    Raises:
        RecordError: there are none, or they break the schema.
    """
    path = folder / ROWS
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"expected rows of models larger than the ring in {path}, got {type(error).__name__}: "
            f"run notebook {NOTEBOOK} first"
        ) from error
    if missing := [column for column in COLUMNS if column not in rows]:
        raise RecordError(f"expected the columns {COLUMNS} in {path}, got none named {missing}")
    return rows


def profile_of(folder: Path) -> str:
    """Return the name of the profile that the rows of a run's folder were measured with.

    Raises:
        RecordError: their manifest is missing or broken.
    """
    try:
        return str(json.loads((folder / MANIFEST).read_text())["profile"])
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(
            f"expected a manifest with a profile in {folder / MANIFEST}, got {error!r}: run "
            f"notebook {NOTEBOOK} again"
        ) from error
