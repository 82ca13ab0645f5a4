"""Metrics of claims on tokens: who gives the same ones. They are valid on any machine.

Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from djinn_lib.analysis.claim_metrics import KEYS, Measurement, count, estimate, metric
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import NotMeasured, select, served
from djinn_lib.metrics import bootstrap_interval, sequential
from djinn_lib.metrics import served as done


@metric()
def token_repeatability(run: Run, system: str) -> Measurement:
    """Share of requests that a system gave the same tokens in every repeat, capacity and start.

    Replicates count too. Repeats are compared on each machine: compilers choose kernels there by
    timing them, and other kernels round otherwise. The remark says how many requests differ between
    machines, of those that more than one served.
    """
    everywhere: dict[str, Any] = {"trace": None, "capacity_label": None, "start": None}
    rows = run.placed(served(run, system, **everywhere, replicates=True))
    tokens = rows.groupby([*KEYS, "place"])["token_sha"].agg(["size", "nunique"])
    again = tokens[tokens["size"] > 1].groupby(KEYS).agg({"size": "sum", "nunique": "max"})
    if again.empty:
        raise NotMeasured(f"{system} served no request twice in this run")
    remark = f"{len(again)} different requests, {again['size'].sum()} served"
    if (n_machines := rows["place"].nunique()) > 1:
        own = tokens["nunique"].groupby(KEYS).max() == 1
        apart = own & (rows.groupby(KEYS)["token_sha"].nunique() > 1)
        several = (rows.groupby(KEYS)["place"].nunique() > 1).sum()
        remark += f"; on {n_machines} machines, which differ in {apart.sum()} of {several} requests"
    return Measurement(float((again["nunique"] == 1).mean()), len(again), remark)


@metric()
def token_agreement(run: Run) -> Measurement:
    """Share of requests for which all systems with transformers' own steps gave the same tokens."""
    rows = done(sequential(run.rows[~run.rows["system"].isin(run.other_steps)]))
    if rows["system"].nunique() < 2:
        raise NotMeasured("fewer than two systems with transformers' own steps served requests")
    agree = rows.groupby(KEYS)["token_sha"].nunique() == 1
    remark = f"{rows['system'].nunique()} systems, {len(agree)} different requests"
    return Measurement(float(agree.mean()), len(agree), remark)


@metric()
def token_agreement_of(run: Run, system: str, **where: Any) -> Measurement:
    """Share of requests for which `system` gives the tokens of transformers, in every repeat.

    These are the tokens of all other systems with transformers' own steps, at the same capacity.
    """
    own = served(run, system, **where)
    rows = done(select(run, None, **where))
    rows = rows[~rows["system"].isin({*run.other_steps, system})]
    rows = rows[rows["request"].isin(own["request"])]
    if rows.empty:
        raise NotMeasured(f"no other system with transformers' own steps served those of {system}")
    together = pd.concat([own[own["request"].isin(rows["request"])], rows])
    agree = together.groupby("request")["token_sha"].nunique() == 1
    remark = f"{agree.sum()} of {len(agree)} requests, {rows['system'].nunique()} other systems"
    return Measurement(float(agree.mean()), len(agree), remark)


@metric()
def token_agreement_lead(
    run: Run, system: str, to: str, reference: str, **where: Any
) -> Measurement:
    """Share of requests for which `system` gives the tokens of `reference`, less that of `to`.

    In half precision the order of additions can change which of two close scores is higher. All
    tokens after such a token differ.
    """
    first = {
        name: served(run, name, **where).groupby("request")["token_sha"].first()
        for name in (system, to, reference)
    }
    tokens = pd.DataFrame(first).dropna()
    if tokens.empty:
        raise NotMeasured(f"no request was served by {system}, {to} and {reference}")
    agree = tokens[[system, to]].eq(tokens[reference], axis=0).astype(float)
    remark = f"{system} {agree[system].mean():.0%}, {to} {agree[to].mean():.0%} of the requests"
    lead = bootstrap_interval(np.mean, agree[system] - agree[to])
    return estimate(lead, len(agree), f"{remark} have the tokens of {reference}")


@metric()
def token_agreement_when_concurrent(run: Run, system: str) -> Measurement:
    """Share of requests sent as they arrived that gave the tokens of the same one served alone."""
    everywhere = {"capacity_label": None, "trace": None}
    alone = served(run, system, **everywhere).groupby(KEYS)["token_sha"].first()
    rows = served(run, system, mode="concurrent", **everywhere)
    rows = rows.join(alone.rename("expected_sha"), on=KEYS).dropna(subset="expected_sha")
    if rows.empty:
        raise NotMeasured("no request was served both alone and among others")
    return count(rows["token_sha"] == rows["expected_sha"], rows)
