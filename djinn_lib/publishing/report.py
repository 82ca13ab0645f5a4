"""One page that shows a whole run: claims, figures, systems, failures, notebooks, provenance.

The page and the notebooks next to it are plain files: they need no network and no server.
nbconvert's own pages fetch RequireJS, MathJax and Mermaid from the web. These do not, and they
follow the reader's choice of a light or a dark screen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from nbconvert import HTMLExporter

from djinn_lib.analysis.claims import Verdict, read_claims
from djinn_lib.analysis.plots.style import split_unavailable, system_look
from djinn_lib.analysis.results import systems_table
from djinn_lib.analysis.run import Run, load_run
from djinn_lib.analysis.selection import MAIN_CAPACITY, MAIN_TRACE
from djinn_lib.analysis.tables import as_text, facts_table
from djinn_lib.errors import DjinnError, RecordError
from djinn_lib.experiment.profile import cell_id
from djinn_lib.experiment.status import read_statuses
from djinn_lib.files import write_text
from djinn_lib.paths import user_path

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_NO_ALT = "No description has been provided for this image"
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
        "Weights moved for the whole trace, compared with the least that was possible.",
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
        "Time per token when layers take turns, compared with accelerate's offloading.",
    ),
    "fleet": (
        "A fleet: vLLM engines on one ring",
        "Requests to all models at once, and the bytes of each model on the ring meanwhile.",
    ),
}


@dataclass(frozen=True, slots=True)
class Page:
    """An executed notebook as HTML; `error` says why there is none."""

    notebook: Path
    html: Path
    error: str = ""


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


def convert_notebooks(folder: Path) -> list[Page]:
    """Convert every notebook of a folder whose HTML is missing or older; returns all of them.

    A notebook that cannot be converted does not stop the others.
    """
    template = (_TEMPLATES / "notebook.html.j2").read_text()
    exporter = HTMLExporter(raw_template=template, embed_images=True)
    exporter.log.setLevel(logging.ERROR)  # pictures without a description get one here
    notebooks = sorted(folder.glob("*.ipynb"))
    whole = [path for path in notebooks if not path.name.endswith(".partial.ipynb")]
    return [_convert(exporter, notebook) for notebook in whole]


def _convert(exporter: HTMLExporter, notebook: Path) -> Page:
    html = notebook.with_suffix(".html")
    if html.exists() and html.stat().st_mtime_ns > notebook.stat().st_mtime_ns:
        return Page(notebook, html)
    names = {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}}
    try:
        content = nbformat.read(notebook, as_version=4)
        body, _ = exporter.from_notebook_node(content, names)
    except Exception as error:  # whatever a broken file makes the libraries raise
        html.unlink(missing_ok=True)
        return Page(notebook, html, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    write_text(html, body.replace(_NO_ALT, "Figure drawn by the cell above"))
    return Page(notebook, html)


def _context(folder: Path, pages: Sequence[Page]) -> dict[str, Any]:
    """Everything that the page's template shows."""
    problems = [f"{p.notebook.name} cannot be read: {p.error}" for p in pages if p.error]
    try:
        of_run = _of_run(load_run(folder))
    except DjinnError as error:
        of_run = _no_run()
        problems.append(str(error))
    claims = _claims(folder / "claims.json", problems)
    statuses = {status.task: asdict(status) for status in read_statuses(folder)}
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
        "verdict_counts": Counter(claim.verdict for claim in claims),
        "figures": list(_figures(folder)),
        "notebooks": [_notebook(page, statuses) for page in pages],
        "problems": problems,
        "files": [path.name for path in sorted(folder.glob("*.json"))],
        "traces": [path.name for path in sorted((folder / "traces").glob("*.jsonl"))],
        "cells": sorted(path.stem for path in (folder / "requests").glob("*.parquet")),
        **of_run,
    }


def _of_run(run: Run) -> dict[str, Any]:
    manifests, (_, unavailable) = run.manifests.values(), split_unavailable(run.rows)
    origins = {m["git_commit"][:12] + " with local changes" * m["git_dirty"] for m in manifests}
    return {
        "machine": facts_table(run.machine).itertuples(),
        "device": f"{run.machine['device_name']} ({run.machine['device']})",
        "origins": sorted(origins),
        "started": min((m["started_at_utc"] for m in manifests), default="")[:16],
        "notes": sorted({note for m in manifests for note in m["notes"]}),
        "summary": _summary(run),
        "failures": _failures(run.failures),
        "unavailable": {system_look(s).label: reason for s, reason in unavailable.items()},
    }


def _no_run() -> dict[str, Any]:
    empty: dict[str, Any] = {"machine": [], "origins": [], "notes": [], "failures": []}
    return {**empty, "device": "", "started": "", "summary": None, "unavailable": {}}


def _summary(run: Run) -> Markup | None:
    """The main cells side by side as an HTML table; None if the run has none."""
    try:
        table = systems_table(run)
    except RecordError:
        return None
    return Markup(as_text(table).rename_axis(None).to_html(border=0))


def _failures(failed: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry a cell and kind of failure."""
    cell = ["trace", "capacity_label", "system", "mode", "start"]
    return [
        {
            "cell": cell_id(*names),
            "kind": kind,
            "count": len(part),
            "error": part["error"].iloc[0],
        }
        for (*names, kind), part in failed.groupby([*cell, "error_kind"], sort=False)
    ]


def _claims(path: Path, problems: list[str]) -> list[Verdict]:
    """The verdicts; none, and a problem more, if the file is broken."""
    try:
        return read_claims(path) if path.exists() else []
    except RecordError as error:
        problems.append(str(error))
        return []


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


def _notebook(page: Page, statuses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    status = statuses.get(page.notebook.stem, {})
    return {
        "name": page.notebook.stem,
        "html": "" if page.error else f"notebooks/{page.html.name}",
        "ipynb": f"notebooks/{page.notebook.name}",
        "state": "failed" if page.error else status.get("state", "ok"),
        "seconds": status.get("seconds"),
    }
