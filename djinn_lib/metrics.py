"""Numbers from rows: summaries, intervals, ratios.

The unit is the request of a trace, not its repeat: repeats of a request differ far less than
requests do. So every statistic is one of `by_request`, and n counts requests. Rows of systems that
cannot run on this machine (error_kind "unavailable") are not counted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy import stats

HIT_MS = 10.0  # the paper's bound for a switch that costs nearly nothing
CELL = ["system", "trace", "capacity_label", "mode"]
REQUEST = ["trace", "capacity_label", "request"]  # what repeats of a cell have in common
_LENGTH = ["trace", "request", "n_tokens"]  # what a decode should depend on, besides the model
Pace = Literal["mean", "fastest"]
PACES: tuple[Pace, ...] = get_args(Pace)
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


def by_request(rows: pd.DataFrame, column: str = "total_ms") -> pd.Series:
    """Return a column's mean over the repeats of each request that one system served in one mode.

    It is indexed by trace, capacity label and request: two systems of one cell have the same index.
    """
    return served(rows).groupby(REQUEST)[column].mean()


def sequential(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests that were served one after another."""
    return rows[rows["mode"] == "sequential"]


def later_switches(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests for another model than the one before, first touches left out.

    The first request of a repeat for a model must load it in every system. Failed requests stay in,
    because what was asked for before a request counts, served or not.
    """
    rows = rows.sort_values([*CELL, "repeat", "request"])
    before = rows.groupby([*CELL, "repeat"], sort=False)["model"].shift()
    return later_touches(rows[rows["model"] != before])


def later_touches(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of requests for a model that was asked for before in the same repeat."""
    rows = rows.sort_values([*CELL, "repeat", "request"])
    return rows[rows.groupby([*CELL, "repeat", "model"], sort=False).cumcount() > 0]


def exposed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a system: switches after the first touch of each model, duration of a repeat."""
    switches = served(later_touches(rows)).groupby("system")["switch_ms"]
    end_s = rows["start_s"] + (rows["total_ms"] - rows["queue_ms"]) / 1e3
    repeats = rows.assign(end_s=end_s).groupby(["system", "repeat"])
    took_s = repeats["end_s"].max() - repeats["start_s"].min()
    return pd.DataFrame({
        "mean later switch (ms)": switches.mean(),
        "longest later switch (ms)": switches.max(),
        "all done (s)": took_s.groupby("system").mean(),
    })  # fmt: skip


def prefill_ms(rows: pd.DataFrame) -> pd.Series:
    """Time of the prompt's forward pass: the total without its other parts."""
    parts = rows["queue_ms"] + rows["switch_ms"] + rows["decode_ms"]
    return (rows["total_ms"] - parts).clip(lower=0).rename("prefill_ms")


def phases_ms(rows: pd.DataFrame) -> pd.DataFrame:
    """Time of the parts of each request: columns queue, switch, prefill and decode."""
    parts = {name: rows[f"{name}_ms"] for name in ("queue", "switch")}
    return pd.DataFrame({**parts, "prefill": prefill_ms(rows), "decode": rows["decode_ms"]})


def mean_without_decode_ms(rows: pd.DataFrame) -> float:
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


def measures(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the measures of the attempted rows of one cell, by their name and unit.

    Percentiles, "max" and "mean" are those of the whole request. Bytes are those of one repeat.
    """
    done, repeats = served(rows), rows["repeat"].nunique()
    times = latency(by_request(done))
    moved_gib = done[["loaded_bytes", "writeback_bytes"]].sum() / repeats / 2**30
    return {
        "requests": rows["request"].nunique(),
        "served (%)": 100 * rows["ok"].mean(),
        "repeats": repeats,
        **{f"{name} (ms)": times[name.lower()] for name in ("P50", "P90", "P99", "max", "mean")},
        "without decoding (ms)": mean_without_decode_ms(done),
        "mean TTFT (ms)": done["ttft_ms"].mean(),
        "mean switch (ms)": done["switch_ms"].mean(),
        "mean decode (ms)": done["decode_ms"].mean(),
        "slowest / fastest decode (x)": decode_spread(rows),
        "loaded (GiB)": moved_gib["loaded_bytes"],
        "written back (GiB)": moved_gib["writeback_bytes"],
        "loaded nothing (%)": 100 * (rows["ok"] & (rows["loaded_bytes"] == 0)).mean(),
    }


def latency(values: pd.Series) -> dict[str, float]:
    """Return p50, p90, p99, mean and max of `by_request`; NaN where there are no values."""
    if values.empty:
        return dict.fromkeys(STATISTICS, float("nan"))
    found = {name: float(statistic(values)) for name, statistic in STATISTICS.items()}
    return found | {"p99": found["max"]} if p99_is_max(len(values)) else found


def p99_is_max(n: int) -> bool:
    """Whether so few values have no 99th percentile below their maximum."""
    return n < 100


def bootstrap_interval(
    statistic: Callable[..., Any],
    *samples: Sequence[float] | pd.Series,
    block: int = 1,
    seed: int = 0,
    n_resamples: int = 2000,
) -> Interval:
    """Return a statistic of paired samples and its 95% interval by the percentile bootstrap.

    The percentile method, because the bias-corrected one gives NaN on latencies with two modes.

    Args:
        statistic: takes the samples and an `axis`, as numpy's functions do.
        samples: one value a request each, in the same order of requests. They are resampled
            together, so that what requests have in common does not widen the interval.
        block: how many consecutive requests are drawn together, where a request depends on those
            before it (circular blocks); 1 draws each by itself.
        seed: of the resampling.
        n_resamples: how often.

    Returns:
        Value, low and high. Without values all are NaN, and of a single request there is no
        interval. Constant samples give one of no width.
    """
    data = [np.asarray(sample, float) for sample in samples]
    n = data[0].size
    if n == 0:
        return _NOTHING
    value = float(statistic(*data, axis=-1))
    if n == 1:
        return value, float("nan"), float("nan")
    if all(np.ptp(sample) == 0 for sample in data):
        return value, value, value
    rng = np.random.default_rng(seed)
    if block > 1:
        starts = rng.integers(n, size=(n_resamples, -(-n // block)))
        drawn = (starts[:, :, None] + np.arange(block)).reshape(n_resamples, -1)[:, :n] % n
        values = statistic(*(sample[drawn] for sample in data), axis=-1)
        low, high = np.percentile(values, [2.5, 97.5])
        return value, float(low), float(high)
    interval = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        method="percentile",
        rng=rng,
    ).confidence_interval
    return value, float(interval.low), float(interval.high)


def share_interval(hits: pd.Series, block: int = 1) -> Interval:
    """Return the share of requests that have a mark, and its 95% interval.

    `hits` has the share of repeats with the mark for each request, in the order of the trace. Where
    all requests have it, or none, resampling gives an interval of no width, however few they are.
    The interval is then that of Clopper and Pearson: of 20 requests out of 20 it begins at 83%.
    """
    if (n := len(hits)) and hits.isin([0.0, 1.0]).all() and hits.nunique() == 1:
        exact = stats.binomtest(int(hits.sum()), n).proportion_ci()
        return float(hits.mean()), float(exact.low), float(exact.high)
    return bootstrap_interval(np.mean, hits, block=block)


def block_length(n: int) -> int:
    """Return how many consecutive of `n` requests to draw together where their order matters.

    The cube root, which is the order that minimises the error of such an interval (Hall, Horowitz
    and Jing, Biometrika 1995).
    """
    return max(1, round(n ** (1 / 3)))


def ratio_interval(
    top: pd.Series, bottom: pd.Series, statistic: str, block: int = 1, n_resamples: int = 2000
) -> Interval:
    """Return the ratio of a statistic of two systems and its interval, paired by request.

    Both are results of `by_request`; requests that only one of them has are left out. The statistic
    is a key of `STATISTICS`; for the rest see `bootstrap_interval`.
    """
    both, reduce = paired(top, bottom), STATISTICS[statistic]

    def ratio(one: np.ndarray, other: np.ndarray, axis: int) -> Any:
        return reduce(one, axis=axis) / reduce(other, axis=axis)

    return bootstrap_interval(
        ratio, both["top"], both["bottom"], block=block, n_resamples=n_resamples
    )


def difference_of_means(one: pd.Series, other: pd.Series) -> Interval:
    """Return the mean of one system less that of another with its interval, paired by request."""
    both = paired(one, other)
    return bootstrap_interval(np.mean, both["top"] - both["bottom"])


def at_one_pace(cells: Sequence[pd.DataFrame], pace: Pace) -> list[pd.DataFrame]:
    """Return served rows of several cells as if each request had decoded equally fast in all.

    This is meant for cells of one trace whose systems decode by the same steps, at any capacity.
    The total of each request changes with its decode. Requests that some cell did not serve, or
    gave another number of tokens, are left out.

    Args:
        pace: "mean": a request's decode takes the mean of the cells' means over their repeats.
            "fastest": it takes the fastest decode of its model and number of tokens in any cell.
    """
    cells = [served(rows).dropna(subset="decode_ms") for rows in cells]
    each = [rows.groupby(_LENGTH)["decode_ms"].mean() for rows in cells]
    means = pd.concat(each, axis=1, join="inner").mean(axis=1)
    best = pd.concat(cells).groupby(["model", "n_tokens"])["decode_ms"].min()
    made = []
    for rows in cells:
        new_ms = rows.join(means.rename("new"), on=_LENGTH, how="left")["new"]
        if pace == "fastest":
            new_ms = rows.join(best.rename("new"), on=best.index.names)["new"].where(new_ms.notna())
        total_ms = rows["total_ms"] - rows["decode_ms"] + new_ms
        made.append(rows.assign(decode_ms=new_ms, total_ms=total_ms)[new_ms.notna()])
    return made


def paired(top: pd.Series, bottom: pd.Series) -> pd.DataFrame:
    """Return the values of the requests that both systems served, in the order of the trace."""
    return pd.concat({"top": top, "bottom": bottom}, axis=1, join="inner").sort_index()
