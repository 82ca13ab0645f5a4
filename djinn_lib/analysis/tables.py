"""The tables that notebooks show: rows and facts in the units that people read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from djinn_lib.metrics import summarise
from djinn_lib.trace import Trace
from djinn_lib.units import format_bytes

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


def machine_numbers(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Number the machines that ran the cells of a run, from 1 on, oldest cell first; by cell.

    Machines of one kind are told apart by what their set-ups measured of them.
    """
    numbers: dict[str, int] = {}
    found = {}
    for cell, manifest in sorted(manifests.items(), key=lambda item: item[1]["started_at_utc"]):
        found[cell] = numbers.setdefault(_facts(manifest["machine"]), len(numbers) + 1)
    return found


def machine_names(
    manifests: Mapping[str, Mapping[str, Any]], listed: Sequence[Mapping[str, Any]] = ()
) -> dict[int, str]:
    """Name the machines of a run, by their numbers.

    Args:
        manifests: of the cells of the run.
        listed: entries of "machines" in machine.json, which merging parts writes. A machine in this
            list has the name of its part. Any other has its number.
    """
    parts: dict[str, str] = {}
    for entry in listed:
        parts.setdefault(_facts(entry["machine"]), str(entry["part"]))
    return {
        number: parts.get(_facts(manifests[cell]["machine"]), str(number))
        for cell, number in machine_numbers(manifests).items()
    }


def _facts(machine: Mapping[str, Any]) -> str:
    """What tells machines apart, as text; versions of packages do not."""
    facts = {name: value for name, value in machine.items() if name != "versions"}
    return json.dumps(facts, sort_keys=True)


def machines_table(
    manifests: Mapping[str, Mapping[str, Any]], names: Mapping[int, str] | None = None
) -> pd.DataFrame:
    """One row a machine that ran cells of a run, oldest cell first: its measures, how many cells.

    Rates are in GB/s, the host's time to start an operator in microseconds. Machines have the names
    given, or their numbers.
    """
    rates = ["link_rate", "d2h_rate", "hbm_read_rate"]
    rows = []
    for cell, number in machine_numbers(manifests).items():
        machine = manifests[cell]["machine"]
        found = {name: machine.get(f"{name}_bytes_per_s") for name in rates}
        operator_us = machine.get("eager_operator_us")
        rows.append(
            {"machine": names[number] if names else number, "device": machine["device_name"]}
            | {f"{name} (GB/s)": round(v / 1e9, 1) if v else None for name, v in found.items()}
            | {"eager operator (µs)": round(operator_us, 1) if operator_us else None}
        )
    table = pd.DataFrame(rows).groupby(list(rows[0]), dropna=False, sort=False).size()
    return table.rename("cells").reset_index().set_index("machine")


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
