"""The tables of README.md that are made from reference rows: `python -m djinn_lib.readme`.

Each stands between two comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and is made
anew from the rows; a test fails when the file and the rows disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from djinn_lib.files import write_text
from djinn_lib.paths import REFERENCE, REPO, STUDY

ENGINE = REFERENCE / "engine.json"


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


TABLES: dict[str, Callable[[], str]] = {
    "engine targets": engine_targets,
    "engine cases": engine_cases,
    "engine pages": engine_pages,
    "policies": policies,
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
