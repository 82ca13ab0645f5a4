"""The host's pace and what depends on it: the host starts eager steps, operator by operator.

Decoding moves no weights, so the same tokens of the same model should always take as long. These
tables show how far they do not, and whether a fixed loop of Python was slow just before.
"""

from __future__ import annotations

import pandas as pd

from djinn_lib.analysis.plots.style import order_systems, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, need_clocks, or_reason, select, select_every
from djinn_lib.metrics import decode_multiples, sequential, served

FEW = 30  # requests, below which a correlation says nothing
SLOW = 1.5  # times its best, from which on the loop, or a decode, is called slow


@or_reason
def decode_table(run: Run) -> pd.DataFrame:
    """Return how long requests for one model take to decode, a row a system.

    On the machine that ran `djinn` and most eager systems, or where that did not run a system, on
    the one that did. The model is the one whose slowest eager decode on that machine is slowest.
    `after a load` are requests that loaded something: the first ones of a new process, where a
    system starts one. `P50 at best` is a system's median over all models, if every request decoded
    in the fastest time of its model in any eager system of that machine.
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
        "eager": of_model["eager"].first(),
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

    Of the paper's trace at the main capacity, in sequence, replicates included. Column `eager` says
    whether the system decodes by transformers' own steps.

    Raises:
        NotMeasured: no machine ran both `djinn` and a system that decodes eagerly.
    """
    rows = served(select_every(run, None))
    machines = rows["run_id"].map(run.machine_numbers)
    rows = rows.assign(eager=~rows["system"].isin(run.other_steps))
    n_eager = rows[rows["eager"]].groupby(machines[rows["eager"]])["system"].nunique()
    both = [n for n in n_eager.index if n in set(machines[rows["system"] == "djinn"])]
    if not both:
        raise NotMeasured("no machine ran both djinn and a system that decodes eagerly")
    return rows[machines == n_eager[both].idxmax()]


@or_reason
def loop_table(run: Run) -> pd.DataFrame:
    """Return how decoding goes with a fixed loop of Python, timed on the host before each request.

    A row for eager decodes and one for Djinn's. `correlation` is that of the ranks of loop and
    decode within each cell and model. Slow is more than 1.5 times the best.
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

    They are of requests one after the other, decoded in the process that timed the loop. More
    columns are `eager`; `machine`; `host_loop_us`, the pace just before the request; `slower`, that
    pace over the machine's best; `longer`, the decode over the fastest of that model, decoded in
    that way on that machine.
    """
    rows = served(sequential(run.every_row))
    rows = rows[~rows["system"].isin(run.other_processes)]
    rows = rows.assign(
        eager=~rows["system"].isin(run.other_steps),
        machine=rows["run_id"].map(run.machine_numbers),
        host_loop_us=_noted(run, rows),
    ).dropna(subset="host_loop_us")
    best_us = rows.groupby("machine")["host_loop_us"].transform("min")
    # Eager systems have the same steps; each of the others has its own.
    rows = rows.assign(way=rows["system"].where(~rows["eager"], "eager"))
    longer = decode_multiples(rows, "machine", "way")
    return rows.assign(slower=rows["host_loop_us"] / best_us, longer=longer)


def _noted(run: Run, rows: pd.DataFrame) -> pd.Series:
    """The host's pace before each row's request; NaN where it was not noted."""
    noted = {
        (manifest["run_id"], repeat, request): us
        for manifest in run.all_manifests.values()
        for repeat, of_repeat in enumerate(manifest["host_loop_us"])
        for request, us in enumerate(of_repeat)
    }
    keys = zip(rows["run_id"], rows["repeat"], rows["request"], strict=True)
    return pd.Series([noted.get(key, float("nan")) for key in keys], rows.index, dtype=float)


def _correlation(rows: pd.DataFrame) -> float:
    """Of the host's pace and of the decode that followed, ranked within their cell and model.

    Not over all cells: machines and systems differ in both.
    """
    groups = rows.groupby(["run_id", "model"])
    return float(groups["slower"].rank(pct=True).corr(groups["longer"].rank(pct=True)))
