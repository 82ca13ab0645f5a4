"""Pages in a real browser: light and dark, wide and narrow, without errors, overflow or holes.

Links are followed on the disk, so that this part runs everywhere. The rest needs Playwright and a
Chromium (Debian, Ubuntu: apt install chromium).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages import broken_links
from run_factory import write_run

from djinn_lib.analysis import cell_view
from djinn_lib.analysis.claims import judge, load_claims, write_claims
from djinn_lib.analysis.plots.latency import latency_cdf
from djinn_lib.analysis.plots.style import save_figure
from djinn_lib.analysis.plots.timeline import residency_over_time
from djinn_lib.analysis.run import load_run
from djinn_lib.experiment.execution.notebook_logs import log_of, move_messages
from djinn_lib.paths import REFERENCE
from djinn_lib.publishing.report import build_report

LONG = "expected 25.0 GiB of free device memory for the ring, got 3.1: /opt/" + "long-name/" * 40


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with claims, figures, failures, and executed notebooks with tables and messages."""
    folder = write_run(tmp_path_factory.mktemp("data") / "cpu", few=True)
    run = load_run(folder)
    rows = run.cells("paper", "25")
    save_figure(latency_cdf(rows), folder / "figures", "latency_cdf")
    save_figure(residency_over_time(rows, "djinn"), folder / "figures", "policies_queue")
    own = rows[rows["system"] == "vllm_recreate"].copy()
    own.loc[~own["ok"], "error"] = LONG
    tables = [cell_view.summary(own), cell_view.requests(own)]
    outputs = [
        new_output("stream", text="Loading weights: 100%\n" * 50),
        *(new_output("display_data", {"text/html": table.to_html()}) for table in tables),
        new_output("display_data", {"text/plain": LONG}),
    ]
    cells = [
        new_markdown_cell("# 02 · Title: what it shows?\n\n" + "prose that is to be wrapped " * 30),
        new_code_cell("x = 1  # " + "a long line of code " * 20, outputs=outputs),
    ]
    copy = folder / "notebooks" / "02_run_system.paper-25-vllm_recreate.ipynb"
    nbformat.write(new_notebook(cells=cells), copy)
    move_messages(copy, log_of(copy))
    write_claims(judge(load_claims()[:12], run), folder / "claims.json")
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def pages(run_dir: Path) -> dict[str, Path]:
    notebook = run_dir / "notebooks" / "02_run_system.paper-25-vllm_recreate.html"
    return {"run": run_dir / "index.html", "notebook": notebook, "ours": REFERENCE / "index.html"}


NAMES = ("run", "notebook", "ours")


@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_lead_somewhere(pages: dict[str, Path], name: str):
    assert broken_links(pages[name]) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "a.html"
    page.write_text('<a id="here" href="#here">a</a> <a href="#gone">b</a> <img src="c.png">')
    assert broken_links(page) == ["#gone", "c.png"]


# -- in Chromium ---------------------------------------------------------------------------------


LOOKS = [(1300, "light"), (800, "dark")]  # width and colours of a screen


def seen(browser: Any, page: Path, looks: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """What a reader would stumble over on a page, on each screen."""
    said: list[str] = []
    view = browser.new_page()
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    view.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else said.append(request.url)
        ),
    )
    view.goto(page.as_uri())
    for width, scheme in looks:
        view.set_viewport_size({"width": width, "height": 900})
        view.emulate_media(color_scheme=scheme)
        yield {"said": said, **view.evaluate(LOOK)}
    view.close()


LOOK = """() => {
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  const holes = [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80));
  const light = color => {
    const [r, g, b, a] = (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    return a === 0 ? null : 0.299 * r + 0.587 * g + 0.114 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = light(getComputedStyle(e).backgroundColor);
      if (found !== null) return found;
    }
    return 255;
  };
  const text = [...document.querySelectorAll("p, td, th, li, h1, h2, h3, a, figcaption, pre")];
  const faint = text.filter(e => e.innerText && e.getClientRects().length)
    .filter(e => Math.abs(light(getComputedStyle(e).color) - behind(e)) < 60)
    .map(e => e.innerText.slice(0, 60));
  const dark_pictures = [...document.images].filter(i => behind(i) < 200).length;
  return {wide, holes, faint, dark_pictures, page: behind(document.body)};
}"""


@pytest.mark.parametrize("name", NAMES)
def test_a_page_reads_well(browser: Any, pages: dict[str, Path], name: str):
    for look, found in zip(LOOKS, seen(browser, pages[name], LOOKS), strict=True):
        assert found["said"] == [], look
        assert found["wide"] <= 0, f"{look}: the page scrolls to the side"
        assert found["holes"] == [], f"{look}: pictures are missing"
        assert found["faint"] == [], f"{look}: text is as light or dark as what is behind it"
        assert found["dark_pictures"] == 0, f"{look}: a transparent figure is black on black"
        assert (found["page"] < 80) == (look[1] == "dark")


def test_what_a_reader_would_stumble_over_is_seen(browser: Any, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<body style="background:#000"><p style="width:3000px;color:#111">x</p>'
        '<img src="gone.png"><script>console.error("oh")</script></body>'
    )
    (found,) = seen(browser, page, [(800, "dark")])
    assert "oh" in found["said"] and any("gone.png" in said for said in found["said"])
    assert found["wide"] > 0 and found["faint"] == ["x"]
    assert len(found["holes"]) == found["dark_pictures"] == 1
