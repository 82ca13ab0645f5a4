"""What the headline comparisons rest on, in plain sentences whose every number comes from rows.

Each paragraph takes a number that looks good for Djinn and says what makes it so.
"""

from __future__ import annotations

from contextlib import suppress

import pandas as pd

from djinn_lib.analysis.claim_times import statistic_ratio
from djinn_lib.analysis.decomposition import decomposition
from djinn_lib.analysis.evidence import NotMeasured, ran_on, select, side_by_side
from djinn_lib.analysis.evidence import served as served_rows
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.sentences import Paper, latencies, need_clocks, paragraph, vllm_version
from djinn_lib.metrics import prefill_ms, served
from djinn_lib.units import format_bytes

SLEEP = ["vllm_sleep", "vllm_sleep_naive"]  # forms of sleep mode: the better one is compared with
_TRANSFORMERS = ("pytorch_pinned", "pytorch_lru")  # whose tokens are transformers' own
_LABELS = {"p50": "median", "mean": "mean", "p90": "P90", "max": "max"}


def like_for_like(run: Run, paper: Paper) -> str:
    """Say, in Markdown, what is left of the paper's headline when both sides decode alike."""
    return paragraph("Is the paper's headline reproduced?", _like_for_like, run, paper)


def fairness(run: Run, paper: Paper) -> str:
    """Say, in Markdown, whether the paper's comparison with vLLM is the one a user would make."""
    return paragraph("Is the comparison with vLLM fair?", _sleep_mode, run, paper)


def other_tokens(run: Run, paper: Paper) -> str:
    """Say, in Markdown, how many requests get other tokens than from transformers, and why."""
    return paragraph("Does Djinn give the tokens of transformers?", _other_tokens, run, paper)


def gain(run: Run, paper: Paper) -> str:
    """Say, in Markdown, what Djinn's gain over the paper's baseline is made of."""
    return paragraph("What the gain is made of", _gain, run, paper)


def _like_for_like(run: Run, paper: Paper) -> str:
    alike = {
        name: statistic_ratio(run.evidence, "pytorch_pinned", "djinn_eager", name)
        for name in ("p50", "mean")
    }
    need_clocks(run)
    published, median = paper["systems"], alike["p50"]
    said = published["pytorch_pinned"]["p50_total_ms"] / published["djinn"]["p50_total_ms"]
    verdict = "Yes, like for like." if median.value >= said else "No, not like for like."
    where = f" ({median.remark})" if median.remark else ""
    sentences = [
        f"{verdict} The paper's Djinn has a median {said:.1f}x lower than PyTorch pinned. Its "
        "public code decodes by transformers' own steps in both systems. Here, with these steps in "
        f"both{where}, Djinn's median is {median.value:.2f}x lower (95%: {median.low:.2f} to "
        f"{median.high:.2f}) and its mean {alike['mean'].value:.2f}x."
    ]
    with suppress(NotMeasured):
        pinned, djinn = _parts(run, "pytorch_pinned", "djinn")
        less = pinned - djinn
        own = statistic_ratio(run.evidence, "pytorch_pinned", "djinn", "p50")
        sentences.append(
            f"With Djinn's own decoder the median is {own.value:.2f}x lower, but in the mean "
            f"{1 - less['switch'] / less.sum():.0%} of that gain is faster computing, for which no "
            "ring is needed."
        )
    return " ".join(sentences)


def _sleep_mode(run: Run, paper: Paper) -> str:
    ratios = {name: statistic_ratio(run.evidence, SLEEP, "djinn", name).value for name in _LABELS}
    sleeping = latencies(run, "vllm_sleep")
    need_clocks(run)
    recreated, published = latencies(run, "vllm_recreate"), paper["systems"]
    said = published["vllm_recreate"]["p50_total_ms"] / published["djinn"]["p50_total_ms"]
    factor = recreated["p50"] / sleeping["p50"]
    verdict = (
        "So most of the paper's factor is the start of an engine, not the moving of weights: "
        "the fair comparison is with sleep mode."
        if factor > 2
        else "So re-creating the engine is no unfair stand-in here."
    )
    sentences = [
        f"The paper tears vLLM's engine down at each change of the model and reports a median "
        f"{said:.1f}x above its own. vLLM has a sleep mode for this very job. In vLLM "
        f"{vllm_version(run, 'vllm_sleep')} the median with it is {sleeping['p50']:,.0f} ms; "
        f"re-created engines take {recreated['p50']:,.0f} ms, {factor:.1f}x more. {verdict}",
        "Each statistic is compared with the form of sleep mode that is best in it: Djinn's "
        "latency is lower by "
        + ", ".join(f"{ratios[name]:.2f}x ({label})" for name, label in _LABELS.items())
        + "; below 1x it is higher.",
    ]
    if favours := [*_copied_back(run, paper), *_worst_capacity(run)]:
        sentences += ["These ratios favour Djinn.", *favours]
    return " ".join(sentences)


def _copied_back(run: Run, paper: Paper) -> list[str]:
    """What sleep mode spends on copying weights to the host, which read-only weights need not."""
    part = decomposition(run, paper).loc["vllm_sleep"]
    if not part["writeback_ms"] > 0:
        return []
    switch_ms = part["copy_ms"] + part["writeback_ms"] + part["rest_ms"]
    return [
        f"Sleep mode copies the weights back to the host. At the link's rate that takes "
        f"{part['writeback_ms']:,.0f} ms of its mean switch of {switch_ms:,.0f} ms. Read-only "
        "weights need no such copy, and a sleep mode without it was not measured."
    ]


def _worst_capacity(run: Run) -> list[str]:
    """Whether the comparison is made only where caches of whole models do worst."""
    rows = select(run.evidence, "vllm_sleep", capacity_label=None)
    capacity = int(rows["capacity_bytes"].max())
    one, other = sorted(run.sizes, key=lambda model: run.sizes[model])[-2:]
    excess = run.sizes[one] + run.sizes[other] - capacity
    if rows["capacity_label"].nunique() > 1 or excess <= 0:
        return []
    return [
        f"Sleep mode was run at {format_bytes(capacity)} only, where caches of whole models do "
        f"badly: {one} and {other} miss fitting together by {excess / 2**30:.2f} GiB."
    ]


def _other_tokens(run: Run, paper: Paper) -> str:
    if "djinn" not in run.other_steps:
        served_rows(run.evidence, "djinn")  # says why there are none, if so
        return "Yes: on this machine it decodes by transformers' own steps."
    differing = {trace: _differing(run, trace) for trace in run.traces}
    counted = [f"On the trace `{trace}` {found}" for trace, found in differing.items() if found]
    if not counted:
        raise NotMeasured("no trace was served by djinn and by a system with transformers' steps")
    return " ".join(
        [
            "Not always. Its compiled step adds numbers in another order than transformers' steps "
            "do. In half precision two tokens can have nearly the same score. Rounding then "
            "decides between them, and all later tokens differ.",
            *counted,
            *_unsteady(run),
            "How far the scores (logits) differ was not recorded. A step is refused if they differ "
            'by more than rounding explains. `decode="eager"` gives the tokens of transformers.',
        ]
    )


def _differing(run: Run, trace: str) -> str:
    """Say how many requests of a trace get other tokens than transformers'; "" if not known."""
    for reference in _TRANSFORMERS:
        with suppress(NotMeasured):
            own, vllm = (_other(run, name, reference, trace) for name in ("djinn", "vllm_sleep"))
            return (
                f"{own.mean():.0%} of the requests ({own.sum()} of {len(own)}) get other tokens "
                f"from Djinn, and {vllm.mean():.0%} ({vllm.sum()} of {len(vllm)}) from vLLM's "
                "sleep mode."
            )
    return ""


def _other(run: Run, system: str, reference: str, trace: str) -> pd.Series:
    """Whether a system gave other tokens than a reference in any repeat, by request."""
    rows = pd.concat([served_rows(run.evidence, name, trace=trace) for name in (system, reference)])
    both = rows.groupby("request")["system"].transform("nunique") == 2
    return rows[both].groupby("request")["token_sha"].nunique() > 1


def _unsteady(run: Run) -> list[str]:
    """Name systems that gave a request other tokens in another repeat of the same cell."""
    rows = select(run.evidence, None)
    kinds = rows[rows["ok"]].groupby(["system", "request"])["token_sha"].nunique()
    counts = (kinds > 1).groupby("system").agg(["sum", "size"])
    return [
        f"`{system}` gave {count['sum']} of {count['size']} requests different tokens in different "
        "repeats; we do not know why."
        for system, count in counts[counts["sum"] > 0].iterrows()
    ]


def _gain(run: Run, paper: Paper) -> str:
    pinned, djinn = _parts(run, "pytorch_pinned", "djinn")
    need_clocks(run)
    less = pinned - djinn
    total = less.sum()
    sentences = [
        f"In the mean a request of Djinn takes {total:,.0f} ms less than one of PyTorch pinned: "
        f"{less['switch']:,.0f} ms less to switch, {less['prefill']:,.0f} to the first token, "
        f"{less['decode']:,.0f} to decode. So {less['switch'] / total:.0%} of the gain is how "
        "weights move; the rest is how tokens are computed, for which no ring is needed. Switches "
        f"alone cost {pinned['switch'] / djinn['switch']:.1f}x less."
    ]
    with suppress(NotMeasured):
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
