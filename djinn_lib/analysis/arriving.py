"""Make tables of requests that are sent as they arrive, and so may wait for others."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan

import pandas as pd

from djinn_lib.analysis.claim_times import statistic_ratio
from djinn_lib.analysis.plots.style import system_look
from djinn_lib.analysis.results import SERVED, SERVING, by_system, measures, serving_gib
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, could_not_batch, need_clocks, side_by_side
from djinn_lib.metrics import attempted, block_length, by_request, exposed, latency, share_interval
from djinn_lib.trace import Trace


def waiting_table(run: Run, trace: str = "paper", capacity_label: str = "25") -> pd.DataFrame:
    """Return one row for each system in concurrent mode: the remaining cost of switches.

    Switches are counted after the first touch of each model. For comparison, the first row has
    Djinn in sequential mode. Systems that were prevented from batching are left out. Only rows of
    the same machine may be compared.
    """
    columns = [*SERVED, "mean later switch (ms)", "longest later switch (ms)", "loaded (GiB)",
               "all done (s)", SERVING, "machine"]  # fmt: skip
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

    The traces are those named `traces`, or `traces` and "_" with more. A request is in time if done
    `target_ms` after its arrival; `low` and `high` are the 95% interval of that share. Only rows of
    the same machine may be compared.

    Raises:
        NotMeasured: the run has no rows of such a trace.
    """
    rates, rows = _arriving(run, traces)
    table = load_table(rows, rates, target_ms)
    table = table.sort_values(["rate", "system"], key=by_system)
    cells = {(system, rates[str(trace)]): part
             for (system, trace), part in rows.groupby(["system", "trace"])}  # fmt: skip
    parts = [cells[line.system, line.rate] for line in table.itertuples()]
    table["machine"] = [run.machines_of(part) for part in parts]
    table["memory"] = [serving_gib(run, part) for part in parts]
    shares = [_in_time_interval(part, target_ms) for part in parts]
    table["low"], table["high"] = zip(*shares, strict=True)
    table["system"] = [system_look(name).label for name in table["system"]]
    named = {
        "rate": "arrivals (/s)", "system": "system", "machine": "machine", "n": "requests",
        "ttft_p50": "first token, P50 (ms)", "total_p50": "P50 (ms)", "total_p90": "P90 (ms)",
        "total_max": "slowest (ms)", "in_time": f"within {target_ms / 1e3:g} s (%)",
        "low": "low (%)", "high": "high (%)", "memory": SERVING,
    }  # fmt: skip
    return table[list(named)].rename(columns=named).set_index("arrivals (/s)")


def _arriving(run: Run, traces: str) -> tuple[dict[str, float], pd.DataFrame]:
    """Return the rates of the traces with such names, and the attempted rows of these traces."""
    rates = {name: _rate_per_s(trace) for name, trace in run.traces.items()
             if name == traces or name.startswith(f"{traces}_")}  # fmt: skip
    rows = attempted(run.rows[run.rows["trace"].isin(list(rates))])
    rows = rows[rows["mode"] == "concurrent"]
    if rows.empty:
        raise NotMeasured(f"this run has no rows of a trace named {traces} or {traces}_*")
    return rates, rows


def _rate_per_s(trace: Trace) -> float:
    """Mean arrivals a second; the paper's trace has the mean gap between two instead."""
    rate, gap_s = trace.params.get("rate_per_s"), trace.params.get("mean_gap_s")
    return float(rate) if rate else 1 / float(gap_s) if gap_s else nan


def _in_time_interval(rows: pd.DataFrame, target_ms: float) -> tuple[float, float]:
    """The 95% interval of the share of requests in time, in percent."""
    in_time = (rows["ok"] & (rows["total_ms"] <= target_ms)).groupby(rows["request"]).mean()
    _, low, high = share_interval(in_time, block_length(len(in_time)))
    return 100 * low, 100 * high


def load_ratio_table(run: Run, traces: str, to: str = "djinn_vllm") -> pd.DataFrame:
    """Return how many times the latency of `to` every other system takes, at each arrival rate.

    Each pair is from the newest machine that ran both; requests are paired, and drawn in blocks for
    the interval. There are ratios of the mean and of the 90th percentile, each with `low` and
    `high`; below 1 the system is faster than `to`. Pairs that no machine ran are left out.

    Raises:
        NotMeasured: the run has no such pair, or its times do not count.
    """
    need_clocks(run)
    rates, rows = _arriving(run, traces)
    pairs = rows[["system", "trace"]].drop_duplicates().query("system != @to")
    pairs = pairs.assign(rate=pairs["trace"].map(rates)).sort_values(
        ["rate", "system"], key=by_system
    )
    found = []
    for system, trace, rate in pairs.itertuples(index=False):
        line = {"arrivals (/s)": rate, "system": system_look(system).label}
        try:
            for statistic, name in (("mean", "mean"), ("p90", "P90")):
                ratio = statistic_ratio(run, system, to, statistic, trace=trace, mode="concurrent")
                low, high = ratio.interval or (nan, nan)
                line |= {f"{name} (x)": ratio.value, f"{name}, low (x)": low,
                         f"{name}, high (x)": high}  # fmt: skip
            both = side_by_side(run, [system, to], trace=trace, mode="concurrent")
        except NotMeasured:
            continue
        found.append({**line, "n": ratio.n, "machine": run.machines_of(both[to])})
    if not found:
        raise NotMeasured(f"no machine ran {to} and another system on a trace named {traces}_*")
    return pd.DataFrame(found).set_index("arrivals (/s)")


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
