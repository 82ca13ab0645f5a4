"""What did not reproduce, and why, in plain sentences whose every number comes from rows.

A sentence whose rows are missing says so instead. Without a GPU nothing is said of times.
"""

from __future__ import annotations

from contextlib import suppress

import pandas as pd

from djinn_lib.analysis import host_pace
from djinn_lib.analysis.comparisons import gain, like_for_like, other_tokens
from djinn_lib.analysis.evidence import NotMeasured, select, side_by_side, swept
from djinn_lib.analysis.evidence import served as served_rows
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.sentences import (
    Paper,
    Tell,
    latencies,
    need_clocks,
    paragraph,
    vllm_version,
)
from djinn_lib.metrics import mean_before_decode_ms, prefill_ms, served

_GIB = 2**30


def pace(run: Run, paper: Paper) -> str:
    """Say, in Markdown, how steady decoding is where the host starts every operator."""
    return paragraph("How steady eager decoding is", _steadiness, run, paper)


def explanations(run: Run, paper: Paper) -> str:
    """Return, in Markdown, one paragraph on each thing that differs from the paper."""
    topics: dict[str, Tell] = {
        "The baseline of 4.3 s": _pinned_baseline,
        "Requests that fail in vLLM": _vllm_failures,
        "The slowest request": _tail,
        "Hits at the largest capacity": _first_touches,
        "The same speed-up at every capacity": _over_capacities,
    }
    told = [paragraph(title, tell, run, paper) for title, tell in topics.items()]
    more = [tell(run, paper) for tell in (like_for_like, gain, other_tokens, pace)]
    return "\n\n".join([*told, *more])


def _pinned_baseline(run: Run, paper: Paper) -> str:
    rows = served_rows(run.evidence, "pytorch_pinned")
    need_clocks(run)
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
    """What may have made the paper's baseline slower, each with what it is worth here.

    Its public code copies back, decodes eagerly and pins its memory.
    """
    back = rows["writeback_bytes"].mean() / float(
        run.machine.get("d2h_rate_bytes_per_s") or run.machine["link_rate_bytes_per_s"]
    )
    sentences = [
        f"The paper's public code does two things on every request that take part of the "
        f"{said_s:.1f} s, and so does ours: it copies the weights back ({back:.2f} s here) and "
        f"decodes eagerly ({rows['decode_ms'].mean() / 1e3:.2f} s here). A slower link or a slower "
        "host may explain the rest; the paper does not give the parts."
    ]
    with suppress(NotMeasured):
        sentences.append(f"That code pins its memory. Other memory is {_pageable(run)}.")
    return sentences


def _pageable(run: Run) -> str:
    """What ordinary host memory gives, there and back."""
    rows = served_rows(run.evidence, "pytorch_pageable")
    there_ms = rows["ttft_ms"] - prefill_ms(rows)
    back_ms = rows["switch_ms"] - there_ms
    rate = rows["loaded_bytes"].sum() / there_ms.sum() * 1e3
    p50_s = rows["total_ms"].median() / 1e3
    return (
        f"far slower (pageable: {rate / 1e9:.1f} GB/s to the GPU here, and {p50_s:.2f} s in the "
        f"median: the way back, into fresh memory, takes {back_ms.mean() / 1e3:.2f} s)"
    )


def _steadiness(run: Run, paper: Paper) -> str:
    need_clocks(run)
    return host_pace.told(run)


def _vllm_failures(run: Run, paper: Paper) -> str:
    rows = select(run.evidence, "vllm_recreate")
    served, published = int(rows["ok"].sum()), paper["systems"]["vllm_recreate"]["completed"]
    n_paper = paper["setup"]["n_requests"]
    version = vllm_version(run, "vllm_recreate")
    head = f"The paper's vLLM completed {published} of {n_paper} requests. vLLM {version} completed"
    if served == len(rows):
        return (
            f"{head} all {len(rows)} here, so the failures do not reproduce: re-creating an engine "
            "does not make requests fail by itself."
        )
    kinds = rows.loc[~rows["ok"], "error_kind"].value_counts()
    causes = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
    return f"{head} {served} of {len(rows)} here ({causes})."


def _tail(run: Run, paper: Paper) -> str:
    rows, slowest = served_rows(run.evidence, "djinn"), latencies(run, "djinn")["max"]
    need_clocks(run)
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
        f"({hits / len(largest):.0%}). More than that needs a ring that is warm when the trace "
        "begins. The paper's is: its public code loads every model before the first request, so "
        "that the last ones are resident. Ours starts empty."
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
    need_clocks(run)
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
