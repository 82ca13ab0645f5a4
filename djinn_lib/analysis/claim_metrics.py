"""Claims on counts, bytes and shares, which hold on any machine; those on times are beside it.

One small function a metric, from a run's evidence to a value. Importing this module registers all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from djinn_lib.analysis import claim_times  # noqa: F401  (registers its metrics
from djinn_lib.analysis.evidence import (
    MAIN_TRACE,
    METRICS,
    TIMED,
    Evidence,
    Measurement,
    NotMeasured,
    check_arguments,
    exact,
    measured,
    metric,
    select,
    served,
    swept,
)
from djinn_lib.metrics import bootstrap_interval, share_interval
from djinn_lib.simulator.optimal import optimal_bytes

__all__ = ["METRICS", "TIMED", "Evidence", "Measurement", "NotMeasured", "check_arguments"]


@metric()
def zero_load_share(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Share of the served requests for which not one byte was loaded."""
    rows = served(evidence, system, **where)
    hits = rows["loaded_bytes"] == 0
    return measured(share_interval(hits), len(rows), f"{hits.sum()} of {len(rows)} requests")


@metric()
def failure_share(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Share of the attempted requests that failed."""
    rows = select(evidence, system, **where)
    return measured(share_interval(~rows["ok"]), len(rows), f"{(~rows['ok']).sum()} failed")


@metric()
def completion_share(evidence: Evidence, system: str | None, **where: Any) -> Measurement:
    """Share of the attempted requests that were served."""
    rows = select(evidence, system, **where)
    remark = f"{rows['ok'].sum()} of {len(rows)} requests"
    return measured(share_interval(rows["ok"]), len(rows), remark)


@metric()
def total_gib(evidence: Evidence) -> Measurement:
    """GiB of the weights of all models."""
    if evidence.machine.get("device") == "cpu":
        raise NotMeasured("small models stand for the paper's on this machine")
    return exact(sum(evidence.sizes.values()) / 2**30, len(evidence.sizes))


@metric()
def capacity_share(evidence: Evidence, capacity_label: str) -> Measurement:
    """Capacity of the ring as a share of all weights."""
    rows = select(evidence, None, capacity_label=capacity_label)
    share = rows["capacity_bytes"].iloc[0] / sum(evidence.sizes.values())
    return exact(float(share), len(evidence.sizes))


@metric()
def popularity_ratio(evidence: Evidence, trace: str) -> Measurement:
    """Probability of the most popular model divided by that of the second, as drawn from."""
    chosen = evidence.traces.get(trace)
    if chosen is None or "probabilities" not in chosen.params:
        raise NotMeasured(f"no trace {trace!r} with known probabilities in this run")
    first, second, *_ = sorted(chosen.params["probabilities"], reverse=True)
    return exact(first / second, len(chosen), f"drawn with {chosen.params['probabilities']}")


def _bytes_per_repeat(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].sum() / rows["repeat"].nunique())


@metric()
def bytes_to_optimum(
    evidence: Evidence, system: str, capacity_label: str, trace: str = MAIN_TRACE
) -> Measurement:
    """Bytes loaded divided by the least that any schedule must load in that capacity.

    Of what the system keeps on the device: tables that stay in the host are no part of either.
    """
    rows = served(evidence, system, trace=trace, capacity_label=capacity_label)
    if trace not in evidence.traces:
        raise NotMeasured(f"no trace {trace!r} in this run")
    capacity_bytes = int(rows["capacity_bytes"].iloc[0])
    sizes = evidence.device_sizes.get(system) or evidence.sizes
    least = optimal_bytes(evidence.traces[trace], sizes, capacity_bytes)
    return exact(_bytes_per_repeat(rows, "loaded_bytes") / least, len(rows))


@metric()
def worst_bytes_to_optimum(evidence: Evidence, system: str, trace: str = MAIN_TRACE) -> Measurement:
    """`bytes_to_optimum` at the capacity where it is greatest."""
    rows = select(evidence, system, trace=trace, capacity_label=None)
    found = {label: bytes_to_optimum(evidence, system, label, trace).value for label in swept(rows)}
    worst = max(found, key=lambda label: found[label])
    remark = ", ".join(f"{ratio:.3g} at {label}" for label, ratio in sorted(found.items()))
    return Measurement(found[worst], min(found.values()), found[worst], len(rows), remark)


@metric()
def bytes_ratio(evidence: Evidence, system: str, to: str, **where: Any) -> Measurement:
    """Bytes loaded by `system` divided by those loaded by `to`."""
    rows = [served(evidence, name, **where) for name in (system, to)]
    loaded = [_bytes_per_repeat(r, "loaded_bytes") for r in rows]
    if not loaded[1]:
        raise NotMeasured(f"{to} loaded no bytes in this run")
    return exact(loaded[0] / loaded[1], sum(map(len, rows)))


@metric()
def writeback_bytes(evidence: Evidence, system: str) -> Measurement:
    """Bytes copied to the host by evictions, in all cells of a system."""
    rows = served(evidence, system, trace=None, capacity_label=None)
    return exact(float(rows["writeback_bytes"].sum()), len(rows))


@metric()
def token_repeatability(evidence: Evidence, system: str) -> Measurement:
    """Share of requests that a system gave the same tokens in every repeat, at every capacity."""
    rows = served(evidence, system, trace=None, capacity_label=None)
    tokens = rows.groupby(["trace", "request"])["token_sha"].agg(["size", "nunique"])
    again = tokens[tokens["size"] > 1]
    if again.empty:
        raise NotMeasured(f"{system} served no request twice in this run")
    remark = f"{len(again)} different requests, {again['size'].sum()} served"
    return measured(share_interval(again["nunique"] == 1), len(again), remark)


@metric()
def token_agreement(evidence: Evidence) -> Measurement:
    """Share of requests for which all systems with transformers' own steps gave the same tokens."""
    rows = evidence.rows[evidence.rows["ok"] & (evidence.rows["mode"] == "sequential")]
    rows = rows[~rows["system"].isin(evidence.other_steps)]
    if rows["system"].nunique() < 2:
        raise NotMeasured("fewer than two systems with transformers' own steps served requests")
    agree = rows.groupby(["trace", "request"])["token_sha"].nunique() == 1
    remark = f"{rows['system'].nunique()} systems, {len(agree)} different requests"
    return measured(share_interval(agree), len(agree), remark)


@metric()
def token_agreement_of(evidence: Evidence, system: str, **where: Any) -> Measurement:
    """Share of requests for which `system` gives the tokens of every transformers-based system.

    These are the other systems that decode by transformers' own steps, at the same capacity. A
    request counts as the same only if it is so in every repeat.
    """
    own = served(evidence, system, **where)
    rows = select(evidence, None, **where)
    rows = rows[rows["ok"] & ~rows["system"].isin({*evidence.other_steps, system})]
    rows = rows[rows["request"].isin(own["request"])]
    if rows.empty:
        raise NotMeasured(f"no other system with transformers' own steps served those of {system}")
    together = pd.concat([own[own["request"].isin(rows["request"])], rows])
    agree = together.groupby("request")["token_sha"].nunique() == 1
    remark = f"{agree.sum()} of {len(agree)} requests, {rows['system'].nunique()} other systems"
    return measured(share_interval(agree), len(agree), remark)


@metric()
def token_agreement_lead(
    evidence: Evidence, system: str, to: str, reference: str, **where: Any
) -> Measurement:
    """Share of requests for which `system` gives the tokens of `reference`, less that of `to`.

    A token is chosen by its score, and in half precision some scores differ by no more than steps
    that add in another order do; all tokens after such a one differ then.
    """
    first = {
        name: served(evidence, name, **where).groupby("request")["token_sha"].first()
        for name in (system, to, reference)
    }
    tokens = pd.DataFrame(first).dropna()
    if tokens.empty:
        raise NotMeasured(f"no request was served by {system}, {to} and {reference}")
    agree = tokens[[system, to]].eq(tokens[reference], axis=0).astype(float)
    remark = f"{system} {agree[system].mean():.0%}, {to} {agree[to].mean():.0%} of the requests"
    lead = bootstrap_interval(agree[system] - agree[to], np.mean)
    return measured(lead, len(agree), f"{remark} have the tokens of {reference}")


@metric()
def token_agreement_when_concurrent(evidence: Evidence, system: str) -> Measurement:
    """Share of requests sent as they arrived that gave the tokens of the same one served alone."""
    keys = ["trace", "request"]
    alone = served(evidence, system, capacity_label=None, trace=None).groupby(keys)["token_sha"]
    rows = served(evidence, system, capacity_label=None, trace=None, mode="concurrent")
    rows = rows.join(alone.first().rename("expected_sha"), on=keys).dropna(subset="expected_sha")
    if rows.empty:
        raise NotMeasured("no request was served both alone and beside others")
    return measured(share_interval(rows["token_sha"] == rows["expected_sha"]), len(rows))
