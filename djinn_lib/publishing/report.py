"""One page that shows a whole run: claims, figures, systems, failures, notebooks, provenance.

The page and the notebooks next to it are plain files: they need no network and no server.
nbconvert's own pages fetch RequireJS, MathJax and Mermaid from the web. These do not, and they
follow the reader's choice of a light or a dark screen.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import nbformat
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from nbconvert import HTMLExporter

from djinn_lib.analysis.claims import Judgement, Verdict, load_claims, read_claims
from djinn_lib.analysis.plots.style import split_unavailable, system_look
from djinn_lib.analysis.results import systems_table
from djinn_lib.analysis.run import Run, load_run
from djinn_lib.analysis.selection import MAIN_CAPACITY, MAIN_TRACE, usual_capacity
from djinn_lib.analysis.tables import as_text, facts_table
from djinn_lib.errors import DjinnError, RecordError
from djinn_lib.experiment.execution.notebook_logs import log_of
from djinn_lib.experiment.manifest import read_statuses
from djinn_lib.experiment.profile import cell_id
from djinn_lib.experiment.run_folder import CELL_NOTEBOOK
from djinn_lib.files import write_text
from djinn_lib.metrics import attempted
from djinn_lib.paths import user_path
from djinn_lib.publishing.evidence import Shown, evidence

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_CAPTIONS = yaml.safe_load((_TEMPLATES / "captions.yml").read_text())
_NO_ALT = "No description has been provided for this image"
_FIRST = "00_start_here"
_CELL = ["trace", "capacity_label", "system", "mode", "start"]  # the parts of a cell's id


@dataclass(frozen=True, slots=True)
class Page:
    """An executed notebook as HTML; `error` says why conversion failed."""

    notebook: Path
    html: Path
    error: str = ""


def build_report(run_dir: Path | str, as_html: bool = True) -> Path:
    """Write ``index.html`` into a run's folder, and return its path.

    The page lists what is missing or broken, such as a notebook, the claims or the rows. It links
    every executed notebook, `as_html` or as it is: in HTML they double the size of a folder.
    """
    folder = user_path(run_dir).resolve()
    notebooks = folder / "notebooks"
    pages = convert_notebooks(notebooks) if as_html else [Page(p, p) for p in _whole(notebooks)]
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
    """Convert notebooks whose HTML is missing or outdated; return all notebooks.

    A notebook that cannot be converted does not stop the others.
    """
    template = (_TEMPLATES / "notebook.html.j2").read_text()
    exporter = HTMLExporter(raw_template=template, embed_images=True)
    exporter.log.setLevel(logging.ERROR)  # pictures without a description get one here
    return [_convert(exporter, notebook) for notebook in _whole(folder)]


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


def _whole(folder: Path) -> list[Path]:
    """Return the executed notebooks of a folder: the first one to read, others, then cells."""
    found = [p for p in folder.glob("*.ipynb") if not p.name.endswith(".partial.ipynb")]
    cells = f"{CELL_NOTEBOOK}."
    return sorted(found, key=lambda p: (p.stem != _FIRST, p.name.startswith(cells), p.name))


def _context(folder: Path, pages: Sequence[Page]) -> dict[str, Any]:
    """Return the values of the page's template."""
    problems = [f"{p.notebook.name} cannot be read: {p.error}" for p in pages if p.error]
    try:
        of_run = _of_run(load_run(folder))
    except DjinnError as error:
        of_run = _no_run()
        problems.append(str(error))
    statuses = {status.task: asdict(status) for status in read_statuses(folder)}
    verdicts = _claims(folder / "claims.json", problems)
    listing = [_notebook(page, statuses, folder) for page in pages]
    figures = list(_figures(folder))
    traces = [path.name for path in sorted((folder / "traces").glob("*.jsonl"))]
    shown = Shown(
        {entry["name"]: entry["html"] for entry in listing if entry["html"]},
        {figure["name"] for figure in figures},
        of_run.pop("cells"),
        traces,
        [path.name for path in (folder / "replicates").glob("*.parquet")],
    )
    claims = {claim.id: claim for claim in load_claims()}
    listed = {(f"02_run_system.{f['cell']}", f["kind"]) for f in of_run["failures"]}
    problems += [
        f"{name}: {status['error_kind']}: {status['error']}"
        for name, status in statuses.items()
        if status["state"] == "failed" and (name, status["error_kind"]) not in listed
    ]
    return {
        "name": folder.name,
        "main_trace": MAIN_TRACE,
        "claims": [(v, evidence(v, claims.get(v.id), shown)) for v in verdicts],
        "verdict_counts": _counts(verdicts),
        "figures": [figure for figure in figures if figure["name"] not in _CAPTIONS["computed"]],
        "computed": [figure for figure in figures if figure["name"] in _CAPTIONS["computed"]],
        "notebooks": listing,
        "first": next((n["html"] for n in listing if n["name"] == _FIRST), ""),
        "problems": problems,
        "files": [path.name for path in sorted(folder.glob("*.json"))],
        "traces": traces,
        "cells": sorted(path.stem for path in (folder / "requests").glob("*.parquet")),
        **of_run,
    }


def _of_run(run: Run) -> dict[str, Any]:
    manifests, (_, unavailable) = run.manifests.values(), split_unavailable(run.rows)
    origins = {m["git_commit"][:12] + " with local changes" * m["git_dirty"] for m in manifests}
    return {
        "machine": facts_table(run.machine).itertuples(),
        "cells": _cells(run),
        "device": f"{run.machine['device_name']} ({run.machine['device']})",
        "origins": sorted(origins),
        "started": min((m["started_at_utc"] for m in manifests), default="")[:16],
        "notes": sorted({note for m in manifests for note in m["notes"]}),
        "main_capacity": usual_capacity(run),
        "summary": _summary(run),
        "failures": _failures(run.failures),
        "unavailable": {system_look(s).label: reason for s, reason in unavailable.items()},
    }


def _no_run() -> dict[str, Any]:
    empty: dict[str, Any] = {"machine": [], "origins": [], "notes": [], "failures": []}
    empty |= {"main_capacity": MAIN_CAPACITY, "summary": None, "unavailable": {}}
    return {**empty, "cells": [], "device": "", "started": ""}


def _summary(run: Run) -> Markup | None:
    """Return the comparison of the main cells as an HTML table; None without rows."""
    try:
        table = systems_table(run, capacity_label=usual_capacity(run))
    except RecordError:
        return None
    return Markup(as_text(table).rename_axis(None).to_html(border=0))


def _failures(failed: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one entry for each cell and kind of failure."""
    return [
        {"cell": cell_id(*names), "kind": kind, "count": len(part), "error": part["error"].iloc[0]}
        for (*names, kind), part in failed.groupby([*_CELL, "error_kind"], sort=False)
    ]


def _claims(path: Path, problems: list[str]) -> list[Verdict]:
    """Return the verdicts; if the file is broken, add a problem and return none."""
    try:
        return read_claims(path) if path.exists() else []
    except RecordError as error:
        problems.append(str(error))
        return []


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return the number of claims with each verdict that occurs, in the order of the verdicts."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    return {name: counts[name] for name in get_args(Judgement) if counts[name]}


def _cells(run: Run) -> list[tuple[str, str, str, str, str]]:
    return list(attempted(run.rows)[_CELL].drop_duplicates().itertuples(index=False, name=None))


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the existing figures, in the order of their captions; those without come last."""
    captions = _CAPTIONS["measured"] | _CAPTIONS["computed"]
    stems = sorted(path.stem for path in (folder / "figures").glob("*.png"))
    for name in sorted(stems, key=lambda stem: [*captions, stem].index(stem)):
        pdf = folder / "figures" / f"{name}.pdf"
        yield {"name": name, "title": name.replace("_", " "), "caption": "",
               **captions.get(name, {}), "png": f"figures/{name}.png",
               "pdf": f"figures/{name}.pdf" if pdf.exists() else ""}  # fmt: skip


def _notebook(
    page: Page, statuses: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    name = page.notebook.stem
    status = statuses.get(name, {})
    cell = folder / "requests" / f"{name.removeprefix(f'{CELL_NOTEBOOK}.')}.manifest.json"
    state = "older than its rows" if _run_by_hand(cell) else status.get("state", "ok")
    return {
        "name": name,
        "html": "" if page.error else f"notebooks/{page.html.name}",
        "ipynb": f"notebooks/{page.notebook.name}",
        "log": f"notebooks/{name}.log" if log_of(page.notebook).exists() else "",
        "state": "failed" if page.error else state,
        "seconds": status.get("seconds"),
    }


def _run_by_hand(manifest: Path) -> bool:
    """Whether the rows of a cell are newer than its executed notebook."""
    try:
        return json.loads(manifest.read_text()).get("execution", "") is None
    except (OSError, ValueError, AttributeError):
        return False
