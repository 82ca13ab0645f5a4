"""A synthetic run folder, as the pipeline would leave it, from the rows of `row_factory`."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
from row_factory import CAPACITIES, GPU_SYSTEMS, MIB, SIZES, SYSTEMS, UNAVAILABLE, cell_rows

from djinn_lib.analysis.run import Run
from djinn_lib.experiment.large_results import write_large
from djinn_lib.experiment.manifest import write_manifest
from djinn_lib.rows import COLUMNS, write_rows
from djinn_lib.trace import paper_trace, write_trace

MACHINE = {
    "device": "cpu",
    "device_name": "Test Processor",
    "device_bytes": 8 << 30,
    "cpu": "Test Processor",
    "cores": 2,
    "host_bytes": 8 << 30,
    "system": "Linux 6.1",
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "link_rate_bytes_per_s": 8e9,
    "d2h_rate_bytes_per_s": None,
    "hbm_rate_bytes_per_s": None,
    "eager_operator_us": 3.5,
}
GPU_MACHINE = {
    **MACHINE,
    "device": "cuda",
    "device_name": "Test GPU",
    "device_bytes": 80 << 30,
    "versions": {**MACHINE["versions"], "vllm": "0.24.0", "driver": "580.159.04"},
    "link_rate_bytes_per_s": 8e9,
    "d2h_rate_bytes_per_s": 6e9,
    "hbm_rate_bytes_per_s": 2.9e12,
    "hbm_read_rate_bytes_per_s": 2.8e12,
}


SWEPT = ("djinn", "pytorch_lru", "pytorch_pinned")
FEW = (*SWEPT, "vllm_recreate")


def write_run(folder: Path, gpu: bool = False, few: bool = False) -> Path:
    """Write rows, manifests, the trace, the machine's facts; returns the folder.

    With `few`, there are the systems of `FEW`, what cannot run here, and two capacities.
    """
    shutil.copytree(_template(gpu, few), folder, dirs_exist_ok=True)
    return folder


@cache
def _template(gpu: bool, few: bool) -> Path:
    """A run made once, because checking rows takes a while."""
    folder = Path(tempfile.mkdtemp(prefix="djinn-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    machine, more = (GPU_MACHINE, GPU_SYSTEMS) if gpu else (MACHINE, UNAVAILABLE)
    for name in ("requests", "traces", "notebooks", "figures"):
        (folder / name).mkdir()
    state = {"machine": machine, "models": dict.fromkeys(SIZES, "unused")}
    (folder / "machine.json").write_text(json.dumps(state))
    write_trace(paper_trace(tuple(SIZES)), folder / "traces" / "paper.jsonl")
    for label in ("25", "40") if few else CAPACITIES:
        unavailable = () if gpu else UNAVAILABLE
        everything = (*FEW, *unavailable) if few else (*SYSTEMS, *more)
        for system in everything if label == "25" else SWEPT:
            write_cell(folder, cell_rows(system, label, gpu=gpu), machine)
    return folder


def write_large_rows(folder: Path, started: str = "2026-11-23T07:00:00+00:00") -> pd.DataFrame:
    """Write rows of one model larger than the ring, and their manifest; returns the rows."""
    facts = {"model": "llama", "repeat": 0, "model_bytes": 8 << 30, "capacity_bytes": 2 << 30,
             "link_bytes_per_s": 8e9, "n_tokens": 4, "ttft_ms": 900.0, "stall_ms_per_token": 1.0,
             "token_sha": "0" * 16, "ok": True, "error": ""}  # fmt: skip
    ms_and_bytes = {
        "resident": (30.0, 0),
        "djinn": (900.0, 6 << 30),
        "accelerate": (1800.0, 6 << 30),
    }
    rows = pd.DataFrame(
        {**facts, "system": system, "ms_per_token": ms, "loaded_bytes_per_token": n_bytes}
        for system, (ms, n_bytes) in ms_and_bytes.items()
    )
    write_large(rows, {"profile": "gpu", "started_at_utc": started}, folder)
    return rows


def write_cell(folder: Path, rows: pd.DataFrame, machine: dict = MACHINE) -> None:
    """Write the rows of one cell, and its manifest with how its execution ended."""
    first = rows.iloc[0]
    cell = f"{first['trace']}-{first['capacity_label']}-{first['system']}"
    write_rows(rows[list(COLUMNS)], folder / "requests" / f"{cell}.parquet")
    n_failed = int((~rows["ok"]).sum())
    kind = rows["error_kind"].max()
    state = "ok" if not n_failed else "unavailable" if kind == "unavailable" else "failed"
    status = {
        "task": f"02_run_system.{cell}",
        "state": state,
        "seconds": 1.5,
        "error_kind": kind,
        "error": rows["error"].max(),
    }
    manifest = {**manifest_of(cell, first, machine), "execution": status}
    write_manifest(manifest, folder / "requests" / f"{cell}.manifest.json")


def run_of(rows: pd.DataFrame, machine: dict = GPU_MACHINE) -> Run:
    """A run of rows alone, with a manifest for each run id and the paper's trace; no files."""
    manifests = {}
    for _, row in rows.drop_duplicates("run_id").iterrows():
        cell = f"{row['trace']}-{row['capacity_label']}-{row['system']}"
        manifests[row["run_id"]] = manifest_of(cell, row, machine)
    return Run(Path(), rows, machine, {"paper": paper_trace(tuple(SIZES))}, manifests)


def on_another_machine(
    run: Run, system: str, cell: str = "paper-25-{}", **changed: Callable[[pd.Series], pd.Series]
) -> Run:
    """A run whose cell of a system was measured again, on a second machine, with columns changed.

    The measurement that the run had is kept as a replicate.
    """
    cell = cell.format(system)
    old = run.manifests[cell]
    own = run.rows["run_id"] == old["run_id"]
    again = run.rows[own].assign(run_id=f"again-{system}")
    again = again.assign(**{name: change(again[name]) for name, change in changed.items()})
    manifest = {
        **old,
        "run_id": f"again-{system}",
        "machine": {**old["machine"], "eager_operator_us": 9.0},
        "started_at_utc": "2026-11-25T06:00:00+00:00",
    }
    return replace(
        run,
        rows=pd.concat([run.rows[~own], again], ignore_index=True),
        manifests={**run.manifests, cell: manifest},
        replicates=run.rows[own]
        if run.replicates.empty
        else pd.concat([run.replicates, run.rows[own]]),
        replicate_manifests={**run.replicate_manifests, old["run_id"]: old},
    )


def manifest_of(cell: str, row: pd.Series, machine: dict) -> dict:
    return {
        "run_id": row["run_id"],
        "cell": cell,
        "system": row["system"],
        "options": {},
        "profile": "gpu" if machine["device"] == "cuda" else "cpu",
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "other_gpu_processes": [],
        "versions": machine["versions"],
        "machine": machine,
        "trace_sha256": "0" * 64,
        "models": {
            name: {"bytes": size, "dtype": "float32", "sha256": "0" * 64}
            for name, size in SIZES.items()
        },
        "parameters": {"page_bytes": MIB, "repeats": 1},
        "started_at_utc": "2026-11-23T06:00:00+00:00",
        "wall_s": 10.0,
        "setup_s": 1.0,
        "stolen_share": None,
        "host_loop_us": [],
        "notes": [],
    }
