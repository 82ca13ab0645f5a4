"""Generate the tables of README.md and of pages in docs/ from the reference run.

    python -m djinn_lib.publishing.pages

Each table is between two comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. The prose
around them is written by hand. A test fails when a page and the data disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.analysis import validation
from djinn_lib.analysis.arriving import load_ratio_table, rates_table, waiting_table
from djinn_lib.analysis.claims import OPEN, Verdict, read_claims, verdict_counts
from djinn_lib.analysis.comparisons import machine_ratio_table, ratio_table, token_table
from djinn_lib.analysis.compressed import compressed_trace_table, masters_table
from djinn_lib.analysis.host_pace import decode_table, loop_table, one_pace_table
from djinn_lib.analysis.parts import gain_table, parts_table
from djinn_lib.analysis.plots.style import system_look
from djinn_lib.analysis.results import (
    ablation_table,
    large_table,
    measures,
    replicates_table,
    systems_table,
)
from djinn_lib.analysis.run import Run, load_run, published
from djinn_lib.analysis.selection import NotMeasured, by_machine
from djinn_lib.analysis.sweeps import sweep_table
from djinn_lib.analysis.tables import as_text, machines_table
from djinn_lib.errors import DjinnError
from djinn_lib.experiment.large_results import read_large
from djinn_lib.files import write_text
from djinn_lib.paths import REFERENCE, REPO, SOAKS, STUDY
from djinn_lib.publishing.report import build_report
from djinn_lib.simulator.cost_model import engine_rows

PAGES = (REPO / "README.md", REPO / "docs" / "results.md", REPO / "docs" / "compressed-masters.md")
BFLOAT16 = "h100-bf16"  # beside the reference run
_STEPS = ("djinn_compiled", "djinn_graph", "djinn_partial_no_overlap", "djinn_whole")
CLAIMS_THAT_MATTER = {
    "paper-p50-vs-pinned-like-for-like": "median of PyTorch pinned over Djinn's, same decoding",
    "paper-p50-vs-pinned-mean-pace": "the same, each request's decode the mean of both",
    "paper-speedup-consistent-like-for-like": (
        "that ratio's largest at any capacity over its smallest"
    ),
    "paper-speedup-consistent-mean-pace": "the same, each request's decode the mean of all",
    "paper-speedup-consistent-fastest-pace": "the same, each decode the fastest of its model",
    "paper-p50-vs-vllm": "median of vLLM re-created (0.24.0; newer ones exist) over Djinn's",
    "paper-vllm-fails": "vLLM fails requests (0.24.0)",
    "paper-resident-warm": "model resident at its request, 25 GiB, from the paper's start",
    "paper-resident": "the same, from an empty ring",
    "paper-switches": "switches in another class than the paper's three (<10 ms, 1-4 s, >10 s)",
    "ours-same-tokens": "ours: Djinn gives the tokens of all transformers systems",
    "ours-zipf-mean-vs-sleep": "ours: mean of sleep mode's best form over Djinn's, 300 requests",
}
_STRESSED = ("not reproduced", "unresolved", "withdrawn")


def main() -> None:
    """Update the pages, and the page of the published run."""
    for path in PAGES:
        write_text(path, render(path.read_text(), load_run(REFERENCE)))
    build_report(REFERENCE, as_html=False)


def render(text: str, run: Run) -> str:
    """Return a page with every table regenerated from the reference run."""
    for name, table in TABLES.items():
        block = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if block.search(text):
            made = _made(table, run)
            text = block.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def _made(table: Callable[[Run], pd.DataFrame], run: Run) -> str:
    try:
        return markdown(table(run))
    except (DjinnError, NotMeasured) as reason:  # the published run may be unfinished
        return f"Not measured: {reason}."


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown: its index as the first columns, numbers with three digits."""
    flat = table if table.index.names == [None] else table.reset_index()
    text = as_text(flat).replace(r"\|", r"\\|", regex=True)
    return text.to_markdown(index=False, disable_numparse=True, tablefmt="github")


def claims_summary(run: Run) -> pd.DataFrame:
    """Return every claim with its verdict on the reference run, and on one without a GPU."""
    verdicts = read_claims(run.folder / "claims.json")
    elsewhere = {v.id: v for v in read_claims(run.folder.parent / "cpu" / "claims.json")}
    table = pd.DataFrame({
        "claim": verdict.quote,
        **_measured(verdict),
        "n": verdict.n or "",
        "without a GPU": _elsewhere(elsewhere.get(verdict.id)),
        "bound set in": verdict.set_in or "",
    } for verdict in verdicts)  # fmt: skip
    table.insert(table.columns.get_loc("verdict"), "n", table.pop("n"))
    return table


def claims_that_matter(run: Run) -> pd.DataFrame:
    """Return a short table of verdicts, for the README."""
    verdicts = {verdict.id: verdict for verdict in read_claims(run.folder / "claims.json")}
    table = pd.DataFrame(
        {"claim": said, **_measured(verdicts[name])} for name, said in CLAIMS_THAT_MATTER.items()
    )
    return table.rename(columns={"measured": "here, H100"})


def _measured(verdict: Verdict) -> dict[str, str]:
    stressed = verdict.verdict in _STRESSED
    return {
        "expected": verdict.expected,
        "measured": verdict.measured_text,
        "95% interval": verdict.interval_text,
        "verdict": f"**{verdict.verdict}**" if stressed else verdict.verdict,
    }


def _elsewhere(verdict: Verdict | None) -> str:
    """What the run without a GPU says of a claim; it may be older than the claim."""
    if verdict is None or verdict.verdict in OPEN:
        return ""
    return f"{verdict.measured_text}, {verdict.verdict}"


def results(run: Run) -> pd.DataFrame:
    """Return a short table of systems, for the README: without the steps of the ablation.

    Systems of one machine stand together, because only they are to be compared, with the mean of
    Djinn on that machine if it ran there. A column for served requests would be all 100 in a good
    run, so there is one only if it is not.
    """
    columns = ["P50 (ms)", "P90 (ms)", "mean (ms)", "mean switch (ms)", "repeats"]
    steps = [system_look(name).label for name in _STEPS]
    table = systems_table(run).drop(index=steps, errors="ignore")
    if (table["served (%)"] < 100).any():
        columns.insert(0, "served (%)")
    if "machine" not in table:  # all rows are from one
        return table[columns]
    columns.insert(columns.index("mean (ms)") + 1, "Djinn's mean there (ms)")
    djinn = pd.concat(measures(run, rows) for rows in by_machine(run, "djinn").values())
    table["Djinn's mean there (ms)"] = table["machine"].map(djinn.set_index("machine")["mean (ms)"])
    place = {machine: n for n, machine in enumerate(dict.fromkeys(table["machine"]))}
    table = table.sort_values("machine", key=lambda names: names.map(place), kind="stable")
    named = table["machine"].mask(table["machine"].duplicated(), "same")
    return table.assign(machine=named).reset_index().set_index(["machine", "system"])[columns]


def engine_targets(run: Run) -> pd.DataFrame:
    """Return targets of the engine with measured values."""
    table = pd.DataFrame(engine_rows(run.folder)["targets"])
    table["met"] = table["met"].map({True: "yes", False: "**no**"})
    return table[["name", "target", "measured", "unit", "met"]].rename(columns={"name": "measure"})


def engine_cases(run: Run) -> pd.DataFrame:
    """Return the costs of hits in every decode mode, and of misses."""
    result = engine_rows(run.folder)
    table = pd.DataFrame(case for case in result["cases"] if "decode" in case)
    order = table["model"].map({model: place for place, model in enumerate(result["sizes"])})
    table = table.iloc[order.argsort(kind="stable")]
    return _columns(table, model="model", case="case", decode="decode", loaded_bytes="loaded (GiB)",
                    switch_ms="switch (ms)", ttft_ms="first token (ms)",
                    ms_per_token="per token (ms)")  # fmt: skip


def engine_pages(run: Run) -> pd.DataFrame:
    """Return how the page size affects costs."""
    table = pd.DataFrame(engine_rows(run.folder)["page_curve"])
    table["page"] = table["page_bytes"] // 2**20
    return _columns(table, page="page (MiB)", full_ms="full load (ms)",
                    partial_ms="partial load (ms)",
                    partial_loaded_bytes="partial load (GiB)")  # fmt: skip


def _columns(table: pd.DataFrame, **names: str) -> pd.DataFrame:
    """Select and rename columns, and convert bytes to GiB."""
    chosen = table[list(names)].rename(columns=names)
    in_gib = [name for name in chosen if name.endswith("(GiB)")]
    return chosen.assign(**{name: chosen[name] / 2**30 for name in in_gib})


def policies(_: Run) -> pd.DataFrame:
    """Return bytes loaded over the optimum, means over the study."""
    study = pd.read_parquet(STUDY / "points.parquet")
    study = study[study["mode"] == "sequential"]
    means = study.pivot_table("ratio", "policy", "traffic", margins=True, margins_name="all")
    return means.drop(index="all").sort_values("all")


def zipf_policies(run: Run) -> pd.DataFrame:
    """Return predictions for other policies on the Zipfian trace."""
    table = validation.predicted_policies(run.folder, "zipf-25-djinn")
    paper = validation.predicted_policies(run.folder, "paper-25-djinn")
    table["paper's trace: bytes / optimum (x)"] = paper["bytes / optimum (x)"]
    return table


def soaks(_: Run, kept: Mapping[str, Path] = SOAKS) -> pd.DataFrame:
    """Return the results of the soak tests."""
    return pd.DataFrame.from_dict({
        where: _soak(json.loads(path.read_text())) for where, path in kept.items()
    }, orient="index").rename_axis("machine")  # fmt: skip


def _soak(result: Mapping[str, Any]) -> dict[str, Any]:
    n_of = result["outcomes"].get
    return {
        "requests": result["requests"],
        "served": n_of("ok", 0),
        "given up": n_of("cancelled", 0),
        "failed": n_of("failed", 0),
        "with other tokens": n_of("mismatched", 0),
        "flat": result["flat"],
    }


def _verdict_counts(run: Run) -> pd.DataFrame:
    return verdict_counts(read_claims(run.folder / "claims.json"))


TABLES: dict[str, Callable[[Run], pd.DataFrame]] = {
    "verdicts": _verdict_counts,
    "claims": claims_summary,
    "claims that matter": claims_that_matter,
    "ratios": lambda run: ratio_table(run, published()),
    "ratios, machines": machine_ratio_table,
    "results": results,
    "systems": systems_table,
    "gain": gain_table,
    "parts": lambda run: parts_table(run, published()),
    "gain with transformers' steps": partial(gain_table, fast="djinn_eager"),
    "tokens": token_table,
    "sweep": sweep_table,
    "zipf": partial(systems_table, trace="zipf"),
    "zipf policies": zipf_policies,
    "ablation": ablation_table,
    "replicates": replicates_table,
    "machines": machines_table,
    "decode": decode_table,
    "one pace": one_pace_table,
    "loop": loop_table,
    "waiting": waiting_table,
    "own arrivals": partial(rates_table, traces="paper_arrivals", target_ms=2000.0),
    "load": partial(rates_table, traces="load", target_ms=2000.0),
    "load, ratios": partial(load_ratio_table, traces="load"),
    "two models": partial(rates_table, traces="pair", target_ms=1000.0),
    "two models, ratios": partial(load_ratio_table, traces="pair"),
    "waiting, predicted": lambda run: validation.looking_ahead(run.folder),
    "large": lambda run: large_table(read_large(run.folder)),
    "engine targets": engine_targets,
    "engine cases": engine_cases,
    "engine pages": engine_pages,
    "policies": policies,
    "soaks": soaks,
    "masters": lambda run: masters_table(run.folder),
    "masters, trace": lambda run: compressed_trace_table(load_run(run.folder.parent / BFLOAT16)),
}


if __name__ == "__main__":
    main()
