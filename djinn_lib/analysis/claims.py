"""Read claims, and judge them by a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pandas.io.formats.style import Styler
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from djinn_lib.analysis import claim_series, claim_switches, claim_tokens  # noqa: F401  (they register metrics)
from djinn_lib.analysis.claim_metrics import METRICS, TIMED, Measurement, check_arguments
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import CPU_CLOCKS, NotMeasured
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.files import write_json
from djinn_lib.paths import REPO

CLAIMS = REPO / "claims.yml"
Judgement = Literal[
    "reproduced", "exceeded", "not reproduced", "unresolved", "not judged", "withdrawn"
]
OPEN = frozenset({"not judged", "withdrawn"})  # judgements without a measurement
# Ink and background: dark on light, so that they read on any page.
_COLORS = {
    "reproduced": ("#14532d", "#dcfce7"),
    "exceeded": ("#1e3a8a", "#dbeafe"),
    "not reproduced": ("#7f1d1d", "#fee2e2"),
    "unresolved": ("#7c2d12", "#ffedd5"),
    "not judged": ("#292524", "#e7e5e4"),
    "withdrawn": ("#713f12", "#fef9c3"),
}


class Expected(BaseModel):
    """A value, a range or a bound, and on which side of it a claim is exceeded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    better: Literal["higher", "lower", "equal"]
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _value_or_bounds(self) -> Expected:
        if (self.value is None) == (self.low is None and self.high is None):
            raise ValueError("expected either a value, or low and/or high")
        if not self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"expected low <= high, got {self.low} and {self.high}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest expected value."""
        if self.value is not None:
            return self.value, self.value
        return (
            -math.inf if self.low is None else self.low,
            math.inf if self.high is None else self.high,
        )

    def __str__(self) -> str:
        """For tables: "3.1 x", "3.07 x to 3.13 x", "at most 110%"."""
        low, high = self.bounds
        if low == high:
            return format_value(low, self.unit)
        if math.isinf(low):
            return f"at most {format_value(high, self.unit)}"
        if math.isinf(high):
            return f"at least {format_value(low, self.unit)}"
        return f"{format_value(low, self.unit)} to {format_value(high, self.unit)}"


class Claim(BaseModel):
    """One entry of claims.yml.

    `set_in` is the commit that set its bound. `withdrawn` is the reason why a claim is no longer
    made. Such a claim stays in the file and in every table, and is never measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    source: Literal["paper", "ours"]
    quote: str
    metric: str
    arguments: dict[str, Any]
    expected: Expected
    tolerance: float = Field(ge=0, lt=1)
    notebook: str
    figure: str | None
    set_in: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,40}$")
    withdrawn: str | None = Field(default=None, pattern=r"\S")

    @property
    def allowed(self) -> str:
        """What is expected and how far off it may be, for tables: "3.1 x, 10% allowed"."""
        margin = f", {100 * self.tolerance:.3g}% allowed" if self.tolerance else ""
        return f"{self.expected}{margin}"

    @model_validator(mode="after")
    def _known_metric(self) -> Claim:
        if self.metric not in METRICS:
            raise ValueError(f"expected a metric out of {sorted(METRICS)}, got {self.metric!r}")
        try:
            check_arguments(self.metric, self.arguments)
        except TypeError as error:
            raise ValueError(f"metric {self.metric!r}: {error}") from error
        return self


@dataclass(frozen=True)
class Verdict:
    """Verdict of a run on a claim.

    `measured` is None if the run has no value. `low` and `high` are the 95% interval; counts, bytes
    and maxima have none.
    """

    id: str
    source: str
    quote: str
    expected: str
    measured: float | None
    low: float | None
    high: float | None
    n: int
    verdict: Judgement
    why: str
    unit: str
    notebook: str
    figure: str | None
    set_in: str | None = None

    @property
    def measured_text(self) -> str:
        """The measured value with its unit; empty when there is none."""
        return format_value(self.measured, self.unit)

    @property
    def interval_text(self) -> str:
        """The interval with its unit; empty when there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{format_value(self.low, self.unit)} to {format_value(self.high, self.unit)}"


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """Read and check claims.

    Raises:
        ConfigError: the file is missing or an entry is wrong; the message says which and how.
    """
    try:
        claims = TypeAdapter(list[Claim]).validate_python(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error
    ids = [claim.id for claim in claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigError(f"{path}: expected every id once, got {twice} more often")
    return claims


def judge(claims: Iterable[Claim], run: Run) -> list[Verdict]:
    """Return a verdict on every claim, in their order."""
    return [_judge(claim, run) for claim in claims]


def _judge(claim: Claim, run: Run) -> Verdict:
    if claim.withdrawn is not None:  # its value is left out too: it was measured unfairly
        return _verdict(claim, None, "withdrawn", claim.withdrawn)
    try:
        measurement = METRICS[claim.metric](run, **claim.arguments)
    except NotMeasured as reason:
        return _verdict(claim, None, "not judged", str(reason))
    if claim.metric in TIMED and not run.has_clocks:
        return _verdict(claim, measurement, "not judged", CPU_CLOCKS)
    judgement, why = compare(measurement.judged, claim.expected, claim.tolerance)
    why = f"{why}; {measurement.remark}" if measurement.remark else why
    return _verdict(claim, measurement, judgement, why)


def compare(
    measured: tuple[float, float], expected: Expected, tolerance: float
) -> tuple[Judgement, str]:
    """Return the judgement on a measured range, and a phrase that says why.

    The whole range must be on one side of a bound; if it crosses the bound, the claim is
    unresolved. If the whole range is better than expected, the claim is exceeded.
    """
    low, high = expected.bounds
    least = low - tolerance * abs(low) if math.isfinite(low) else low
    most = high + tolerance * abs(high) if math.isfinite(high) else high
    if expected.better == "lower":  # seen from the other side, lower is higher
        (least, most), measured = (-most, -least), (-measured[1], -measured[0])
    more, less = ("less", "more") if expected.better == "lower" else ("more", "less")
    if measured[1] < least:
        return "not reproduced", f"{less} than expected"
    if measured[0] < least:
        return "unresolved", "the interval crosses the bound"
    if measured[1] <= most:
        margin = f", within {tolerance:.0%} of it" if tolerance and low == high else ""
        return "reproduced", f"as expected{margin}"
    if expected.better != "equal":
        if measured[0] > most:
            return "exceeded", f"better than expected ({more})"
        return "reproduced", "as expected or better"
    if measured[0] > most:
        return "not reproduced", f"{more} than expected"
    return "unresolved", "the interval crosses the bound"


def _verdict(claim: Claim, found: Measurement | None, judgement: Judgement, why: str) -> Verdict:
    low, high = (found and found.interval) or (None, None)
    return Verdict(
        **claim.model_dump(include={"id", "source", "quote", "notebook", "figure", "set_in"}),
        expected=claim.allowed,
        measured=float(found.value) if found and math.isfinite(found.value) else None,  # for JSON
        low=low,
        high=high,
        n=found.n if found else 0,
        verdict=judgement,
        why=why,
        unit=claim.expected.unit,
    )


def write_claims(verdicts: Sequence[Verdict], path: Path) -> None:
    """Write verdicts as claims.json; the file appears whole or not at all."""
    write_json(path, [asdict(verdict) for verdict in verdicts])


def read_claims(path: Path) -> list[Verdict]:
    """Return the verdicts of a claims.json, which notebook 05_claims writes.

    Raises:
        RecordError: the file is missing or broken.
    """
    try:
        return TypeAdapter(list[Verdict]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecordError(
            f"{path} cannot be read: {error}: run notebook 05_claims again"
        ) from error


def claims_table(verdicts: Sequence[Verdict], *judgements: Judgement) -> pd.DataFrame:
    """Return one row a claim, as texts; of those with one of the judgements, if any are given."""
    chosen = [v for v in verdicts if not judgements or v.verdict in judgements]
    columns = ["claim", "expected", "measured", "95% interval", "n", "verdict", "why",
               "bound set in"]  # fmt: skip
    rows = [[v.quote, v.expected, v.measured_text, v.interval_text, v.n, v.verdict, v.why,
             v.set_in or ""] for v in chosen]  # fmt: skip
    return pd.DataFrame(rows, pd.Index([v.id for v in chosen], name="id"), columns)


def verdict_counts(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return how many claims of the paper's and of ours got each verdict."""
    pairs = pd.DataFrame({"source": v.source, "verdict": v.verdict} for v in verdicts)
    table = pd.crosstab(pairs["verdict"], pairs["source"], margins=True, margins_name="all")
    return table.reindex([*_COLORS, "all"]).fillna(0).astype(int)


def colored(table: pd.DataFrame) -> Styler:
    """Return a table of claims with coloured verdicts; the words say the same."""

    def look(verdict: Any) -> str:
        ink, back = _COLORS[verdict]
        return f"color: {ink}; background-color: {back}; font-weight: bold; white-space: nowrap"

    # Not random, but the same every time, and another one for each table of a page.
    name = "-".join(["claims", *sorted(set(table["verdict"]))]).replace(" ", "-")
    style = table.style.set_uuid(name)
    return style.map(look, subset=["verdict"]).set_properties(
        subset=None, **{"text-align": "left", "vertical-align": "top"}
    )


def format_value(value: float | None, unit: str) -> str:
    """A measured value with its unit; empty when there is none."""
    if value is None:
        return ""
    if unit == "share":
        return f"{value:.0%}"
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}"
