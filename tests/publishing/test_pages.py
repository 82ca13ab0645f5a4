"""README.md and docs/results.md say what the reference rows say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_factory import on_another_machine, write_run

from djinn_lib.analysis.claims import judge, load_claims, read_claims
from djinn_lib.analysis.run import Run, load_run
from djinn_lib.experiment import large_results
from djinn_lib.paths import REFERENCE, REPO
from djinn_lib.publishing import pages
from djinn_lib.publishing.pages import PAGES, TABLES, markdown, render
from djinn_lib.publishing.redraw import READING


@pytest.fixture(scope="module")
def reference() -> Run:
    return load_run(REFERENCE)


@pytest.mark.slow
def test_pages_and_data_agree(reference: Run):
    for path in PAGES:
        text = path.read_text()
        assert render(text, reference) == text, "run python -m djinn_lib.publishing.pages"
        assert "Not measured" not in text


def test_every_block_of_a_page_is_a_table_that_is_made():
    texts = [path.read_text() for path in PAGES]
    for text in texts:
        begun = re.findall("<!-- begin (.*) -->", text)
        assert begun == re.findall("<!-- end (.*) -->", text) and set(begun) <= TABLES.keys()
    assert all(any(f"<!-- begin {name} -->" in text for text in texts) for name in TABLES)


@pytest.mark.slow
def test_the_published_verdicts_are_those_of_the_published_rows(reference: Run):
    kept = {v.id: v.verdict for v in read_claims(REFERENCE / "claims.json")}
    assert kept == {v.id: v.verdict for v in judge(load_claims(), reference)}


def test_the_claims_of_the_readme_are_claims_with_their_verdicts(reference: Run):
    verdicts = {verdict.id: verdict for verdict in read_claims(REFERENCE / "claims.json")}
    table = pages.claims_that_matter(reference)
    shown = [verdicts[name] for name in pages.CLAIMS_THAT_MATTER]
    assert table["here, H100"].tolist() == [verdict.measured_text for verdict in shown]
    assert [text.strip("*") for text in table["verdict"]] == [one.verdict for one in shown]


def test_the_verdicts_without_a_gpu_are_on_the_claims_of_the_file():
    kept = {v.id: (v.quote, v.expected) for v in read_claims(REFERENCE.parent / "cpu/claims.json")}
    listed = {claim.id: (claim.quote, claim.allowed) for claim in load_claims()}
    assert kept == listed, "judge a run of the profile cpu again"


def test_systems_stand_beside_the_mean_of_djinn_on_their_own_machine(tmp_path):
    run = load_run(write_run(tmp_path, gpu=True))
    assert "Djinn's mean there (ms)" not in pages.results(run)  # one machine
    apart = on_another_machine(run, "djinn", total_ms=lambda ms: ms / 2)
    table = pages.results(apart)
    assert table.index[0] == ("2", "Djinn") and table.index[1][0] == "1"
    beside = table["Djinn's mean there (ms)"]
    mean_ms = run.rows.query("system == 'djinn' and capacity_label == '25'")["total_ms"].mean()
    assert beside.iloc[0] == pytest.approx(mean_ms / 2)
    assert beside.iloc[1:].tolist() == pytest.approx([mean_ms] * (len(table) - 1))


def test_a_stale_table_is_made_again_and_prose_stays(reference: Run):
    stale = "before\n<!-- begin engine pages -->\n| old |\n<!-- end engine pages -->\nafter\n"
    made = render(stale, reference)
    assert "| old |" not in made and made.startswith("before\n") and made.endswith("after\n")
    assert markdown(TABLES["engine pages"](reference)) in made
    assert render("no tables", reference) == "no tables"


def test_what_an_unfinished_run_lacks_is_said_to_be_not_measured(reference: Run):
    run = replace(reference, rows=reference.rows[reference.rows["trace"] == "paper"])
    made = render("<!-- begin zipf -->\n<!-- end zipf -->\n", run)
    assert made.splitlines()[1].startswith("Not measured: expected rows of trace 'zipf'")


def test_the_command_writes_what_it_renders(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin soaks -->\n<!-- end soaks -->\n")
    monkeypatch.setattr(pages, "PAGES", (page,))
    pages.main()
    assert page.read_text().count("\n|") == 4


def cells_of(notebook: Path) -> list[tuple[str, str]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in cells
        if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]


@pytest.mark.parametrize("name", [*READING, large_results.NOTEBOOK])
def test_what_was_executed_is_the_notebook_of_today(name: str):
    """After an edit: djinn publish data/reference/h100 --replace --unfinished --allow-dirty."""
    executed = REFERENCE / "notebooks" / f"{name}.ipynb"
    assert cells_of(executed) == cells_of(REPO / "notebooks" / f"{name}.ipynb")
