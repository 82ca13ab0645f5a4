"""Tables of README.md about benchmarks, simulations and soaks, which are no rows of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.analysis.result_tables import Table
from djinn_lib.analysis.validation import foretold_policies, looking_ahead
from djinn_lib.paths import REFERENCE, SOAKS, STUDY

ENGINE = REFERENCE / "engine.json"
NOT_YET = "Not measured yet: the reference run on an H100 has no rows so far.\n"


def engine_targets() -> str:
    """What the engine should reach, and reaches."""
    targets = json.loads(ENGINE.read_text())["targets"]
    return Table(
        ["measure", "target", "measured", "unit", "met"],
        [
            [t["name"], _number(t["target"]), _number(t["measured"]), t["unit"], _yes(t["met"])]
            for t in targets
        ],
    ).markdown()


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
    return Table(head, rows).markdown()


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
    return Table(
        ["page, MiB", "full load, ms", "partial load, ms", "GiB of a partial load"], rows
    ).markdown()


def policies() -> str:
    """Bytes loaded over the optimum, means over the study."""
    study = pd.read_parquet(STUDY / "points.parquet")
    study = study[study["mode"] == "sequential"]
    means = study.pivot_table("ratio", "policy", "traffic", margins=True, margins_name="all")
    means = means.drop(index="all").sort_values("all")
    columns = ["independent", "sessions", "all"]
    rows = [[str(name), *(f"{row[c]:.2f}" for c in columns)] for name, row in means.iterrows()]
    return Table(["policy", "independent requests", "sessions", "all"], rows).markdown()


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
    return Table(head, rows).markdown()


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
    return Table(head, rows).markdown()


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
    return Table(head, rows).markdown()


def _number(value: Any) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"
