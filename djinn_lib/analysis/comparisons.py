"""Make tables of the main comparisons: ratios of latencies, and equal tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import nan
from typing import Any, NamedTuple

import pandas as pd

from djinn_lib.analysis.claim_times import paired_ratio, statistic_ratio
from djinn_lib.analysis.plots.style import order_systems, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import (
    MAIN_TRACE,
    NotMeasured,
    need_clocks,
    on_each_machine,
    or_reason,
    served,
)

Paper = Mapping[str, Any]
# Variants of sleep mode; the best one is compared.
SLEEP = ["vllm_sleep", "vllm_sleep_naive", "vllm_sleep_core_process", "vllm_sleep_readonly"]


class Pair(NamedTuple):
    """A comparison: the slower side (the best of several systems), the faster one, statistics."""

    slow: str | list[str]
    fast: str
    statistics: tuple[str, ...] = ("p50", "mean")
    in_paper: tuple[str, str] | None = None  # the pair that the paper compares
    trace: str = MAIN_TRACE


PAIRS = (
    Pair("pytorch_pinned", "djinn_eager", in_paper=("pytorch_pinned", "djinn")),
    Pair("pytorch_pinned", "djinn", in_paper=("pytorch_pinned", "djinn")),
    Pair("pytorch_pinned_decoder", "djinn_compiled"),
    Pair("pytorch_pinned_readonly_decoder", "djinn_compiled"),
    Pair("pytorch_lru_decoder", "djinn_compiled"),
    Pair("vllm_recreate", "djinn", ("p50",), ("vllm_recreate", "djinn")),
    Pair("vllm_recreate", "vllm_sleep", ("p50",)),
    Pair(SLEEP, "djinn", ("p50", "mean", "p90", "max")),
    Pair("vllm_sleep", "djinn", ("p50", "mean", "p90", "max")),
    Pair("vllm_sleep", "djinn", ("p50", "mean", "p90"), trace="zipf"),
    Pair("vllm_sleep_readonly", "djinn", ("p50", "mean", "p90"), trace="zipf"),
)
_TRANSFORMERS = ("pytorch_pinned", "pytorch_lru")  # they emit transformers' own tokens
_GIB = 2**30


def ratio_table(run: Run, paper: Paper) -> pd.DataFrame:
    """Return how many times lower latencies of one system are than those of another.

    The paper's Djinn decodes with transformers' own steps, as its PyTorch pinned does. The system
    here that does the same is `djinn_eager`. For vLLM's sleep mode, the best variant in each
    statistic is used. A ratio below 1 means that the latency is higher. `n` is the number of paired
    requests. A ratio that cannot be measured has the reason instead.
    """
    pairs = [pair for pair in PAIRS if pair.trace in run.traces]
    rows = [_ratio(run, paper, pair, statistic) for pair in pairs for statistic in pair.statistics]
    return pd.DataFrame(rows).set_index(["trace", "latency of", "over that of", "statistic"])


def _ratio(run: Run, paper: Paper, pair: Pair, statistic: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trace": pair.trace,
        "latency of": (
            system_look(pair.slow).label
            if isinstance(pair.slow, str)
            else "vLLM sleep, the best form"
        ),
        "over that of": system_look(pair.fast).label,
        "statistic": statistic.upper() if statistic[0] == "p" else statistic,
    }
    key = f"{statistic}_total_ms"
    said = [paper["systems"].get(system, {}).get(key, nan) for system in pair.in_paper or ()]
    row["paper (x)"] = said[0] / said[1] if said else nan
    try:
        need_clocks(run)
        found = statistic_ratio(run, pair.slow, pair.fast, statistic, trace=pair.trace)
    except NotMeasured as reason:
        return {**row, "measured (x)": nan, "low (x)": nan, "high (x)": nan, "n": 0,
                "remark": str(reason)}  # fmt: skip
    low, high = found.interval or (nan, nan)
    return {**row, "measured (x)": found.value, "low (x)": low, "high (x)": high, "n": found.n,
            "remark": found.remark}  # fmt: skip


@or_reason
def machine_ratio_table(run: Run) -> pd.DataFrame:
    """Return the ratios of `ratio_table` at each capacity, on each machine that ran both systems.

    `measured` is the day on which the slower system's rows begin. Ratios have 95% intervals over
    the `n` requests; how far machines differ is not in them.
    """
    need_clocks(run)
    both = ((slow, pair) for pair in PAIRS for slow in _names(pair.slow))
    pairs = dict.fromkeys((pair.trace, slow, pair.fast) for slow, pair in both)
    found = [row for trace, slow, fast in pairs if trace in run.traces
             for row in _on_each_machine(run, trace, slow, fast)]  # fmt: skip
    if not found:
        raise NotMeasured("no machine ran two of the systems that are compared")
    return pd.DataFrame(found).set_index(["trace", "capacity", "latency of", "over that of"])


def _names(systems: str | list[str]) -> list[str]:
    return [systems] if isinstance(systems, str) else systems


def _on_each_machine(run: Run, trace: str, slow: str, fast: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each capacity and machine."""
    by_room = run.every_row.sort_values("capacity_bytes")
    for capacity in map(str, by_room["capacity_label"].unique()):
        try:
            each = on_each_machine(run, [slow, fast], trace=trace, capacity_label=capacity)
        except NotMeasured:
            continue
        for number, both in sorted(each.items()):
            row: dict[str, Any] = {
                "trace": trace,
                "capacity": capacity,
                "latency of": system_look(slow).label,
                "over that of": system_look(fast).label,
                "machine": run.machine_names[number],
                "measured": _day(run, both[slow]),
            }
            for statistic, name in (("p50", "P50"), ("p90", "P90"), ("mean", "mean")):
                ratio = paired_ratio(run, slow, both, fast, statistic)
                row[f"{name} (x)"] = ratio.value
                row[f"{name} low (x)"], row[f"{name} high (x)"] = ratio.interval or (nan, nan)
            yield {**row, "n": ratio.n}


def _day(run: Run, rows: pd.DataFrame) -> str:
    begun = [m["started_at_utc"] for m in run.all_manifests.values()
             if m["run_id"] in set(rows["run_id"])]  # fmt: skip
    return min(begun)[:10]


@or_reason
def token_table(run: Run) -> pd.DataFrame:
    """Return the share of requests whose tokens differ from those of transformers.

    There is a row for each trace and system. `in another repeat` counts requests whose tokens
    differ between repeats of the same system. `logits apart` is how far the logits of Djinn's
    decoder are from transformers' in the model where it is most, a share of their norm; cells that
    did not record it have none, and a run without such a record has no such column.
    """
    found = {}
    for trace in run.traces:
        names = order_systems(run.other_cells(trace, "25")["system"])
        reference = next((name for name in _TRANSFORMERS if name in names), "")
        for system in (name for name in names if reference and name != reference):
            try:
                found[trace, system_look(system).label] = _tokens(run, system, reference, trace)
            except NotMeasured:
                continue
    if not found:
        raise NotMeasured("no system was run on a trace together with PyTorch's systems")
    table = pd.DataFrame.from_dict(found, orient="index").rename_axis(["trace", "system"])
    return table.dropna(axis=1, how="all")


def _tokens(run: Run, system: str, reference: str, trace: str) -> dict[str, float]:
    own, theirs = (served(run, name, trace=trace) for name in (system, reference))
    together = pd.concat([own, theirs])
    both = together.groupby("request")["system"].transform("nunique") == 2
    other = together[both].groupby("request")["token_sha"].nunique() > 1
    again = own.groupby("request")["token_sha"].nunique() > 1
    return {
        "requests": len(other),
        "with other tokens": int(other.sum()),
        "with other tokens (%)": 100 * other.mean(),
        "in another repeat": int(again.sum()),
        "logits apart (%)": 100 * _logits_apart(run, own),
    }


def _logits_apart(run: Run, rows: pd.DataFrame) -> float:
    """The greatest recorded distance of logits from transformers'; NaN where there is none."""
    ids = set(rows["run_id"])
    recorded = [m.get("decoding") or {} for m in run.all_manifests.values() if m["run_id"] in ids]
    found = [facts["logits_distance"] for models in recorded for facts in models.values()]
    return max(found, default=nan)
