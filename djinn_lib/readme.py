"""The tables of README.md that are made from reference rows: `python -m djinn_lib.readme`.

Each stands between two comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and is made
anew from the rows; a test fails when the file and the rows disagree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib import large_results
from djinn_lib.analysis import Run, load_run, published
from djinn_lib.claims import Claim, format_value, judge, load_claims
from djinn_lib.explanations import fairness, gain, pace
from djinn_lib.files import write_text
from djinn_lib.merge import missing_cells
from djinn_lib.paths import REFERENCE, REPO, SOAKS, STUDY
from djinn_lib.profile import load_profile
from djinn_lib.result_tables import (
    ablation_table,
    claims_summary,
    large_table,
    replicates_table,
    sweep_table,
    systems_table,
    waiting_table,
)
from djinn_lib.validation import foretold_policies, looking_ahead

ENGINE = REFERENCE / "engine.json"
NOT_YET = "Not measured yet: the reference run on an H100 has no rows so far.\n"


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


def engine_targets() -> str:
    """What the engine should reach, and reaches."""
    targets = json.loads(ENGINE.read_text())["targets"]
    return _table(
        ["measure", "target", "measured", "unit", "met"],
        [
            [t["name"], _number(t["target"]), _number(t["measured"]), t["unit"], _yes(t["met"])]
            for t in targets
        ],
    )


def engine_cases() -> str:
    """Hits in every way of decoding, and misses."""
    result = json.loads(ENGINE.read_text())
    rows = [
        [
            case["model"],
            case["case"],
            case["decode"],
            f"{case['loaded_bytes'] / 2**30:.2f}",
            f"{case['switch_ms']:.2f}",
            f"{case['ttft_ms']:.1f}",
            f"{case['ms_per_token']:.2f}",
        ]
        for case in sorted(
            result["cases"], key=lambda case: list(result["sizes"]).index(case["model"])
        )
        if "decode" in case
    ]
    head = [
        "model",
        "case",
        "decode",
        "GiB loaded",
        "switch, ms",
        "first token, ms",
        "ms per token",
    ]
    return _table(head, rows)


def engine_pages() -> str:
    """What the size of a page changes."""
    curve = json.loads(ENGINE.read_text())["page_curve"]
    rows = [
        [
            f"{row['page_bytes'] >> 20}",
            f"{row['full_ms']:.1f}",
            f"{row['partial_ms']:.1f}",
            f"{row['partial_loaded_bytes'] / 2**30:.2f}",
        ]
        for row in curve
    ]
    return _table(["page, MiB", "full load, ms", "partial load, ms", "GiB of a partial load"], rows)


def policies() -> str:
    """Bytes loaded over the optimum, means over the study."""
    study = pd.read_parquet(STUDY / "points.parquet")
    study = study[study["mode"] == "sequential"]
    means = study.pivot_table("ratio", "policy", "traffic", margins=True, margins_name="all")
    means = means.drop(index="all").sort_values("all")
    columns = ["independent", "sessions", "all"]
    rows = [[str(name), *(f"{row[c]:.2f}" for c in columns)] for name, row in means.iterrows()]
    return _table(["policy", "independent requests", "sessions", "all"], rows)


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
    rows = [[claim.quote.replace("|", "\\|"), str(claim.expected), "not measured yet"]
            for claim in listed]  # fmt: skip
    return _table(["claim", "expected", "measured"], rows)


def _without_gpu(reference: Path) -> dict[str, dict[str, Any]]:
    """Verdicts of a run without a GPU, by the claim's id, where they are kept."""
    path = reference.parent / "cpu" / "claims.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    return {entry["id"]: entry for entry in entries}


def claims_without_gpu(reference: Path = REFERENCE) -> str:
    """Every claim that a run without a GPU could judge."""
    judged = [e for e in _without_gpu(reference).values() if e["verdict"] != "not judged"]
    rows = [
        [
            entry["quote"].replace("|", "\\|"),
            entry["expected"],
            format_value(entry["measured"], entry["unit"]),
            str(entry["n"]) if entry["n"] else "-",
            f"**{entry['verdict']}**"
            if entry["verdict"] == "not reproduced"
            else str(entry["verdict"]),
        ]
        for entry in judged
    ]
    return _table(["claim", "expected", "measured without a GPU", "n", "verdict"], rows)


def soaks(kept: Mapping[str, Path] = SOAKS) -> str:
    """What happened to many requests at once."""
    rows = []
    for where, path in kept.items():
        if not path.exists():
            rows.append([where, *["not measured yet"] * 6])
            continue
        result = json.loads(path.read_text())
        n_of = result["outcomes"].get
        rows.append(
            [
                where,
                f"{result['requests']:,}",
                f"{n_of('ok', 0):,}",
                f"{n_of('cancelled', 0):,}",
                f"{n_of('failed', 0):,}",
                f"{n_of('mismatched', 0):,}",
                "yes" if result["flat"] else "**no**",
            ]
        )
    head = ["machine", "requests", "served", "given up", "failed", "with other tokens", "flat"]
    return _table(head, rows)


def ahead() -> str:
    """What loading ahead is foretold to be worth on the paper's trace."""
    table = looking_ahead()
    rows = [
        [
            str(name),
            f"{row.mean_exposed_ms:.1f}",
            f"{row.max_exposed_ms:.1f}",
            f"{row.loaded_gib:.1f}",
            f"{row.done_s:.2f}",
        ]
        for name, row in table.iterrows()
    ]
    head = ["requests", "mean switch, ms", "longest switch, ms", "GiB loaded", "all done after, s"]
    return _table(head, rows)


def zipf_policies(reference: Path = REFERENCE) -> str:
    """What other policies are foretold to be worth on the Zipfian trace."""
    cells = ("zipf-25-djinn", "paper-25-djinn")
    if not all((reference / "requests" / f"{cell}.parquet").exists() for cell in cells):
        return NOT_YET
    on_zipf, on_paper = (foretold_policies(reference, cell) for cell in cells)
    rows = [
        [
            str(name),
            f"{row.loaded_gib:.0f}",
            f"{row.to_optimum:.2f}",
            f"{row.mean_switch_ms:.1f}",
            f"{row.mean_ms:.0f}",
            f"{row.p90_ms:.0f}",
            f"{on_paper.to_optimum[name]:.2f}",
        ]
        for name, row in on_zipf.iterrows()
    ]
    head = ["policy", "GiB loaded", "bytes / optimum", "mean switch, ms", "mean, ms", "P90, ms",
            "bytes / optimum, paper's trace"]  # fmt: skip
    return _table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "claims": claims,
    "comparison": comparison,
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


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


if __name__ == "__main__":
    main()
