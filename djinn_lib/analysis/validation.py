"""Validate the simulator: compare simulated rows with measured ones.

Measured rows are those of `SYSTEMS` in a reference run. The fit of the cost model does not use
them: it uses hits, loads and full misses of single models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.analysis.run import REPLICATES
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.metrics import exposed
from djinn_lib.paths import REFERENCE
from djinn_lib.rows import read_rows
from djinn_lib.simulator.cost_model import engine_rows, reference_costs
from djinn_lib.simulator.simulate import simulate
from djinn_lib.trace import paper_trace

SYSTEMS = ("djinn", "djinn_adaptive")  # they differ only in their policy
STATISTICS = {"p50": "median", "mean": "mean", "max": "max"}


def compared(reference: Path = REFERENCE) -> pd.DataFrame:
    """Return measured and simulated requests of every cell of `SYSTEMS`, replicates included.

    Columns: source (the name of the rows' file), request, model, measured_bytes, simulated_bytes,
    measured_ms, simulated_ms. The times are those of whole requests, as medians over the repeats.
    The table is empty if there are no such cells.
    """
    found = []
    patterns = [f"{folder}/*-{system}{again}.parquet"
                for folder, again in (("requests", ""), (REPLICATES, "-[0-9]*"))
                for system in SYSTEMS]  # fmt: skip
    for path in (path for pattern in patterns for path in sorted(reference.glob(pattern))):
        rows, manifest = read_rows(path), read_manifest(path.with_suffix(".manifest.json"))
        rows = rows[rows["ok"]]
        first = rows[rows["repeat"] == rows["repeat"].min()].sort_values("request")
        simulated = _again(first, manifest, reference, manifest["options"].get("policy", "lru"))
        part = pd.DataFrame({
            "source": path.stem,
            "request": first["request"].astype(str).tolist(),
            "model": first["model"].tolist(),
            "measured_bytes": first["loaded_bytes"].tolist(),
            "simulated_bytes": simulated["loaded_bytes"].tolist(),
            "measured_ms": rows.groupby("request")["total_ms"].median().tolist(),
            "simulated_ms": simulated["total_ms"].tolist(),
        })  # fmt: skip
        found.append(part)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def predicted_policies(reference: Path = REFERENCE, cell: str = "zipf-25-djinn") -> pd.DataFrame:
    """Predict the results of a cell of a reference run with other policies.

    One row for each policy, the offline optimum last.

    Raises:
        RecordError: the run has no such cell.
    """
    path = reference / "requests" / f"{cell}.parquet"
    rows, manifest = read_rows(path), read_manifest(path.with_suffix(".manifest.json"))
    first = rows[rows["repeat"] == rows["repeat"].min()].sort_values("request")
    table = {}
    for policy in ("lru", "ewma", "lfu", "adaptive", "oracle"):
        found = _again(first, manifest, reference, policy)
        table[policy] = {
            "loaded (GiB)": found["loaded_bytes"].sum() / 2**30,
            "mean switch (ms)": found["switch_ms"].mean(),
            "mean (ms)": found["total_ms"].mean(),
            "P90 (ms)": found["total_ms"].quantile(0.9),
        }
    result = pd.DataFrame.from_dict(table, orient="index").rename_axis("policy")
    optimum = result["loaded (GiB)"] / result.loc["oracle", "loaded (GiB)"]
    result.insert(1, "bytes / optimum (x)", optimum)
    return result


def _again(
    rows: pd.DataFrame, manifest: Mapping[str, Any], reference: Path, policy: str = "lru"
) -> pd.DataFrame:
    """Simulate the requests of one repeat of a cell."""
    sizes = {name: model["device_bytes"] for name, model in manifest["models"].items()}
    return simulate(
        rows["model"].tolist(),
        sizes,
        int(rows["capacity_bytes"].iloc[0]),
        policy,
        costs=reference_costs(reference, int(rows["n_tokens"].iloc[0])),
        page_bytes=manifest["parameters"]["page_bytes"],
    )


def looking_ahead(
    reference: Path = REFERENCE, capacity: str = "25GiB", n_tokens: int = 50
) -> pd.DataFrame:
    """Predict the benefit of prefetching on the paper's trace, as `arriving.waiting_table` has it.

    All requests are sent at once, except in the first row. The rows are "one after the other",
    "waiting" and "waiting, loading ahead".
    """
    sizes, costs = engine_rows(reference)["sizes"], reference_costs(reference, n_tokens)
    models = [request.model for request in paper_trace(tuple(sizes)).requests]
    ways: dict[str, dict[str, Any]] = {
        "one after the other": {"mode": "sequential"},
        "waiting": {"mode": "concurrent"},
        "waiting, loading ahead": {"mode": "concurrent", "lookahead": True},
    }
    found = {}
    for name, options in ways.items():
        rows = simulate(models, sizes, capacity, costs=costs, **options)
        found[name] = exposed(rows)
        found[name].insert(2, "loaded (GiB)", rows["loaded_bytes"].sum() / 2**30)
    return pd.concat(found).droplevel("system").rename_axis("requests")


def errors(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the simulator's errors, one row for each source.

    Columns: n, bytes_equal (whether all bytes are equal), and the relative errors of P50, mean and
    maximum.
    """
    table = []
    for source, group in requests.groupby("source", sort=False):
        row: dict[str, Any] = {
            "source": source,
            "n": len(group),
            "bytes_equal": bool((group["measured_bytes"] == group["simulated_bytes"]).all()),
        }
        for name, statistic in STATISTICS.items():
            measured = getattr(group["measured_ms"], statistic)()
            row[f"{name}_error"] = getattr(group["simulated_ms"], statistic)() / measured - 1
        table.append(row)
    return pd.DataFrame(table).set_index("source")
