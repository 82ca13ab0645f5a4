"""Make tables of the results of a run: systems, steps of the ablation, repeated cells.

Units are in the column names. If the run has rows of several machines, the column "machine" says
where a row comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from djinn_lib import metrics
from djinn_lib.analysis.parts import decomposition
from djinn_lib.analysis.plots.style import order_systems, split_unavailable, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, or_reason, side_by_side
from djinn_lib.metrics import (
    attempted,
    by_request,
    difference_of_means,
    served,
)

_GIB = 2**30
# From whole models to Djinn: each system, and the feature that it adds to the previous one.
STEPS = (
    ("djinn_whole", "whole models, nothing else"),
    ("djinn_partial_no_overlap", "partial residency"),
    ("djinn_eager", "loading behind the prefill"),
    ("djinn_graph", "decoding from CUDA graphs"),
    ("djinn_compiled", "a compiled step"),
    ("djinn", "lookup tables in the host"),
)
SERVED = ["requests", "served (%)", "repeats"]
SERVING, STARTING = "memory, serving (GiB)", "memory, starting (GiB)"  # peaks on the device


def measures(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each system, in the figures' order, with all counts and times.

    The rows are of one trace, capacity and mode. Systems that cannot run here get no row.
    """
    by_system = dict(iter(attempted(rows).groupby("system")))
    names = pd.Index(order_systems(by_system), name="system")
    columns = list(_measures(run, rows.iloc[:0]))  # the same columns even if nothing could run
    return pd.DataFrame([_measures(run, by_system[name]) for name in names], names, columns)


def _measures(run: Run, rows: pd.DataFrame) -> dict[str, Any]:
    return {
        **metrics.measures(rows),
        SERVING: serving_gib(run, rows),
        STARTING: _peak_gib(run, rows),
        "vLLM": _vllm(run, rows),
        "machine": run.machines_of(rows),
    }


def _of_manifests(run: Run, rows: pd.DataFrame) -> list[Mapping[str, Any]]:
    ids = set(rows["run_id"])
    return [manifest for manifest in run.all_manifests.values() if manifest["run_id"] in ids]


def _peak_gib(run: Run, rows: pd.DataFrame) -> float:
    """Peak device memory of cells that started their system; NaN if it was not recorded."""
    return _most_gib(m.get("peak_device_bytes") for m in _of_manifests(run, rows)
                     if not m.get("running_since"))  # fmt: skip


def serving_gib(run: Run, rows: pd.DataFrame) -> float:
    """Peak device memory while a system served; NaN if it was not recorded.

    Engines of vLLM take more while they start. Manifests of older cells have only one peak. Where
    such a cell started its system, the peaks of later cells of the same running system are used.
    """
    return _most_gib(_serving_bytes(run, manifest) for manifest in _of_manifests(run, rows))


def _most_gib(found: Iterable[int | None]) -> float:
    return max((n_bytes / _GIB for n_bytes in found if n_bytes), default=float("nan"))


def _serving_bytes(run: Run, manifest: Mapping[str, Any]) -> int | None:
    if noted := manifest.get("serving_device_bytes"):
        return int(noted)
    if manifest.get("running_since"):
        return manifest.get("peak_device_bytes")
    later = [m.get("peak_device_bytes") or 0 for m in run.all_manifests.values()
             if m.get("running_since") == manifest["cell"]
             and m.get("gpu_uuid") == manifest.get("gpu_uuid")
             and m["started_at_utc"] > manifest["started_at_utc"]]  # fmt: skip
    return max(later, default=0) or None


def _vllm(run: Run, rows: pd.DataFrame) -> str:
    """Versions of vLLM that served the rows; "" for systems without vLLM."""
    if not rows["system"].str.contains("vllm").any():
        return ""
    found = {m["versions"].get("vllm", "not noted") for m in _of_manifests(run, rows)}
    return ", ".join(sorted(found))


def by_system(column: pd.Series) -> pd.Series:
    """Sort key: the column "system" in the figures' order, others by their values."""
    if column.name != "system":
        return column
    return column.map({name: place for place, name in enumerate(order_systems(column))})


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Replace system ids by labels, and drop columns that say nothing."""
    table = table.rename(index=lambda name: system_look(name).label, level="system")
    empty = [name for name in (SERVING, STARTING, "vLLM")
             if name in table and not table[name].replace("", None).notna().any()]  # fmt: skip
    same = ["machine"] if table["machine"].nunique() < 2 else []
    return table.drop(columns=[*empty, *same])


def systems_table(run: Run, trace: str = "paper", capacity_label: str = "25") -> pd.DataFrame:
    """Return one row for each system: latencies, switches, bytes, shares of limits.

    `link share` is the time that the moved bytes need at the link's rates, divided by the time of
    the switches: above 100% if copies overlap with computing. For `ceiling reached` see
    `decomposition`. A system that cannot run on this machine has a row with the reason.

    Raises:
        RecordError: there are no rows of that trace and capacity.
    """
    rows = run.cells(trace, capacity_label)
    table, parts = measures(run, rows), decomposition(run, {}, trace, capacity_label)
    moving_ms = parts["copy (ms)"] + parts["write-back (ms)"]
    switch_ms = moving_ms + parts["rest of the switch (ms)"]
    table["link share (%)"] = (100 * moving_ms / switch_ms).where(switch_ms > 0)
    table["ceiling reached (%)"] = parts["ceiling reached (%)"]
    _, unavailable = split_unavailable(rows)
    if unavailable:
        table = table.reindex([*table.index, *unavailable]).rename_axis("system")
        table["not run because"] = pd.Series(unavailable).reindex(table.index).fillna("")
    columns = [*SERVED, "P50 (ms)", "P90 (ms)", "max (ms)", "mean (ms)", "mean switch (ms)",
               "loaded (GiB)", "written back (GiB)", "loaded nothing (%)", "link share (%)",
               "ceiling reached (%)", SERVING, STARTING, "vLLM", "machine",
               "not run because"]  # fmt: skip
    return labelled(table[[name for name in columns if name in table]])


@or_reason
def ablation_table(run: Run, trace: str = "paper", capacity_label: str = "25") -> pd.DataFrame:
    """Return the latency that each step from whole models to Djinn saves.

    A step that was not measured is merged into the next measured one. Differences of the mean are
    paired by request, and are those of the newest machine that ran both steps, with replicates if
    necessary. There is none if no machine ran both.

    Raises:
        RecordError: there are no rows of that trace and capacity.
    """
    rows = run.cells(trace, capacity_label)
    table, lines, whats = measures(run, rows), {}, []
    before: str | None = None
    for system, what in STEPS:
        whats.append(what)
        if system not in table.index:
            continue
        line = table.loc[system].to_dict()
        if before is not None:
            line |= _saved(run, before, system, trace=trace, capacity_label=capacity_label)
        step = " + ".join(whats)
        lines[step if before is None else f"+ {step}", system] = line
        before, whats = system, []
    if not lines:
        raise NotMeasured(f"no step of the ablation was run: {[system for system, _ in STEPS]}")
    table = pd.DataFrame.from_dict(lines, orient="index").rename_axis(["step", "system"])
    columns = [*SERVED, "mean (ms)", "without decoding (ms)", "mean switch (ms)", "loaded (GiB)",
               "mean saved (ms)", "low (ms)", "high (ms)", "saved on", "machine"]  # fmt: skip
    table = table.reindex(columns=columns)
    several = len(set(run.machine_numbers.values())) > 1
    return table if several else table.drop(columns=["machine", "saved on"])


def _saved(run: Run, before: str, system: str, **where: Any) -> dict[str, Any]:
    """Return how much lower the mean of a system is than that of the step before it, and where."""
    try:
        pair = side_by_side(run, [before, system], **where)
    except NotMeasured:
        return {}
    saved = difference_of_means(*(by_request(served(rows)) for rows in pair.values()))
    names = ("mean saved (ms)", "low (ms)", "high (ms)")
    return {**dict(zip(names, saved, strict=True)), "saved on": run.machines_of(pair[system])}


def replicates_table(run: Run) -> pd.DataFrame:
    """Return all measurements of the cells that were measured again, oldest first."""
    columns = ["machine", *SERVED, "P50 (ms)", "mean (ms)", "mean switch (ms)",
               "mean decode (ms)", "slowest / fastest decode (x)", "loaded (GiB)"]  # fmt: skip
    again = {manifest["cell"] for manifest in run.replicate_manifests.values()}
    found = [m for m in run.all_manifests.values() if m["cell"] in again]
    if not found:
        return pd.DataFrame(columns=columns)
    by_run = dict(iter(run.every_row.groupby("run_id")))
    table = pd.concat(
        measures(run, by_run[m["run_id"]]).assign(cell=m["cell"], started=m["started_at_utc"])
        for m in found
    )
    table = table.reset_index().sort_values(["system", "cell", "started"], key=by_system)
    return table.set_index("cell")[columns]


def large_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the time per token of models larger than the ring, for each system.

    `these at the link's rate` is the time to copy the bytes of one token at the best measured rate.
    The ceiling is the longer of that time and of the computing time with everything resident.
    Failed systems have their error and no numbers.
    """
    groups = rows.groupby(["model", "system"], sort=False)
    n_bytes = groups["loaded_bytes_per_token"].median()
    table = pd.DataFrame({
        "model (GiB)": groups["model_bytes"].first() / _GIB,
        "ring (GiB)": groups["capacity_bytes"].first() / _GIB,
        "repeats": groups["ok"].sum(),
        "per token (ms)": groups["ms_per_token"].median(),
        "per token (GiB)": n_bytes / _GIB,
        "these at the link's rate (ms)": n_bytes / rows["link_bytes_per_s"].max() * 1e3,
        "failed because": groups["error"].max(),
    })  # fmt: skip
    resident = rows[rows["system"] == "resident"].groupby("model")["ms_per_token"].median()
    computing = table.index.get_level_values("model").map(resident)
    ceiling = table[["these at the link's rate (ms)"]].assign(computing=computing).max(axis=1)
    share = 100 * ceiling / table["per token (ms)"]
    table.insert(len(table.columns) - 1, "share of the ceiling (%)", share)
    return table if table["failed because"].any() else table.drop(columns="failed because")
