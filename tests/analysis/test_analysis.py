from __future__ import annotations

import json
from pathlib import Path

import pytest
from row_factory import CAPACITIES, MIB, SIZES, TOTAL_BYTES, cell_rows
from run_factory import MACHINE, write_cell, write_run

from djinn_lib.analysis.claim_metrics import METRICS
from djinn_lib.analysis.claim_tables import verdict_counts, verdict_reasons, verdict_table
from djinn_lib.analysis.claims import judge, load_claims
from djinn_lib.analysis.plots import latency as plots
from djinn_lib.analysis.plots.sensitivity import speedup_table
from djinn_lib.analysis.run import Run, load_run, published
from djinn_lib.errors import RecordError
from djinn_lib.paths import REPO

NOTEBOOKS = REPO / "notebooks"
TARGETS = {
    "03_sensitivity": ["figures/sensitivity.pdf", "figures/sensitivity.png"],
    "04_figures": [
        f"figures/{name}.{ending}"
        for name in (
            "latency_cdf",
            "latency_breakdown",
            "decode_pace",
            "residency_over_time",
            "bytes_loaded",
        )
        for ending in ("pdf", "png")
    ],
    "05_claims": ["claims.json", "comparison_summary.json"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load_run(folder)


def code_cells(notebook: str) -> list[dict]:
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_a_run_holds_everything(run: Run):
    assert run.machine == MACHINE
    assert run.sizes == SIZES
    assert run.page_bytes == MIB
    assert set(run.traces) == {"paper"}
    assert set(run.rows["capacity_label"]) == set(CAPACITIES)
    assert "paper-25-djinn" in run.manifests


def test_failures_leave_out_what_cannot_run_here(run: Run):
    assert set(run.failures["system"]) == {"vllm_recreate"}
    assert len(run.failures) == 8


def test_sweep_is_of_systems_at_several_capacities(run: Run):
    assert set(run.sweep()["system"]) == {"djinn", "pytorch_lru", "pytorch_pinned"}


def test_sweep_of_a_run_at_one_capacity_is_all_of_it(tmp_path: Path):
    write_run(tmp_path)
    for path in (tmp_path / "requests").glob("paper-[234][02]-*"):
        path.unlink()
    assert set(load_run(tmp_path).sweep()["capacity_label"]) == {"25"}


def test_sweep_keeps_a_baseline_that_was_run_at_one_capacity(tmp_path: Path):
    write_run(tmp_path)
    for path in (tmp_path / "requests").glob("paper-[234][02]-pytorch_*"):
        path.unlink()
    rows = load_run(tmp_path).sweep()
    assert set(rows["system"]) == {"djinn", "pytorch_pinned"}
    assert set(load_run(tmp_path).sweep(baseline="pytorch_lru")["system"]) == {
        "djinn", "pytorch_lru"
    }  # fmt: skip
    gains = speedup_table(rows, "pytorch_pinned")
    assert gains["capacity_label"].to_list() == ["25"]
    plots.sensitivity(rows, "pytorch_pinned")


def test_concurrent_rows_are_in_no_cell_or_sweep(tmp_path: Path):
    write_run(tmp_path)
    alone = load_run(tmp_path)
    write_cell(tmp_path, cell_rows("djinn").assign(system="djinn_queue", mode="concurrent"))
    both = load_run(tmp_path)
    assert len(both.rows) == len(alone.rows) + 30
    for rows, same in ((both.cells("paper", "25"), alone.cells("paper", "25")),
                       (both.sweep(), alone.sweep())):  # fmt: skip
        assert rows.reset_index(drop=True).equals(same.reset_index(drop=True))


def test_cells_that_were_not_run_are_refused(run: Run):
    with pytest.raises(RecordError, match=r"capacity 99, got rows of .*\('paper', '20'\)"):
        run.cells("paper", "99")


def test_bounds_on_bytes(run: Run):
    assert run.compulsory_bytes("paper") == TOTAL_BYTES
    assert run.least_bytes("paper", "40") == TOTAL_BYTES  # all of it fits
    assert TOTAL_BYTES < run.least_bytes("paper", "25") < run.least_bytes("paper", "20")


def test_bounds_count_what_must_be_on_the_device(tmp_path: Path):
    """Of a system that leaves tables in the host only the rest is bound to be loaded."""
    write_run(tmp_path)
    before = load_run(tmp_path)
    for path in (tmp_path / "requests").glob("*-djinn.manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["models"]["phi-mini"]["device_bytes"] = SIZES["phi-mini"] // 2
        path.write_text(json.dumps(manifest))
    run = load_run(tmp_path)
    assert run.sizes == before.sizes == before.needed_sizes == before.device_sizes["djinn"]
    assert run.needed_sizes == {**SIZES, "phi-mini": SIZES["phi-mini"] // 2}
    assert run.device_sizes["djinn"] == run.needed_sizes
    assert run.device_sizes["pytorch_lru"] == SIZES
    assert run.least_bytes("paper", "20") < before.least_bytes("paper", "20")
    assert run.compulsory_bytes("paper") == TOTAL_BYTES - SIZES["phi-mini"] // 2
    ratio = METRICS["bytes_to_optimum"]
    where = {"system": "djinn", "capacity_label": "20"}
    assert ratio(run.evidence, **where).value > ratio(before.evidence, **where).value
    where["system"] = "pytorch_lru"
    assert ratio(run.evidence, **where).value == ratio(before.evidence, **where).value


def test_link_floor_is_size_over_rate(run: Run):
    floor = run.link_floor()["ms_at_link_rate"]
    assert floor["phi-mini"] == pytest.approx(SIZES["phi-mini"] / 8e9 * 1000)


def test_cells_of_different_weights_are_refused(tmp_path: Path):
    write_run(tmp_path)
    path = tmp_path / "requests" / "paper-40-djinn.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["models"]["phi-mini"]["bytes"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(RecordError, match=r"weights of 'phi-mini'.*paper-40-djinn"):
        _ = load_run(tmp_path).sizes


def test_a_run_without_rows_says_what_to_do(tmp_path: Path):
    with pytest.raises(RecordError, match="run notebook 02_run_system first"):
        load_run(tmp_path)


def test_a_run_without_set_up_says_what_to_do(tmp_path: Path):
    (tmp_path / "status").mkdir()
    write_cell(tmp_path, cell_rows("djinn"))
    with pytest.raises(RecordError, match="run notebook 00_setup first"):
        load_run(tmp_path)


def test_published_numbers_have_what_the_figures_mark():
    paper = published()
    assert paper["systems"]["djinn"]["p50_total_ms"] == 1392
    assert paper["sensitivity"]["speedup"] == [3.07, 3.13]
    assert paper["sensitivity"]["hit_share"] == [0.53, 1.0]


def test_published_numbers_that_are_missing_say_so(tmp_path: Path):
    with pytest.raises(RecordError, match="restore the file"):
        published(tmp_path / "none.json")


def test_verdict_counts_add_up(run: Run):
    verdicts = judge(load_claims(), run.evidence)
    counts = verdict_counts(verdicts)
    assert counts.loc["all", "all"] == len(verdicts)
    assert counts.loc["not reproduced", "all"] == sum(
        verdict.verdict == "not reproduced" for verdict in verdicts
    )
    assert counts.loc["withdrawn", "all"] == counts.loc["withdrawn", "ours"] == 1


def test_verdict_table_says_each_verdict_in_words(run: Run):
    verdicts = judge(load_claims(), run.evidence)
    html = verdict_table(verdicts).to_html()
    assert html == verdict_table(verdicts).to_html()
    for words in ("not judged", "withdrawn"):
        assert html.count(f">{words}<") == sum(v.verdict == words for v in verdicts) > 0


def test_reasons_name_each_claim_once(run: Run):
    verdicts = judge(load_claims(), run.evidence)
    text = verdict_reasons(verdicts, "not judged")
    for verdict in verdicts:
        assert text.count(f"(`{verdict.id}`)") == (verdict.verdict == "not judged")


def test_a_withdrawn_claim_keeps_its_reason_and_shows_no_value(run: Run):
    text = verdict_reasons(judge(load_claims(), run.evidence), "withdrawn")
    reason, claim = text.splitlines()
    assert reason.startswith("* **the baseline could not batch")
    assert claim.endswith("(`ours-waiting-mean-vs-sleep`): expected at least 1.7 x")


def test_no_claim_of_a_kind_is_said_in_words():
    assert verdict_reasons([], "not reproduced") == "No claim was not reproduced."


@pytest.mark.parametrize("notebook", TARGETS)
def test_notebooks_hold_no_logic_and_no_outputs(notebook: str):
    cells = code_cells(notebook)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    for cell in cells:
        assert not cell["outputs"] and cell["execution_count"] is None
        assert len(cell["source"]) <= 25
        assert not any(
            line.startswith(("for ", "def ", "if ", "while ")) for line in cell["source"]
        )


@pytest.mark.parametrize("notebook", TARGETS)
def test_notebooks_run_and_leave_their_files(notebook: str, folder: Path, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    names: dict = {}
    for cell in code_cells(notebook):
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names["run_dir"] = str(folder)
    assert [name for name in TARGETS[notebook] if not (folder / name).stat().st_size] == []
