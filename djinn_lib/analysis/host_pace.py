"""The host's pace and what hangs on it: eager steps are started by the host, one by one.

Decoding moves no weights, so that the same tokens of the same model should always take as long. How
far they do not, and whether a fixed loop of Python was slow just before, is told from the rows of
one machine.
"""

from __future__ import annotations

import pandas as pd

from djinn_lib.analysis.evidence import NotMeasured, ran_on, select, with_replicates
from djinn_lib.analysis.run import Run
from djinn_lib.metrics import decode_multiples, sequential, served

_FEW = 30  # requests, below which a correlation says nothing
_SLOW = 1.5  # times its best, from which on the loop, or a decode, is called slow


def rows_of_one_machine(run: Run) -> pd.DataFrame:
    """Return the served rows of the machine that ran `djinn` and most eager systems.

    Of the paper's trace at the main capacity, in sequence, replicates included. Column `eager` says
    whether the system decodes by transformers' own steps.

    Raises:
        NotMeasured: no machine ran both `djinn` and a system that decodes eagerly.
    """
    rows = served(select(with_replicates(run.evidence), None))
    machines = rows["run_id"].map(run.evidence.machines)
    rows = rows.assign(eager=~rows["system"].isin(run.other_steps))
    n_eager = rows[rows["eager"]].groupby(machines[rows["eager"]])["system"].nunique()
    both = [n for n in n_eager.index if n in set(machines[rows["system"] == "djinn"])]
    if not both:
        raise NotMeasured("no machine ran both djinn and a system that decodes eagerly")
    return rows[machines == n_eager[both].idxmax()]


def rows_with_pace(run: Run) -> pd.DataFrame:
    """Return the served rows of every cell and replicate that noted the host's pace.

    Of requests one after the other, decoded in the process that timed it. Columns beside `eager`
    and `machine`: `host_loop_us`, the pace just before the request; `slower`, it as a multiple of
    the machine's best; `longer`, the decode as a multiple of the fastest of that model, decoded
    that way on that machine.
    """
    rows = served(sequential(with_replicates(run.evidence).rows))
    rows = rows[~rows["system"].isin(run.other_processes)]
    rows = rows.assign(
        eager=~rows["system"].isin(run.other_steps),
        machine=rows["run_id"].map(run.evidence.machines),
        host_loop_us=_noted(run, rows),
    ).dropna(subset="host_loop_us")
    best_us = rows.groupby("machine")["host_loop_us"].transform("min")
    # Eager systems have the same steps; each of the others has its own.
    rows = rows.assign(way=rows["system"].where(~rows["eager"], "eager"))
    longer = decode_multiples(rows, "machine", "way")
    return rows.assign(slower=rows["host_loop_us"] / best_us, longer=longer)


def told(run: Run) -> str:
    """Say how steady decoding is, eagerly and from CUDA graphs, and what the host did meanwhile.

    Raises:
        NotMeasured: no machine ran both.
    """
    rows = rows_of_one_machine(run)
    eager, graph = rows[rows["eager"]], rows[rows["system"] == "djinn"]
    model = eager.groupby("model")["decode_ms"].max().idxmax()
    slow, fast = (r[r["model"] == model]["decode_ms"] for r in (eager, graph))
    where = ran_on(run.evidence, rows) or "on one machine"
    sentences = [
        f"Eager steps are started by the host, operator by operator, and are as slow as it is. "
        f"{where[0].upper()}{where[1:]} requests for {model} took {slow.min() / 1e3:.2f} to "
        f"{slow.max() / 1e3:.2f} s to decode so ({len(slow)} requests of "
        f"{eager['system'].nunique()} systems), and {fast.min():,.1f} to {fast.max():,.1f} ms from "
        "CUDA graphs. Means of two eager systems that differ by less than that tell nothing of the "
        "systems: compare what comes before decoding, or bytes.",
        *_of_the_kernels(run, model),
    ]
    if (pinned := eager[eager["system"] == "pytorch_pinned"]).size:
        fastest_ms = pinned["model"].map(eager.groupby("model")["decode_ms"].min())
        at_best = (pinned["total_ms"] - pinned["decode_ms"] + fastest_ms).median()
        djinn = graph["total_ms"].median()
        sentences.append(
            "Had every request of PyTorch pinned decoded in the fastest time of its model in any "
            f"of these systems, its median would be {at_best:,.0f} ms, {at_best / djinn:.1f}x that "
            "of Djinn."
        )
    sentences += [*_of_new_processes(run), *_of_the_loop(rows_with_pace(run))]
    return " ".join([*sentences, *_of_stolen_time(run)])


def _of_the_kernels(run: Run, model: str) -> list[str]:
    """What an eager decode takes when the host does not start each of its kernels."""
    try:
        rows = served(select(run.evidence, "djinn_graph"))
    except NotMeasured:
        return []
    recorded_ms = rows.loc[rows["model"] == model, "decode_ms"].median()
    return [
        f"Transformers' forward pass, recorded and replayed, decodes {model} in "
        f"{recorded_ms:,.0f} ms (`djinn_graph`). For the rest of an eager decode the GPU waits for "
        "the host."
    ]


def _of_new_processes(run: Run) -> list[str]:
    """What the first request of a Ray actor, which is a new process, decodes like."""
    try:
        rows = served(select(run.evidence, "ray_actors"))
    except NotMeasured:
        return []
    new = rows["loaded_bytes"] > 0
    if new.all() or not new.any():
        return []
    first_ms, later_ms = (rows.loc[which, "decode_ms"].median() for which in (new, ~new))
    return [
        f"Ray actors are new processes after each load, and their first request decodes in "
        f"{first_ms:,.0f} ms in the median, {first_ms / later_ms:.1f}x those after it."
    ]


def _noted(run: Run, rows: pd.DataFrame) -> list[float]:
    """The host's pace before each row's request."""
    noted = {m["run_id"]: m["host_loop_us"] for m in run.all_manifests.values()}
    nothing = float("nan")
    found = []
    for row in rows.itertuples():
        of_repeats = noted.get(str(row.run_id), [])
        of_repeat = of_repeats[row.repeat] if row.repeat < len(of_repeats) else []
        found.append(of_repeat[row.request] if row.request < len(of_repeat) else nothing)
    return found


def _of_the_loop(rows: pd.DataFrame) -> list[str]:
    """How decoding goes with a fixed loop of Python on the host, where one was timed."""
    eager, graph = rows[rows["eager"]], rows[rows["system"] == "djinn"]
    if len(eager) < _FEW:
        return []
    slow_loop, slow_decode = eager["slower"] > _SLOW, eager["longer"] > _SLOW
    said = [
        f"A fixed loop of Python, timed before each of {len(rows)} requests, took "
        f"{rows['slower'].median():.2f}x its best in the median and "
        f"{rows['slower'].quantile(0.99):.1f}x or more in one of a hundred; its rank correlation "
        f"with the decode that followed, within a cell and a model, is {_correlation(eager):.2f} "
        "where that was eager."
    ]
    if len(graph):
        said.append(
            f"None of Djinn's {len(graph)} decodes took more than {graph['longer'].max():.2f}x the "
            "fastest."
        )
    if slow_decode.any():
        said.append(
            f"A loop of more than {_SLOW}x its best came before {slow_loop.mean():.0%} of all "
            f"{len(eager)} eager decodes, and before {slow_loop[slow_decode].mean():.0%} of the "
            f"{slow_decode.sum()} that took more than {_SLOW}x the fastest of their model."
        )
    return said


def _correlation(rows: pd.DataFrame) -> float:
    """Of the host's pace and of the decode that followed, ranked within their cell and model.

    Not over all cells: machines and systems differ in both.
    """
    groups = rows.groupby(["run_id", "model"])
    return float(groups["slower"].rank(pct=True).corr(groups["longer"].rank(pct=True)))


def _of_stolen_time(run: Run) -> list[str]:
    """What a hypervisor says that it gave to others; many say nothing, which reads as none."""
    shares = [manifest["stolen_share"] for manifest in run.all_manifests.values()]
    known = [share for share in shares if share is not None]
    if not known or max(known) == 0:
        return []
    gave = f"{min(known):.1%} to {max(known):.1%}" if max(known) >= 0.001 else "less than 0.1%"
    return [f"While a cell ran, the hypervisor gave {gave} of the processors' time to others."]
