"""Make tables of the host's pace and of its effect on decoding times.

In an eager step the host launches every operator, so a slow host slows the decode. Decoding moves
no weights, so the same tokens of the same model should always take the same time. These tables show
how much the times vary, what two eager systems differ in apart from that, and whether a fixed
Python loop was also slow just before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import nan
from typing import Any

import pandas as pd

from djinn_lib.analysis.claim_times import at_one_pace, paired_ratio
from djinn_lib.analysis.plots.style import order_systems, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import (
    PINNED,
    NotMeasured,
    need_clocks,
    on_each_machine,
    or_reason,
    select,
)
from djinn_lib.metrics import by_request, decode_multiples, paired, sequential, served

FEW = 30  # requests; with fewer a correlation has no meaning
SLOW = 1.5  # times the best; a loop or a decode above this is called slow


@or_reason
def decode_table(run: Run) -> pd.DataFrame:
    """Return the decoding times of requests for one model, one row for each system.

    The rows are from the machine that ran `djinn` and most eager systems. A system that did not run
    there has the rows of the machine where it ran. The model is the one with the slowest eager
    decode on the first machine. `after a load` are requests that loaded something. If a system
    starts a process for a load, they are the first requests of a process. `P50 at best` is a
    system's median over all models if every decode took the fastest time of its model in any eager
    system of that machine.
    """
    need_clocks(run)
    rows = rows_of_one_machine(run)
    eager = rows[rows["eager"]]
    model = eager.groupby("model")["decode_ms"].max().idxmax()
    others = served(select(run, None))
    rows = pd.concat([rows, others[~others["system"].isin(rows["system"])]])
    rows["eager"] = ~rows["system"].isin(run.other_steps)
    fastest_ms = rows["model"].map(eager.groupby("model")["decode_ms"].min())
    rows = rows.assign(
        best_ms=(rows["total_ms"] - rows["decode_ms"] + fastest_ms).where(rows["eager"]),
        loads=rows["loaded_bytes"] > 0,
    )
    of_model = rows[rows["model"] == model].groupby("system")
    by_load = rows[rows["model"] == model].groupby(["system", "loads"])["decode_ms"].median()
    by_load = by_load.unstack().reindex(columns=[True, False])
    table = pd.DataFrame({
        "machine": of_model.apply(run.machines_of),
        "transformers' steps": of_model["eager"].first(),
        "requests": of_model.size(),
        "fastest (ms)": of_model["decode_ms"].min(),
        "median (ms)": of_model["decode_ms"].median(),
        "slowest (ms)": of_model["decode_ms"].max(),
        "after a load, median (ms)": by_load[True],
        "otherwise, median (ms)": by_load[False],
        "P50 at best (ms)": rows.groupby("system")["best_ms"].median(),
    })  # fmt: skip
    table = table.reindex(order_systems(table.index)).rename(index=lambda s: system_look(s).label)
    return table.rename_axis(f"requests for {model}")


def rows_of_one_machine(run: Run) -> pd.DataFrame:
    """Return the served rows of the machine that ran `djinn` and most eager systems.

    The rows are those of the paper's trace at the main capacity, in sequential mode, with
    replicates. Column `eager` says whether the system decodes with transformers' own steps.

    Raises:
        NotMeasured: no machine ran both `djinn` and a system that decodes eagerly.
    """
    rows = served(select(run, None, replicates=True))
    machines = rows["run_id"].map(run.machine_numbers)
    rows = rows.assign(eager=~rows["system"].isin(run.other_steps))
    n_eager = rows[rows["eager"]].groupby(machines[rows["eager"]])["system"].nunique()
    both = [n for n in n_eager.index if n in set(machines[rows["system"] == "djinn"])]
    if not both:
        raise NotMeasured("no machine ran both djinn and a system that decodes eagerly")
    return rows[machines == n_eager[both].idxmax()]


@or_reason
def one_pace_table(run: Run, slow: str = PINNED, fast: str = "djinn_eager") -> pd.DataFrame:
    """Return how much of the ratio of two eager systems is the pace of the host.

    There is a row for each capacity and machine that ran both on the paper's trace. `decode` and
    `without decoding` are means over the `n` requests that both served. The last ratios of medians
    are those of requests that decode equally fast in both systems, at the two paces of
    `metrics.at_one_pace`. `low` and `high` are the 95% interval of the first over the requests.
    """
    need_clocks(run)
    rooms = run.every_row.sort_values("capacity_bytes")["capacity_label"].unique()
    found = [row for label in map(str, rooms) for row in _at_one_pace(run, label, slow, fast)]
    if not found:
        raise NotMeasured(f"no machine served a request with both {slow} and {fast}")
    return pd.DataFrame(found).set_index(["capacity", "machine"])


def _at_one_pace(run: Run, capacity: str, slow: str, fast: str) -> Iterator[dict[str, Any]]:
    try:
        each = on_each_machine(run, [slow, fast], capacity_label=capacity)
    except NotMeasured:
        return
    for number, both in sorted(each.items()):
        with suppress(NotMeasured):  # a machine where one of them served nothing
            row = _pair_at_one_pace(run, slow, fast, both)
            yield {"capacity": capacity, "machine": run.machine_names[number], **row}


def _pair_at_one_pace(
    run: Run, slow: str, fast: str, both: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    ratios = []
    for pace in (None, "mean", "fastest"):
        cells = at_one_pace(run, [both[slow], both[fast]], pace) if pace else both.values()
        alike = dict(zip(both, cells, strict=True))
        ratios.append(paired_ratio(run, slow, alike, fast, "p50"))
    measured, at_mean, at_fastest = ratios
    decodes, totals = (
        paired(*(by_request(both[name], column) for name in (slow, fast)))
        for column in ("decode_ms", "total_ms")
    )
    row: dict[str, float] = {}
    for part, ms in (("decode", decodes), ("without decoding", totals - decodes)):
        means = ms.mean()
        row |= {f"{part}, {system_look(slow).label} (ms)": means["top"],
                f"{part}, {system_look(fast).label} (ms)": means["bottom"],
                f"{part} (x)": means["top"] / means["bottom"]}  # fmt: skip
    low, high = at_mean.interval or (nan, nan)
    return row | {
        "P50, as measured (x)": measured.value,
        "P50, at the mean pace (x)": at_mean.value,
        "low (x)": low,
        "high (x)": high,
        "P50, at the fastest pace (x)": at_fastest.value,
        "n": at_mean.n,
    }


@or_reason
def loop_table(run: Run) -> pd.DataFrame:
    """Compare decoding times with a Python loop that was timed before each request.

    One row is for eager decodes, one for Djinn's. `correlation` is the rank correlation of loop and
    decode within each cell and model. Slow means more than 1.5 times the best.
    """
    need_clocks(run)
    rows = rows_with_pace(run)
    groups = {"eager": rows[rows["eager"]], "Djinn": rows[rows["system"] == "djinn"]}
    found = {name: _with_the_loop(group) for name, group in groups.items() if len(group) >= FEW}
    if not found:
        raise NotMeasured(f"fewer than {FEW} requests have a time of the loop")
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("decode")


def _with_the_loop(rows: pd.DataFrame) -> dict[str, float]:
    slow_loop, slow_decode = rows["slower"] > SLOW, rows["longer"] > SLOW
    return {
        "requests": len(rows),
        "loop / its best, median (x)": rows["slower"].median(),
        "loop / its best, P99 (x)": rows["slower"].quantile(0.99),
        "decode / fastest, greatest (x)": rows["longer"].max(),
        "slow decodes": int(slow_decode.sum()),
        "slow loop before any decode (%)": 100 * slow_loop.mean(),
        "slow loop before a slow decode (%)": 100 * slow_loop[slow_decode].mean(),
        "correlation": _correlation(rows),
    }


def rows_with_pace(run: Run) -> pd.DataFrame:
    """Return the served rows of every cell and replicate that noted the host's pace.

    The requests are sequential, and were decoded in the process that timed the loop. The added
    columns are:

    * `eager`: whether the system decodes with transformers' own steps.
    * `machine`: number of the machine.
    * `host_loop_us`: the pace just before the request.
    * `slower`: that pace divided by the machine's best.
    * `longer`: the decode divided by the fastest one of the same model, decoder and machine.
    """
    rows = served(sequential(run.every_row))
    rows = rows[~rows["system"].isin(run.other_processes)]
    rows = rows.assign(
        eager=~rows["system"].isin(run.other_steps),
        machine=rows["run_id"].map(run.machine_numbers),
        host_loop_us=_noted(run, rows),
    ).dropna(subset="host_loop_us")
    best_us = rows.groupby("machine")["host_loop_us"].transform("min")
    # All eager systems decode with the same steps; every other system has its own.
    rows = rows.assign(way=rows["system"].where(~rows["eager"], "eager"))
    longer = decode_multiples(rows, "machine", "way")
    return rows.assign(slower=rows["host_loop_us"] / best_us, longer=longer)


def _noted(run: Run, rows: pd.DataFrame) -> pd.Series:
    """The host's pace before each row's request; NaN if it was not recorded."""
    noted = {
        (manifest["run_id"], repeat, request): us
        for manifest in run.all_manifests.values()
        for repeat, of_repeat in enumerate(manifest["host_loop_us"])
        for request, us in enumerate(of_repeat)
    }
    keys = zip(rows["run_id"], rows["repeat"], rows["request"], strict=True)
    return pd.Series([noted.get(key, float("nan")) for key in keys], rows.index, dtype=float)


def _correlation(rows: pd.DataFrame) -> float:
    """Correlate the host's pace and the decode after it, ranked within a cell and model.

    Ranks over all cells would mix machines and systems, which differ in both.
    """
    groups = rows.groupby(["run_id", "model"])
    return float(groups["slower"].rank(pct=True).corr(groups["longer"].rank(pct=True)))
