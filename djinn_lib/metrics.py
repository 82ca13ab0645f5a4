"""Numbers from rows: summaries, intervals, ratios.

Rows of systems that cannot run on this machine (error_kind "unavailable") are not counted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

HIT_MS = 10.0  # the paper's bound for a switch that costs nearly nothing
CELL = ["system", "trace", "capacity_label", "mode"]
Interval = tuple[float, float, float]  # value, low, high
STATISTICS: dict[str, Callable[..., Any]] = {
    "p50": np.median,
    "p90": partial(np.quantile, q=0.9),
    "p99": partial(np.quantile, q=0.99),
    "mean": np.mean,
    "max": np.max,
}
_NOTHING: Interval = (float("nan"), float("nan"), float("nan"))


def attempted(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests that were attempted: all but those of unavailable systems."""
    return rows[rows["error_kind"] != "unavailable"]


def served(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests that were served."""
    return rows[rows["ok"]]


def sequential(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests that were served one after another."""
    return rows[rows["mode"] == "sequential"]


def later_switches(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests for another model than the one before, first touches left out.

    The first request of a repeat for a model must load it in every system. Failed requests stay in,
    because what was asked for before a request counts, served or not.
    """
    rows = rows.sort_values([*CELL, "repeat", "request"])
    repeats = rows.groupby([*CELL, "repeat"], sort=False)
    changed = rows["model"] != repeats["model"].shift()
    again = rows.groupby([*CELL, "repeat", "model"], sort=False).cumcount() > 0
    return rows[changed & again]


def later_touches(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests for a model that was asked for before in the same repeat."""
    rows = rows.sort_values([*CELL, "repeat", "request"])
    return rows[rows.groupby([*CELL, "repeat", "model"], sort=False).cumcount() > 0]


def prefill_ms(rows: pd.DataFrame) -> pd.Series:
    """Time of the prompt's forward pass: the total without its other parts."""
    parts = rows["queue_ms"] + rows["switch_ms"] + rows["decode_ms"]
    return (rows["total_ms"] - parts).clip(lower=0).rename("prefill_ms")


def mean_before_decode_ms(rows: pd.DataFrame) -> float:
    """Mean latency without the decode, which eager systems do at the pace of the host."""
    return float((rows["total_ms"] - rows["decode_ms"]).mean())


def decode_multiples(rows: pd.DataFrame, *alike: str) -> pd.Series:
    """Return each decode as a multiple of the fastest of its model and number of tokens.

    NaN for requests that failed. Only rows with the same values in the columns `alike` are
    compared.
    """
    decode_ms = rows["decode_ms"].where(rows["ok"])
    keys = [rows[column] for column in ("model", "n_tokens", *alike)]
    return decode_ms / decode_ms.groupby(keys).transform("min")


def decode_spread(rows: pd.DataFrame) -> float:
    """Return how many times longer the slowest decode of a model took than its fastest.

    Of several models, the one where it is greatest. NaN where no request was served.
    """
    return float(decode_multiples(rows).max())


def difference_of_means(
    one: Sequence[float] | pd.Series, other: Sequence[float] | pd.Series, seed: int = 0
) -> Interval:
    """Return the mean of one sample less that of another, with its interval.

    By the percentile bootstrap, resampling both sides independently.
    """
    first, second = np.asarray(one, float), np.asarray(other, float)
    if first.size == 0 or second.size == 0:
        return _NOTHING
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(side, (2000, side.size)).mean(axis=1) for side in (first, second)]
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return float(first.mean() - second.mean()), float(low), float(high)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cell (system, trace, capacity_label, mode).

    Columns: n, completed, failed, repeats, p50/p90/p99/mean/max of total_ms and ttft_ms,
    mean_switch_ms, hit_share (switch below `HIT_MS`), zero_load_share (nothing loaded), and
    loaded/evicted/writeback bytes of one repeat. `p99_is_max` says that n is too small for a 99th
    percentile, and the maximum stands in its place.
    """
    groups = dict(list(attempted(rows).groupby(CELL, sort=False)))
    index = pd.MultiIndex.from_tuples(groups, names=CELL)
    return pd.DataFrame([_summary(group) for group in groups.values()], index=index)


def _summary(rows: pd.DataFrame) -> dict[str, Any]:
    ok, repeats = served(rows), rows["repeat"].nunique()
    summary: dict[str, Any] = {
        "n": len(rows),
        "completed": len(ok),
        "failed": len(rows) - len(ok),
        "repeats": repeats,
    }
    for column in ("total_ms", "ttft_ms"):
        for name, value in latency(ok[column]).items():
            summary[f"{name}_{column}"] = value
    summary["p99_is_max"] = p99_is_max(len(ok))
    summary["mean_switch_ms"] = ok["switch_ms"].mean()
    summary["hit_share"] = (ok["switch_ms"] < HIT_MS).mean()
    summary["zero_load_share"] = (ok["loaded_bytes"] == 0).mean()
    for column in ("loaded_bytes", "evicted_bytes", "writeback_bytes"):
        summary[column] = ok[column].sum() / repeats
    return summary


def latency(values: pd.Series) -> dict[str, float]:
    """Return p50, p90, p99, mean and max; NaN where there are no values."""
    if values.empty:
        return dict.fromkeys(("p50", "p90", "p99", "mean", "max"), float("nan"))
    p99 = values.max() if p99_is_max(len(values)) else values.quantile(0.99)
    return {
        "p50": float(values.median()),
        "p90": float(values.quantile(0.9)),
        "p99": float(p99),
        "mean": float(values.mean()),
        "max": float(values.max()),
    }


def p99_is_max(n: int) -> bool:
    """Whether so few values have no 99th percentile below their maximum."""
    return n < 100


def bootstrap_interval(
    values: Sequence[float] | pd.Series,
    statistic: Callable[..., Any] = np.median,
    confidence: float = 0.95,
    seed: int = 0,
    n_resamples: int = 2000,
) -> Interval:
    """Return a statistic and its interval by the percentile bootstrap.

    The percentile method, because the bias-corrected one gives NaN on latencies with two modes.
    Constant values, or a single one, give an interval of no width.
    """
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        return _NOTHING
    value = float(statistic(data))
    if data.size == 1 or np.ptp(data) == 0:
        return value, value, value
    interval = stats.bootstrap(
        (data,),
        statistic,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        vectorized=_takes_axis(statistic),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, float(interval.low), float(interval.high)


def _takes_axis(statistic: Callable[..., Any]) -> bool:
    return statistic in (np.median, np.mean, np.max, np.min)


def share_interval(hits: Sequence[bool] | pd.Series) -> Interval:
    """Return a share and its 95% interval (Wilson), which also holds near 0 and 1."""
    n, k = len(hits), int(np.sum(hits))
    if n == 0:
        return _NOTHING
    interval = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    return k / n, float(interval.low), float(interval.high)


def ratio_interval(
    numerator: Sequence[float] | pd.Series,
    denominator: Sequence[float] | pd.Series,
    statistic: str,
    seed: int = 0,
    n_resamples: int = 2000,
) -> Interval:
    """Return the ratio of a statistic of two samples and its interval by the percentile bootstrap.

    Both sides are resampled independently. `statistic` is a key of `STATISTICS`.
    """
    top, bottom = np.asarray(numerator, float), np.asarray(denominator, float)
    if top.size == 0 or bottom.size == 0:
        return _NOTHING
    rng, reduce = np.random.default_rng(seed), STATISTICS[statistic]
    ratios = reduce(rng.choice(top, (n_resamples, top.size)), axis=1) / reduce(
        rng.choice(bottom, (n_resamples, bottom.size)), axis=1
    )
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(reduce(top) / reduce(bottom)), float(low), float(high)


def comparison_summary(rows: pd.DataFrame, capacity_label: str = "25") -> dict[str, dict]:
    """Return the paper trace's results by system and mode, as comparison_summary.json has them.

    The paper's file of that name has other keys, whole numbers and some other fields.
    """
    chosen = rows[(rows["trace"] == "paper") & (rows["capacity_label"] == capacity_label)]
    result = {}
    for (system, mode), group in attempted(chosen).groupby(["system", "mode"], sort=False):
        ok, summary = served(group), latency(served(group)["total_ms"])
        repeats = group["repeat"].nunique()
        result[f"{system}_{mode}"] = {
            "p50_total_ms": _number(summary["p50"]),
            "p99_total_ms": _number(summary["p99"]),
            "mean_total_ms": _number(summary["mean"]),
            "completed": len(ok) / repeats,
            "requests": len(group) / repeats,
            "repeats": repeats,
        }
    return result


def _number(value: float) -> float | None:
    """A value that JSON can hold: None stands for NaN."""
    return None if np.isnan(value) else round(value, 3)
