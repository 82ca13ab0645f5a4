from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages import broken_links, links_of
from row_factory import UNAVAILABLE
from run_factory import write_run

from djinn_lib.analysis.claims import judge, load_claims, write_claims
from djinn_lib.analysis.run import load_run
from djinn_lib.experiment.manifest import (
    Status,
    keep_status,
    note_execution,
    read_manifest,
    write_manifest,
)
from djinn_lib.experiment.run_folder import CELL_NOTEBOOK, RunFolder
from djinn_lib.paths import REFERENCE
from djinn_lib.publishing.evidence import Shown, evidence
from djinn_lib.publishing.report import (
    _cells,
    build_report,
    convert_notebooks,
)

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def write_notebook(path: Path) -> None:
    outputs = [
        new_output("display_data", {"image/png": PIXEL}),
        new_output("stream", text="<script>alert(1)</script>"),
    ]
    cells = [new_markdown_cell("# Title"), new_code_cell("x = 1", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), path)


def note(folder: Path, status: Status) -> None:
    """Keep how an execution ended where a run keeps it."""
    run = RunFolder(folder)
    if status.task.startswith(CELL_NOTEBOOK):
        cell = run.cell(status.task.removeprefix(f"{CELL_NOTEBOOK}."))
        note_execution(cell.manifest, asdict(status))
        return
    run.notebooks.mkdir(exist_ok=True)
    run.notebook(status.task).write_text('{"cells": [], "metadata": {}}')
    keep_status(status, run.notebook(status.task))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("data") / "cpu", few=True)
    write_notebook(folder / "notebooks" / "00_setup.ipynb")
    (folder / "notebooks" / "01_trace.ipynb").write_text('{"cells": [')
    (folder / "notebooks" / "02_half.partial.ipynb").write_text("{}")
    (folder / "figures" / "latency_cdf.png").write_bytes(b"")
    (folder / "figures" / "latency_cdf.pdf").write_bytes(b"")
    write_claims(judge(load_claims(), load_run(folder)), folder / "claims.json")
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return build_report(run_dir).read_text()


def loaded_from_the_web(html: str) -> list[str]:
    pattern = r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
    return re.findall(pattern, html)


def test_every_claim_is_there_with_its_verdict_in_words(page: str):
    for claim in load_claims():
        assert f"· {claim.id}<" in page
    assert '<span class="chip not-judged">not judged</span>' in page
    assert '<span class="chip reproduced">reproduced</span>' in page


def test_every_link_leads_to_a_file(page: str, run_dir: Path):
    assert len(links_of(run_dir / "index.html")) > 20
    assert broken_links(run_dir / "index.html") == []


def test_failures_are_counted_by_cell(page: str):
    assert "<strong>paper-25-vllm_recreate</strong>: 8 requests, oom: out of memory" in page
    assert "02_run_system.paper-25-vllm_recreate: oom" not in page  # not said twice


def test_unavailable_systems_are_no_failures(page: str):
    assert f"<strong>vLLM sleep</strong>: {UNAVAILABLE['vllm_sleep']}" in page
    assert "<strong>paper-25-vllm_sleep</strong>" not in page


def test_a_broken_notebook_is_listed_and_stops_nothing(page: str):
    assert "01_trace.ipynb cannot be read: NotJSONError" in page
    assert 'href="notebooks/00_setup.html"' in page
    assert 'href="notebooks/01_trace.html"' not in page


def test_pages_need_no_network(page: str, run_dir: Path):
    assert loaded_from_the_web(page) == []
    html = (run_dir / "notebooks" / "00_setup.html").read_text()
    assert loaded_from_the_web(html) == []
    assert "<script" not in html
    assert f"data:image/png;base64,{PIXEL}" in html


def test_unchanged_notebooks_are_not_converted_again(tmp_path: Path):
    notebook = tmp_path / "a.ipynb"
    write_notebook(notebook)
    html = convert_notebooks(tmp_path)[0].html
    html.write_text("kept")
    stamp = notebook.stat().st_mtime_ns + 10**9
    os.utime(html, ns=(stamp, stamp))
    convert_notebooks(tmp_path)
    assert html.read_text() == "kept"
    os.utime(notebook, ns=(stamp + 10**9, stamp + 10**9))
    convert_notebooks(tmp_path)
    assert "Title" in html.read_text()


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path: Path):
    page = build_report(tmp_path).read_text()
    assert "No claims have been judged yet" in page
    assert "No figures have been drawn yet" in page
    assert "run notebook 02_run_system" in page


def test_a_notebook_that_failed_is_listed(tmp_path: Path):
    note(tmp_path, Status("00_setup", "failed", 1.0, "kernel_died", "killed"))
    assert "00_setup: kernel_died: killed" in build_report(tmp_path).read_text()


# -- what a claim rests on -----------------------------------------------------------------------


def test_each_claim_links_its_notebook_its_figure_and_its_rows(page: str):
    row = page[page.index('id="claim-paper-p50-vs-vllm"') :].partition("</tr>")[0]
    assert 'href="#figure-latency_cdf">figure</a>' in row
    for system in ("djinn", "vllm_recreate"):
        assert f'href="requests/paper-25-{system}.parquet"' in row
    assert "paper-40" not in row and "pytorch" not in row
    swept = page[page.index('id="claim-paper-speedup-range"') :].partition("</tr>")[0]
    assert 'href="requests/paper-40-djinn.parquet"' in swept and "vllm" not in swept
    size = page[page.index('id="claim-paper-total-size"') :].partition("</tr>")[0]
    assert 'href="machine.json"' in size and 'href="notebooks/00_setup.html"' in size
    drawn = page[page.index('id="claim-paper-zipfian"') :].partition("</tr>")[0]
    assert 'href="traces/paper.jsonl"' in drawn


@pytest.mark.slow
def test_every_claim_of_the_file_has_rows_that_it_names(tmp_path: Path):
    """A metric with arguments of a new kind would silently link nothing."""
    run = load_run(write_run(tmp_path / "gpu", gpu=True))
    claims = load_claims()
    shown = Shown({}, (), _cells(run), ("paper.jsonl", "zipf.jsonl"))
    without = [v.id for claim, v in zip(claims, judge(claims, run), strict=True)
               if v.n and not evidence(v, claim, shown)]  # fmt: skip
    assert without == []


def test_other_runs_of_a_cell_are_linked_with_their_times():
    claim = next(claim for claim in load_claims() if claim.id == "paper-p50-djinn")
    cell = ("paper", "25", "djinn", "sequential", "cold")
    again = [f"paper-25-djinn{name}.parquet" for name in (
        "-20261125T192348012734", "-20261124T020720958309",
        "-warm-20261124T020720958309", "_eager-20261124T020720958309",
    )]  # fmt: skip
    shown = Shown({}, (), [cell], (), again)
    (rows,) = evidence(SimpleNamespace(notebook="", figure=""), claim, shown)
    assert rows.href == "requests/paper-25-djinn.parquet"
    assert [other.text for other in rows.others] == ["2026-11-24 02:07", "2026-11-25 19:23"]
    assert rows.others[0].href == f"replicates/{again[1]}"


# -- notebooks -----------------------------------------------------------------------------------


def test_the_notebook_to_begin_with_is_first_and_logs_are_linked(tmp_path: Path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("00_setup", "00_start_here", "02_run_system.a"):
        write_notebook(folder / f"{name}.ipynb")
    (folder / "00_setup.log").write_text("said")
    page = build_report(tmp_path).read_text()
    listed = re.findall(r'<td><a href="notebooks/(\w+)', page)
    assert listed[0] == "00_start_here"
    assert '<a href="notebooks/00_start_here.html">Start with a running ring</a>' in page
    assert page.count('.log">log</a>') == 1 and 'href="notebooks/00_setup.log"' in page


def test_a_cell_that_was_run_by_hand_is_marked(tmp_path: Path):
    folder = write_run(tmp_path / "cpu", few=True)
    write_notebook(folder / "notebooks" / "02_run_system.paper-25-djinn.ipynb")
    assert ">older than its rows<" not in build_report(folder).read_text()
    manifest = folder / "requests" / "paper-25-djinn.manifest.json"
    write_manifest({**read_manifest(manifest), "execution": None}, manifest)
    assert ">older than its rows<" in build_report(folder).read_text()


def test_the_page_of_the_published_run_is_the_one_that_would_be_written(tmp_path: Path):
    """Else: python -m djinn_lib.publishing.pages."""
    copy = tmp_path / REFERENCE.name
    shutil.copytree(REFERENCE, copy)
    (copy / "index.html").unlink()
    assert build_report(copy, as_html=False).read_text() == (REFERENCE / "index.html").read_text()
    assert not list(copy.rglob("notebooks/*.html"))
