"""The tables that notebooks show: rows and facts in the units that people read."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from djinn_lib.analysis.run import Run
from djinn_lib.metrics import summarise
from djinn_lib.trace import Trace
from djinn_lib.units import format_bytes, three_digits

_MIB = 1 << 20


def facts_table(machine: Mapping[str, Any]) -> pd.DataFrame:
    """One row a fact of `machine.json`: sizes and rates for people, then software versions."""
    facts = []
    for name, value in machine.items():
        if name == "versions":
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
    """One row a machine that ran cells of a run, the oldest cell's first: what it measured.

    `time of others (%)` is the greatest share of the processors' time that the hypervisor gave to
    others while a cell ran; many hypervisors do not say, which reads as none.
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
    """One row a trace: requests, switches, how often each model is asked for, and the hash."""
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


def cell_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The summary of one cell, one measure a line."""
    summaries = summarise(rows).rename(columns={"zero_load_share": "hit"}).to_dict("records")
    measures = summaries[0] if summaries else {}
    if errors := rows.loc[~rows["ok"], "error"].tolist():
        measures["first error"] = errors[0]
    return pd.DataFrame({"value": pd.Series(measures, dtype=object)})


def request_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a request: the split of its latency in ms and its weights in MiB."""
    table = rows[["repeat", "request", "model"]].copy()
    for column in ("loaded", "evicted", "writeback", "resident_before"):
        table[f"{column}_mib"] = rows[f"{column}_bytes"] / _MIB
    for column in ("switch_ms", "ttft_ms", "decode_ms", "total_ms"):
        table[column] = rows[column]
    table["failed because"] = rows["error"]
    return table.set_index(["repeat", "request"]).round(1)


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with every value as a text: numbers with three digits, "-" for nothing."""
    return table.map(_text).astype(object)


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float):
        return three_digits(value)
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value) or "-"
