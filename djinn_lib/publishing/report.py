"""One page that shows a whole run: claims, figures, systems, failures, notebooks, provenance.

The page and the notebooks beside it are plain files: they need no network and no server.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from djinn_lib.analysis.claims import format_value
from djinn_lib.analysis.plots.style import order_systems, split_unavailable, system_look
from djinn_lib.analysis.run import Run, load_run
from djinn_lib.analysis.tables import facts_table
from djinn_lib.errors import DjinnError
from djinn_lib.experiment.notebooks import read_statuses
from djinn_lib.experiment.profile import cell_id
from djinn_lib.files import write_text
from djinn_lib.metrics import sequential, summarise
from djinn_lib.paths import user_path
from djinn_lib.publishing.notebook_html import Page, convert_notebooks
from djinn_lib.units import format_bytes, three_digits

MAIN_TRACE, MAIN_CAPACITY = "paper", "25"
_TEMPLATES = Path(__file__).resolve().parent / "templates"
# Figures in the order of the page, with title and caption; others follow by name.
CAPTIONS = {
    "latency_cdf": (
        "Latency of every request",
        "Share of requests served within a time. A system that failed requests ends below 100%, "
        "at a cross.",
    ),
    "sensitivity": (
        "Sensitivity to the capacity",
        "Speed-up over the baseline with 95% intervals, and requests that found their weights.",
    ),
    "latency_breakdown": (
        "Where the time goes",
        "Mean latency of each system by phase, in milliseconds and as shares.",
    ),
    "decode_pace": (
        "How steady decoding is",
        "Each request's decode as a multiple of the fastest of its model; a line is a repeat.",
    ),
    "residency_over_time": (
        "What fills the ring",
        "Bytes of each model after each request; hatched where only a part of it is resident.",
    ),
    "bytes_loaded": (
        "Bytes moved",
        "Weights moved for the whole trace, beside the least that was possible.",
    ),
    "zipf": (
        "A longer trace",
        "What switches cost, and how long requests take, when models are drawn by Zipf's law.",
    ),
    "concurrent": (
        "Requests that wait for each other",
        "What switches cost, and how long requests take, when all are sent at once. Every system "
        "computes one request at a time; none batches.",
    ),
    "large_models": (
        "A model larger than the ring",
        "Time per token when layers take turns, beside accelerate's offloading.",
    ),
}


def build_report(run_dir: Path | str) -> Path:
    """Write ``index.html`` into a run's folder, and every executed notebook as HTML.

    What is missing or broken (a notebook, the claims, the rows) is listed as such on the page.

    Returns:
        The page's path.
    """
    folder = user_path(run_dir).resolve()
    pages = convert_notebooks(folder / "notebooks")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"slug": lambda text: text.replace(" ", "-")}
    html = environment.get_template("index.html.j2").render(**_context(folder, pages))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "index.html", html)
    return folder / "index.html"


def _context(folder: Path, pages: Sequence[Page]) -> dict[str, Any]:
    """Everything that the page's template shows."""
    problems = [
        f"{page.notebook.name} cannot be read: {page.error}" for page in pages if page.error
    ]
    try:
        run = load_run(folder)
    except DjinnError as error:
        run = None
        problems.append(str(error))
    statuses, claims = _statuses(folder), _claims(folder, problems)
    of_run = _of_run(run) if run else _no_run()
    listed = {(f"02_run_system.{f['cell']}", f["kind"]) for f in of_run["failures"]}
    problems += [
        f"{name}: {status['error_kind']}: {status['error']}"
        for name, status in statuses.items()
        if status["state"] == "failed" and (name, status["error_kind"]) not in listed
    ]
    return {
        "name": folder.name,
        "main_trace": MAIN_TRACE,
        "main_capacity": MAIN_CAPACITY,
        "claims": claims,
        "verdict_counts": Counter(claim["verdict"] for claim in claims),
        "figures": list(_figures(folder)),
        "notebooks": [_notebook(page, statuses) for page in pages],
        "problems": problems,
        "files": [path.name for path in sorted(folder.glob("*.json"))],
        "traces": [path.name for path in sorted((folder / "traces").glob("*.jsonl"))],
        "cells": sorted(path.stem for path in (folder / "requests").glob("*.parquet")),
        **of_run,
    }


def _of_run(run: Run) -> dict[str, Any]:
    rows = run.rows
    _, unavailable = split_unavailable(rows)
    return {
        "machine": facts_table(run.machine).itertuples(),
        "device": f"{run.machine['device_name']} ({run.machine['device']})",
        "origins": sorted(set(_origins(run.manifests.values()))),
        "started": min((m["started_at_utc"] for m in run.manifests.values()), default="")[:16],
        "notes": sorted({note for m in run.manifests.values() for note in m["notes"]}),
        "summary": _summary(rows),
        "failures": _failures(run.failures),
        "unavailable": {system_look(s).label: reason for s, reason in unavailable.items()},
    }


def _no_run() -> dict[str, Any]:
    empty: dict[str, Any] = {"machine": [], "origins": [], "notes": [], "failures": []}
    return {**empty, "device": "", "started": "", "summary": None, "unavailable": {}}


def _origins(manifests: Any) -> Iterator[str]:
    for manifest in manifests:
        changed = " with local changes" if manifest["git_dirty"] else ""
        yield f"{manifest['git_commit'][:12]}{changed}"


def _summary(rows: pd.DataFrame) -> Markup | None:
    """The main cells side by side as an HTML table."""
    main = sequential(rows)
    main = main[(main["trace"] == MAIN_TRACE) & (main["capacity_label"] == MAIN_CAPACITY)]
    main, _ = split_unavailable(main)
    if main.empty:
        return None
    return Markup(summary_table(summarise(main)).to_html(border=0, index_names=False))


def summary_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary's cells in the figures' order of systems, as texts for people."""
    cells = summary.reset_index().set_index("system")
    cells = cells.loc[order_systems(cells.index)]
    table = pd.DataFrame(index=[system_look(system).label for system in cells.index])
    table["served"] = [f"{c} of {n}" for c, n in zip(cells["completed"], cells["n"], strict=True)]
    for name in ("p50", "p90", "p99"):
        table[f"{name.upper()} (ms)"] = cells[f"{name}_total_ms"].map(three_digits).to_list()
    table["TTFT P50 (ms)"] = cells["p50_ttft_ms"].map(three_digits).to_list()
    table["switch, mean (ms)"] = cells["mean_switch_ms"].map(three_digits).to_list()
    table["loaded nothing (%)"] = (100.0 * cells["zero_load_share"]).map(three_digits).to_list()
    for name, title in (("loaded", "loaded"), ("writeback", "written back")):
        table[title] = [format_bytes(int(size)) for size in cells[f"{name}_bytes"]]
    return table


def _failures(failed: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry a cell and kind of failure."""
    cell = ["trace", "capacity_label", "system", "mode"]
    return [
        {
            "cell": cell_id(*names),
            "kind": kind,
            "count": len(part),
            "error": part["error"].iloc[0],
        }
        for (*names, kind), part in failed.groupby([*cell, "error_kind"], sort=False)
    ]


def _claims(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The verdicts with texts for people; none, and a problem more, if the file is broken."""
    path = folder / "claims.json"
    try:
        claims = json.loads(path.read_text()) if path.exists() else []
        return [
            {
                **claim,
                "measured_text": format_value(claim["measured"], claim["unit"]) or "-",
                "interval_text": _interval_text(claim),
            }
            for claim in claims
        ]
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{path.name} cannot be read: {error!r}: run notebook 05_claims again")
        return []


def _interval_text(claim: Mapping[str, Any]) -> str:
    low, high = claim["low"], claim["high"]
    if low is None or high is None or low == high:
        return ""
    return f"{format_value(low, claim['unit'])} to {format_value(high, claim['unit'])}"


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    stems = sorted(path.stem for path in (folder / "figures").glob("*.png"))
    known = [name for name in CAPTIONS if name in stems]
    for name in known + [stem for stem in stems if stem not in CAPTIONS]:
        pdf = folder / "figures" / f"{name}.pdf"
        title, caption = CAPTIONS.get(name, (name.replace("_", " "), ""))
        yield {
            "title": title,
            "png": f"figures/{name}.png",
            "pdf": f"figures/{name}.pdf" if pdf.exists() else "",
            "caption": caption,
        }


def _statuses(folder: Path) -> dict[str, dict[str, Any]]:
    return {status.task: asdict(status) for status in read_statuses(folder / "status")}


def _notebook(page: Page, statuses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    status = statuses.get(page.notebook.stem, {})
    return {
        "name": page.notebook.stem,
        "html": "" if page.error else f"notebooks/{page.html.name}",
        "ipynb": f"notebooks/{page.notebook.name}",
        "state": "failed" if page.error else status.get("state", "ok"),
        "seconds": status.get("seconds"),
    }
