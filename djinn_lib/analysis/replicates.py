"""Replicates: cells that were measured more than once, on other machines or at other times.

A run has one measurement of each cell, in `requests/`, which tables and figures show. What else was
measured of the same cell is kept beside it: it tells how much a result depends on the machine and
the moment, and lets two systems be compared on a machine that both ran on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.experiment.manifest import read_manifest, write_manifest
from djinn_lib.rows import no_rows, read_rows, write_rows

FOLDER = "replicates"


def write_replicate(
    rows: pd.DataFrame, manifest: Mapping[str, Any], run_dir: Path, notebook: Path | None = None
) -> None:
    """Write one measurement of a cell into a run's folder, with its notebook if there is one.

    Raises:
        RecordError: rows or manifest break their schema.
    """
    path = run_dir / FOLDER / f"{manifest['run_id']}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(rows, path)
    write_manifest(manifest, path.with_suffix(".manifest.json"))
    if notebook is not None and notebook.exists():
        shutil.copy(notebook, path.with_suffix(".ipynb"))


def read_replicates(run_dir: Path) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Return the rows of all replicates of a run, and their manifests by run id.

    Both are empty where a run has none.

    Raises:
        RecordError: rows or a manifest cannot be read.
    """
    paths = sorted((run_dir / FOLDER).glob("*.parquet"))
    manifests = [read_manifest(path.with_suffix(".manifest.json")) for path in paths]
    frames = [read_rows(path) for path in paths]
    rows = pd.concat(frames, ignore_index=True) if frames else no_rows()
    return rows, {manifest["run_id"]: manifest for manifest in manifests}
