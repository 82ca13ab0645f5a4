"""Make tables of requests that are sent as they arrive, and so may wait for others."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from djinn_lib.analysis.plots.style import system_look
from djinn_lib.analysis.results import SERVED, by_system, measures
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, could_not_batch
from djinn_lib.metrics import attempted, by_request, exposed, latency


def waiting_table(run: Run, trace: str = "paper", capacity_label: str = "25") -> pd.DataFrame:
    """Return one row for each system in concurrent mode: the remaining cost of switches.

    Switches are counted after the first touch of each model. For comparison, the first row has
    Djinn in sequential mode. Systems that were prevented from batching are left out. Only rows of
    the same machine may be compared.
    """
    columns = [*SERVED, "mean later switch (ms)", "longest later switch (ms)", "loaded (GiB)",
               "all done (s)", "machine"]  # fmt: skip
    alone = run.other_cells(trace, capacity_label)
    waiting = run.concurrent_cells(trace, capacity_label)
    modes = {
        "sequential": alone[alone["system"] == "djinn"],
        "concurrent": waiting[~could_not_batch(run, waiting)],
    }
    found = {mode: measures(run, rows).join(exposed(rows))
             for mode, rows in modes.items() if len(rows)}  # fmt: skip
    if not found:
        return pd.DataFrame(columns=columns)
    table = pd.concat(found, names=["mode", "system"])[columns]
    return table.rename(index=lambda name: system_look(name).label, level="system")


def rates_table(run: Run, traces: str, target_ms: float) -> pd.DataFrame:
    """Return one row for each arrival rate and system: latencies, and the share in time.

    The traces are those whose names begin with `traces` and "_". A request is in time if it is done
    `target_ms` after its arrival. Only rows of the same machine may be compared.

    Raises:
        NotMeasured: the run has no rows of such a trace.
    """
    rates = {name: float(trace.params["rate_per_s"]) for name, trace in run.traces.items()
             if name.startswith(f"{traces}_")}  # fmt: skip
    rows = attempted(run.rows[run.rows["trace"].isin(list(rates))])
    if rows.empty:
        raise NotMeasured(f"this run has no rows of a trace named {traces}_*")
    table = load_table(rows, rates, target_ms)
    table = table.sort_values(["rate", "system"], key=by_system)
    ran = {(system, rates[str(trace)]): run.machines_of(part)
           for (system, trace), part in rows.groupby(["system", "trace"])}  # fmt: skip
    table["machine"] = [ran[line.system, line.rate] for line in table.itertuples()]
    table["system"] = [system_look(name).label for name in table["system"]]
    named = {
        "rate": "arrivals (/s)", "system": "system", "machine": "machine", "n": "requests",
        "ttft_p50": "first token, P50 (ms)", "total_p50": "P50 (ms)", "total_p90": "P90 (ms)",
        "total_max": "slowest (ms)", "in_time": f"within {target_ms / 1e3:g} s (%)",
    }  # fmt: skip
    return table[list(named)].rename(columns=named).set_index("arrivals (/s)")


def load_table(rows: pd.DataFrame, rates: Mapping[str, float], target_ms: float) -> pd.DataFrame:
    """Return one row for each system and rate.

    The columns are `n`, statistics of both times, and `in_time`. A column of statistics is named by
    the time, "_" and a statistic of `metrics.latency`, such as "ttft_p50". `in_time` is in percent.
    """
    found = []
    for (system, trace), part in rows.groupby(["system", "trace"]):
        in_time = part["ok"] & (part["total_ms"] <= target_ms)
        line = {"system": system, "rate": rates[str(trace)], "in_time": 100 * in_time.mean(),
                "n": part["request"].nunique()}  # fmt: skip
        for column in ("ttft", "total"):
            times = latency(by_request(part, f"{column}_ms"))
            line |= {f"{column}_{name}": value for name, value in times.items()}
        found.append(line)
    return pd.DataFrame(found).sort_values("rate")
