"""Verdicts on claims as tables and lists for people: in notebooks and in README.md."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from djinn_lib.analysis.claims import OPEN, Verdict, claims_table, format_value
from djinn_lib.analysis.result_tables import Table

_STRESSED = ("not reproduced", "withdrawn")
# Ink and background: dark on light, so that they read on any page.
_VERDICT_COLORS = {
    "reproduced": ("#14532d", "#dcfce7"),
    "exceeded": ("#1e3a8a", "#dbeafe"),
    "not reproduced": ("#7f1d1d", "#fee2e2"),
    "not judged": ("#292524", "#e7e5e4"),
    "withdrawn": ("#713f12", "#fef9c3"),
}


def verdict_table(verdicts: Sequence[Verdict]) -> Styler:
    """Return the table of claims with coloured verdicts; the words say the same."""

    def look(verdict: Any) -> str:
        ink, back = _VERDICT_COLORS[verdict]
        return f"color: {ink}; background-color: {back}; font-weight: bold; white-space: nowrap"

    table = claims_table(verdicts).style.set_uuid("claims")  # not random: the same every time
    return table.map(look, subset=["verdict"]).set_properties(
        subset=None, **{"text-align": "left", "vertical-align": "top"}
    )


def verdict_counts(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return how many claims of the paper's and of ours got each verdict."""
    pairs = pd.DataFrame({"source": v.source, "verdict": v.verdict} for v in verdicts)
    table = pd.crosstab(pairs["verdict"], pairs["source"], margins=True, margins_name="all")
    return table.reindex([*_VERDICT_COLORS, "all"]).fillna(0).astype(int)


def verdict_reasons(verdicts: Sequence[Verdict], judgement: str) -> str:
    """Return, in Markdown, each reason for a judgement and the claims that it holds for."""
    reasons: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.verdict == judgement:
            reasons.setdefault(verdict.why, []).append(_in_words(verdict))
    if not reasons:
        return f"No claim was {judgement}."
    return "\n".join(
        f"* **{why}**\n" + "\n".join(f"    * {words}" for words in claims)
        for why, claims in reasons.items()
    )


def _in_words(verdict: Verdict) -> str:
    said = f"{verdict.quote} (`{verdict.id}`): expected {verdict.expected}"
    if verdict.verdict == "withdrawn":
        return said
    measured = format_value(verdict.measured, verdict.unit)
    return f"{said}, {f'measured {measured}' if measured else 'not measured'}"


def claims_summary(
    verdicts: Sequence[Verdict], elsewhere: Mapping[str, Mapping[str, Any]] | None = None
) -> Table:
    """One line a claim: what is expected, what was measured, the verdict.

    Args:
        verdicts: of the reference run.
        elsewhere: entries of another run's claims.json by id, e.g. of one without a GPU.
    """
    head = ["claim", "expected", "measured", "95% interval", "n", "verdict"]
    lines = []
    for v in verdicts:
        exact = v.low is None or v.low == v.high
        verdict = f"**{v.verdict}**" if v.verdict in _STRESSED else v.verdict
        line = [
            textwrap.shorten(v.quote, 110, placeholder=" ..."),
            v.expected,
            format_value(v.measured, v.unit) or "-",
            "-" if exact else f"{format_value(v.low, v.unit)} to {format_value(v.high, v.unit)}",
            str(v.n) if v.n else "-",
            verdict,
        ]
        if elsewhere:
            line.append(_elsewhere(elsewhere.get(v.id), v.unit))
        lines.append(line)
    notes = [
        f"{judgement.capitalize()}, {count} of them: {why}."
        for judgement in sorted(OPEN)
        for why, count in Counter(v.why for v in verdicts if v.verdict == judgement).items()
    ]
    return Table([*head, "without a GPU"] if elsewhere else head, lines, tuple(notes))


def _elsewhere(entry: Mapping[str, Any] | None, unit: str) -> str:
    if entry is None or entry["verdict"] in OPEN:
        return "-"
    return f"{format_value(entry['measured'], unit)}, {entry['verdict']}"
