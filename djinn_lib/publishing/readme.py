"""The tables of README.md that are made from reference rows.

    python -m djinn_lib.publishing.readme

Each stands between two comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and is made
anew from the rows; a test fails when the file and the rows disagree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from djinn_lib.analysis.claim_tables import claims_summary
from djinn_lib.analysis.claims import OPEN, Claim, format_value, judge, load_claims
from djinn_lib.analysis.comparisons import fairness, gain, like_for_like, other_tokens
from djinn_lib.analysis.explanations import pace
from djinn_lib.analysis.result_tables import (
    Table,
    ablation_table,
    large_table,
    replicates_table,
    sweep_table,
    systems_table,
)
from djinn_lib.analysis.run import Run, load_run, published
from djinn_lib.analysis.waiting import waiting_table
from djinn_lib.experiment import large_results
from djinn_lib.experiment.profile import load_profile
from djinn_lib.files import write_text
from djinn_lib.paths import REFERENCE, REPO
from djinn_lib.publishing.merge import missing_cells
from djinn_lib.publishing.readme_benchmarks import (
    NOT_YET,
    ahead,
    engine_cases,
    engine_pages,
    engine_targets,
    policies,
    soaks,
    zipf_policies,
)


def main() -> None:
    """Bring README.md up to date."""
    path = REPO / "README.md"
    write_text(path, render(path.read_text()))


def render(text: str) -> str:
    """Return `text` with every generated table made anew."""
    for name, table in TABLES.items():
        block = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = block.sub(lambda found, table=table: found[1] + table() + found[2], text)
    return text


def reference_run(reference: Path = REFERENCE) -> Run | None:
    """Return the reference run, None while it has no rows."""
    return _load(reference) if any((reference / "requests").glob("*.parquet")) else None


@cache
def _load(reference: Path) -> Run:
    return load_run(reference)


def results(reference: Path = REFERENCE) -> str:
    """Every system on the paper's trace."""
    run = reference_run(reference)
    return _so_far(run) + systems_table(run, published()).markdown() if run else NOT_YET


def _so_far(run: Run) -> str:
    """A sentence on what misses of an unfinished run; "" for a finished one."""
    profile = load_profile(next(iter(run.manifests.values()))["profile"])
    missing, n_cells = missing_cells(profile, run.folder), len(profile.all_cells())
    if not missing:
        return ""
    return (
        f"Measured so far: {n_cells - len(missing)} of {n_cells} cells of the profile "
        f"`{profile.name}`. Claims about every system or capacity are judged on those that are "
        "there.\n\n"
    )


def comparison(reference: Path = REFERENCE) -> str:
    """Whether the paper's comparison with vLLM is the one a user would make, in words."""
    run = reference_run(reference)
    return f"{fairness(run, published())}\n" if run else NOT_YET


def headline(reference: Path = REFERENCE) -> str:
    """What is left of the paper's headline when both sides decode alike, in words."""
    run = reference_run(reference)
    return f"{like_for_like(run, published())}\n" if run else NOT_YET


def tokens(reference: Path = REFERENCE) -> str:
    """How many requests get other tokens than from transformers, in words."""
    run = reference_run(reference)
    return f"{other_tokens(run, published())}\n" if run else NOT_YET


def parts_of_the_gain(reference: Path = REFERENCE) -> str:
    """What the gain over the paper's baseline is made of, in words."""
    run = reference_run(reference)
    return f"{gain(run, published())}\n" if run else NOT_YET


def sweep(reference: Path = REFERENCE) -> str:
    """The systems that were run at several capacities."""
    run = reference_run(reference)
    return sweep_table(run).markdown() if run else NOT_YET


def zipf(reference: Path = REFERENCE) -> str:
    """Every system that was run on the Zipfian trace."""
    run = reference_run(reference)
    if run is None or "zipf" not in set(run.rows["trace"]):
        return NOT_YET
    return systems_table(run, {}, trace="zipf").markdown()


def ablation(reference: Path = REFERENCE) -> str:
    """What each step from whole models to Djinn is worth."""
    run = reference_run(reference)
    return ablation_table(run).markdown() if run else NOT_YET


def again(reference: Path = REFERENCE) -> str:
    """Cells that were measured on several machines."""
    run = reference_run(reference)
    if run is None or run.replicates.empty:
        return NOT_YET
    return replicates_table(run).markdown()


def eager_pace(reference: Path = REFERENCE) -> str:
    """How steady eager decoding is, in words."""
    run = reference_run(reference)
    return f"{pace(run, published())}\n" if run else NOT_YET


def waiting(reference: Path = REFERENCE) -> str:
    """What switches cost where all requests are sent at once."""
    run = reference_run(reference)
    if run is None or run.concurrent_cells().empty:
        return NOT_YET
    return waiting_table(run).markdown()


def large(reference: Path = REFERENCE) -> str:
    """What a token takes where a model is larger than the ring."""
    if not (reference / large_results.ROWS).exists():
        return NOT_YET
    return large_table(large_results.read_large(reference)).markdown()


def claims(reference: Path = REFERENCE) -> str:
    """Every claim with its verdict; while there are no rows, what is expected."""
    listed, run = load_claims(), reference_run(reference)
    by_source = Counter(claim.source for claim in listed)
    count = (
        f"`claims.yml` holds {len(listed)} claims: {by_source['paper']} of the paper, "
        f"{by_source['ours']} of ours."
    )
    if run is None:
        return f"{count} {NOT_YET}\n{_expectations(listed)}"
    verdicts = judge(listed, run.evidence)
    found = Counter(verdict.verdict for verdict in verdicts)
    said = ", ".join(f"{number} {verdict}" for verdict, number in found.most_common())
    table = claims_summary(verdicts, _without_gpu(reference)).markdown()
    return f"{count} On {run.machine['device_name']}: {said}.\n\n{table}"


def _expectations(listed: list[Claim]) -> str:
    rows = [
        [
            claim.quote,
            str(claim.expected),
            "not measured yet" if claim.withdrawn is None else "withdrawn",
        ]
        for claim in listed
    ]
    return Table(["claim", "expected", "measured"], rows).markdown()


def _without_gpu(reference: Path) -> dict[str, dict[str, Any]]:
    """Verdicts of a run without a GPU, by the claim's id, where they are kept."""
    path = reference.parent / "cpu" / "claims.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    return {entry["id"]: entry for entry in entries}


def claims_without_gpu(reference: Path = REFERENCE) -> str:
    """Every claim that a run without a GPU could judge."""
    judged = [e for e in _without_gpu(reference).values() if e["verdict"] not in OPEN]
    rows = [
        [
            entry["quote"],
            entry["expected"],
            format_value(entry["measured"], entry["unit"]),
            str(entry["n"]) if entry["n"] else "-",
            f"**{entry['verdict']}**"
            if entry["verdict"] == "not reproduced"
            else str(entry["verdict"]),
        ]
        for entry in judged
    ]
    return Table(["claim", "expected", "measured without a GPU", "n", "verdict"], rows).markdown()


TABLES: dict[str, Callable[[], str]] = {
    "claims": claims,
    "headline": headline,
    "comparison": comparison,
    "tokens": tokens,
    "results": results,
    "gain": parts_of_the_gain,
    "sweep": sweep,
    "zipf": zipf,
    "zipf policies": zipf_policies,
    "ablation": ablation,
    "replicates": again,
    "pace": eager_pace,
    "engine targets": engine_targets,
    "engine cases": engine_cases,
    "engine pages": engine_pages,
    "policies": policies,
    "claims without a GPU": claims_without_gpu,
    "soaks": soaks,
    "ahead": ahead,
    "waiting": waiting,
    "large": large,
}


if __name__ == "__main__":
    main()
