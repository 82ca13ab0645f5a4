"""Make tables for notebooks, in readable units."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from djinn_lib.analysis.run import Run
from djinn_lib.trace import Trace
from djinn_lib.units import format_bytes, three_digits


def facts_table(machine: Mapping[str, Any]) -> pd.DataFrame:
    """List the facts of `machine.json`: readable sizes and rates, then software versions."""
    facts = []
    for name, value in machine.items():
        if name == "versions" or (name == "gpu_uuid" and value is None):
            continue
        if name.endswith("_rate_bytes_per_s"):
            name = name.removesuffix("_rate_bytes_per_s") + " rate"
            value = "not measured: no GPU" if value is None else f"{value / 1e9:.1f} GB/s"
        elif name.endswith("_us"):
            name, value = name.removesuffix("_us"), f"{value:.1f} µs"
        elif name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes") + " memory", format_bytes(value)
        facts.append((name.replace("_", " "), str(value)))
    facts += [(f"version of {name}", version) for name, version in machine["versions"].items()]
    return pd.DataFrame(facts, columns=["fact", "value"]).set_index("fact")


def machines_table(run: Run) -> pd.DataFrame:
    """List the machines that ran cells of a run, in the order of their first cells.

    `time of others (%)` is the largest share of processor time that the hypervisor gave to other
    guests while a cell ran (steal time). Many hypervisors do not report it; then it is 0.
    """
    rates = ["link_rate", "d2h_rate", "hbm_read_rate"]
    found: dict[int, dict[str, Any]] = {}
    for manifest in sorted(run.all_manifests.values(), key=lambda m: m["started_at_utc"]):
        number = run.machine_numbers[manifest["run_id"]]
        machine, stolen = manifest["machine"], manifest.get("stolen_share") or 0.0
        measured = {f"{name} (GB/s)": _scaled(machine.get(f"{name}_bytes_per_s"), 1e-9)
                    for name in rates}  # fmt: skip
        row = found.setdefault(number, {
            "machine": run.machine_names[number], "device": machine["device_name"], **measured,
            "eager operator (µs)": _scaled(machine.get("eager_operator_us")),
            "time of others (%)": 0.0, "cells": 0,
        })  # fmt: skip
        row["cells"] += 1
        row["time of others (%)"] = max(row["time of others (%)"], round(100 * stolen, 2))
    return pd.DataFrame(found.values()).set_index("machine")


def _scaled(value: float | None, factor: float = 1.0) -> float:
    return float("nan") if value is None else round(value * factor, 1)


def trace_table(traces: Mapping[str, Trace]) -> pd.DataFrame:
    """List the traces: requests, switches, requests for each model, and the hash."""
    rows = []
    for name, trace in traces.items():
        models = [request.model for request in trace.requests]
        counts = {f"requests for {model}": models.count(model) for model in trace.models}
        rows.append(
            {
                "trace": name,
                "requests": len(models),
                "switches": sum(before != after for before, after in pairwise(models)),
                **counts,
                "sha256": trace.sha256[:12],
            }
        )
    return pd.DataFrame(rows).set_index("trace")


def large_rows_table(rows: pd.DataFrame) -> pd.DataFrame:
    """List all rows of models larger than the ring, with errors if any failed."""
    table = rows[["model", "system", "repeat"]].copy()
    table["first token (ms)"] = rows["ttft_ms"]
    table["per token (ms)"] = rows["ms_per_token"]
    table["waited per token (ms)"] = rows["stall_ms_per_token"]
    table["loaded per token (MiB)"] = rows["loaded_bytes_per_token"] / 2**20
    if not rows["ok"].all():
        table["failed because"] = rows["error"]
    return table.set_index(["model", "system", "repeat"])


def shown(table: pd.DataFrame) -> Styler:
    """Return a table for a notebook: as `as_text`, with all rows and full texts."""
    styler = as_text(table).style
    for axis in (0, 1):
        styler.format_index(lambda v: f"{v:g}" if isinstance(v, float) else str(v), axis=axis)
    return styler


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with all values as text: numbers with three digits, "-" for empty."""
    return table.map(_text).astype(object)


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float):
        return three_digits(value)
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value) or "-"
