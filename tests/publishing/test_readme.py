"""README.md says what the reference rows say."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from djinn_lib.analysis.explanations import explanations
from djinn_lib.analysis.replicates import write_replicate
from djinn_lib.analysis.result_tables import sweep_table
from row_factory import CAPACITIES, cell_rows
from run_factory import (
    GPU_MACHINE,
    on_another_machine,
    write_cell,
    write_large_rows,
    write_run,
)

from djinn_lib.analysis.claims import Verdict, judge, load_claims
from djinn_lib.analysis.comparisons import fairness
from djinn_lib.analysis.plots.sensitivity import speedup_table
from djinn_lib.analysis.plots.style import system_look
from djinn_lib.analysis.run import load_run, published
from djinn_lib.experiment.profile import load_profile
from djinn_lib.metrics import later_touches
from djinn_lib.paths import REFERENCE, REPO
from djinn_lib.publishing import readme, readme_benchmarks
from djinn_lib.publishing.merge import missing_cells
from djinn_lib.rows import no_rows, read_manifest, rows_frame, write_manifest, write_rows

README = REPO / "README.md"
OF_ROWS = {"claims", "headline", "comparison", "tokens", "results", "gain", "sweep", "zipf",
           "ablation", "replicates", "pace"}  # fmt: skip


def test_tables_are_those_of_the_reference():
    text = README.read_text()
    assert readme.render(text) == text, "run python -m djinn_lib.publishing.readme"


def test_every_table_stands_in_the_readme():
    text = README.read_text()
    for name, table in readme.TABLES.items():
        assert f"<!-- begin {name} -->\n{table()}<!-- end {name} -->" in text


def test_a_stale_table_is_made_anew():
    stale = "before\n<!-- begin engine pages -->\n| old |\n<!-- end engine pages -->\nafter\n"
    made = readme.render(stale)
    assert "| old |" not in made and made.startswith("before\n") and made.endswith("after\n")
    assert readme_benchmarks.engine_pages() in made


def test_the_published_verdicts_are_those_of_the_published_rows():
    path = REFERENCE / "claims.json"
    if not path.exists():
        assert readme.reference_run() is None, "rows without verdicts: publish again"
        return
    kept = {entry["id"]: entry["verdict"] for entry in json.loads(path.read_text())}
    judged = judge(load_claims(), load_run(REFERENCE).evidence)
    assert kept == {verdict.id: verdict.verdict for verdict in judged}


def test_the_verdicts_without_a_gpu_are_on_the_claims_of_the_file():
    entries = json.loads((REFERENCE.parent / "cpu" / "claims.json").read_text())
    kept = {entry["id"]: (entry["quote"], entry["expected"]) for entry in entries}
    listed = {claim.id: (claim.quote, str(claim.expected)) for claim in load_claims()}
    assert kept == listed, "judge a run of the profile cpu again"
    withdrawn = {entry["id"] for entry in entries if entry["verdict"] == "withdrawn"}
    assert withdrawn == {claim.id for claim in load_claims() if claim.withdrawn}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """Of the published rows, by the claim's id."""
    return {v.id: v for v in judge(load_claims(), load_run(REFERENCE).evidence)}


def test_a_missed_and_a_withdrawn_claim_are_shown_and_not_counted(verdicts):
    missed, gone = verdicts["ours-same-tokens"], verdicts["ours-waiting-mean-vs-sleep"]
    assert (missed.verdict, round(missed.measured, 3)) == ("not reproduced", 0.567)
    text = readme.claims()
    assert line_of(text, missed.quote)["verdict"] == "**not reproduced**"
    line = line_of(text, textwrap.shorten(gone.quote, 110, placeholder=" ..."))
    assert (line["verdict"], line["measured"], line["n"]) == ("**withdrawn**", "-", "-")
    assert f"Withdrawn, 1 of them: {gone.why}." in text and "1 withdrawn." in text
    counts = Counter(verdict.verdict for verdict in verdicts.values())
    assert f"{counts['reproduced']} reproduced" in text and sum(counts.values()) == len(verdicts)


def test_machines_are_called_alike_in_readme_manifests_and_machine_json():
    run = load_run(REFERENCE)
    listed = {entry["part"]: entry["cells"] for entry in run.listed_machines}
    for key, manifest in run.all_manifests.items():
        name = run.machine_names[run.machine_numbers[key]]
        assert f"ran in the part {name}" in manifest["notes"]
        assert key in run.replicate_manifests or key in listed[name]
    text = README.read_text()
    assert not re.findall(r"machines? \d", text)
    assert {*re.findall(r"h100-\d+", text)} <= listed.keys()
    for system in ("djinn", "vllm_sleep"):
        rows = run.cells("paper", "25").query(f"system == '{system}'")
        line = line_of(readme.results(), system_look(system).label)
        assert line["machine"] == run.machines_of(rows) and line["machine"] in listed


def test_the_first_lines_say_what_is_unfair(verdicts):
    head = "\n".join(README.read_text().splitlines()[:50])
    for said in ("No, not like for like", "Nothing is claimed against vLLM", "43% of the requests",
                 "a sleep mode without it was not measured", "could\nnot batch"):  # fmt: skip
        assert said in head
    for label, name in (("median", "p50"), ("mean", "mean"), ("P90", "p90")):
        assert f"{verdicts[f'ours-{name}-vs-sleep'].measured:.2f}x ({label})" in head
    assert f"{1 / verdicts['ours-maximum'].measured:.2f}x (max)" in head


# -- the tables of a run ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a GPU: every system, a sweep, a Zipfian trace, and three repeats of one cell."""
    folder = write_run(tmp_path_factory.mktemp("readme") / "h100", gpu=True)
    write_cell(folder, cell_rows("djinn", repeats=3), GPU_MACHINE)
    for system in ("djinn", "pytorch_lru"):
        write_cell(folder, cell_rows(system, trace="zipf"), GPU_MACHINE)
    return folder


def lines(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, its head first and without the rule below it."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row.strip("|").split(" | ")] for row in [rows[0], *rows[2:]]]


def line_of(markdown: str, first: str) -> dict[str, str]:
    head, *rows = lines(markdown)
    (found,) = [row for row in rows if row[0] == first]
    return dict(zip(head, found, strict=True))


def test_without_rows_every_table_says_so_and_claims_keep_what_is_expected(tmp_path):
    for name in OF_ROWS:
        text = readme.TABLES[name](tmp_path)
        assert "Not measured yet" in text, name
    text = readme.claims(tmp_path)
    assert len(lines(text)) == 1 + len(load_claims())
    said = [row[-1] for row in lines(text)[1:]]
    assert said.count("withdrawn") == sum(claim.withdrawn is not None for claim in load_claims())
    assert set(said) == {"not measured yet", "withdrawn"}


def test_the_number_of_claims_is_that_of_the_file(tmp_path, reference):
    said = f"`claims.yml` holds {len(load_claims())} claims"
    assert said in readme.claims(tmp_path) and said in readme.claims(reference)


def test_results_are_those_of_the_rows(reference):
    rows = cell_rows("djinn", repeats=3)
    line = line_of(readme.results(reference), "Djinn")
    assert line["served"] == "90 of 90 (3 repeats)"
    assert float(line["P50, ms"]) == pytest.approx(rows["total_ms"].median(), rel=0.01)
    assert float(line["max, ms"]) == pytest.approx(rows["total_ms"].max(), rel=0.01)
    assert float(line["GiB loaded"]) == pytest.approx(
        rows["loaded_bytes"].sum() / 3 / 2**30, rel=0.01
    )
    assert line_of(readme.results(reference), "vLLM re-created")["served"] == "22 of 30"
    link = rows["loaded_bytes"].mean() / GPU_MACHINE["link_rate_bytes_per_s"] * 1e3
    assert line["link share"] == f"{link / rows['switch_ms'].mean():.0%}"


def test_an_unfinished_run_says_how_far_it_got(reference, monkeypatch):
    profile = load_profile("gpu")
    said = readme.results(reference)
    n_there = len(profile.all_cells()) - len(missing_cells(profile, reference))
    assert said.startswith(f"Measured so far: {n_there} of {len(profile.all_cells())} cells")
    monkeypatch.setattr(readme, "missing_cells", lambda *_: [])
    assert readme.results(reference).startswith("| system |")


def test_the_zipfian_trace_has_its_own_table(reference):
    assert [row[0] for row in lines(readme.zipf(reference))[1:]] == ["Djinn", "PyTorch LRU"]


def in_gib(label: str) -> str:
    """A capacity as the table of the sweep writes it."""
    return f"{CAPACITIES[label] / 2**30:.4g} GiB"


def test_the_sweep_has_every_capacity_of_the_systems_swept(reference):
    head, *rows = lines(readme.sweep(reference))
    assert len(rows) == 3 * len(CAPACITIES)
    fast = [row[head.index("bytes / optimum")] for row in rows if row[1] == "Djinn"]
    assert len(fast) == 4 and all(1 <= float(ratio) <= 1.25 for ratio in fast)
    gain = head.index("speed-up of the P50 (95%)")
    assert {row[gain] for row in rows if row[1] == "PyTorch pinned"} == {"1"}
    own = cell_rows("pytorch_lru", gpu=True)  # at 25 GiB
    (lru,) = [row for row in rows if row[:2] == [in_gib("25"), "PyTorch LRU"]]
    before_ms = (own["total_ms"] - own["decode_ms"]).mean()
    assert float(lru[head.index("up to decoding, ms")]) == pytest.approx(before_ms, rel=0.01)
    assert "machine" not in head  # there is one


def test_the_sweep_tells_machines_apart(reference):
    again = on_another_machine(load_run(reference), "djinn")
    run = replace(again, replicates=no_rows(), replicate_manifests={})
    head, *rows = lines(sweep_table(run).markdown())
    numbers = {(row[0], row[1]): row[head.index("machine")] for row in rows}
    assert numbers[in_gib("25"), "Djinn"] != numbers[in_gib("25"), "PyTorch pinned"]
    assert numbers[in_gib("20"), "Djinn"] == numbers[in_gib("20"), "PyTorch pinned"]


def test_the_sweep_compares_on_one_machine_where_one_ran_all(reference):
    first = load_run(reference)
    slower = on_another_machine(first, "djinn", total_ms=lambda ms: 2 * ms)  # but run there before
    assert sweep_table(slower).markdown() == sweep_table(first).markdown()
    rows = slower.sweep()
    assert set(rows["run_id"]) == set(first.sweep()["run_id"])


def test_each_step_of_the_ablation_is_measured_against_the_one_before(reference):
    head, *rows = lines(readme.ablation(reference))
    assert [row[0].split("`")[1] for row in rows] == [
        "djinn_whole", "djinn_partial_no_overlap", "djinn_eager", "djinn_graph", "djinn_compiled",
        "djinn",
    ]  # fmt: skip
    means = [float(row[head.index("mean, ms")].replace(",", "")) for row in rows]
    saved = [row[-1] for row in rows]
    assert saved[0] == "-"
    assert int(saved[1].split()[0]) == pytest.approx(means[0] - means[1], abs=1.5)
    before = [float(row[head.index("up to decoding, ms")].replace(",", "")) for row in rows]
    whole = cell_rows("djinn_whole", gpu=True)
    assert before[0] == pytest.approx((whole["total_ms"] - whole["decode_ms"]).mean(), rel=0.01)


def test_a_step_that_failed_requests_says_so(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "h100")
    rows = cell_rows("djinn_eager", gpu=True)
    mean_ms = rows["total_ms"][1:].mean()
    rows.loc[0, ["ok", "error_kind", "error"]] = [False, "oom", "no memory"]
    rows.loc[0, ["queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms"]] = float("nan")
    write_cell(folder, rows, GPU_MACHINE)
    row = line_of(readme.ablation(folder), "+ loading behind the prefill (`djinn_eager`)")
    assert row["served"] == "29 of 30"
    assert float(row["mean, ms"].replace(",", "")) == pytest.approx(mean_ms, rel=0.01)
    assert "nan" not in readme.ablation(folder)


def test_a_step_from_another_machine_is_marked(reference, tmp_path):
    assert "†" not in readme.ablation(reference)
    assert "machine" not in [
        *lines(readme.ablation(reference))[0],
        *lines(readme.results(reference))[0],
    ]
    folder = shutil.copytree(reference, tmp_path / "h100")
    slower = {**GPU_MACHINE, "eager_operator_us": 9.0}
    write_cell(folder, cell_rows("djinn_eager", gpu=True), slower)
    text = readme.ablation(folder)
    head, *rows = lines(text)
    saved = head.index("mean saved, ms (95%)")
    assert [row[0].split("`")[1] for row in rows if "†" in row[saved]] == [
        "djinn_eager",
        "djinn_graph",
    ]
    assert "another machine" in text
    machines = {row[0]: row[-1] for row in lines(readme.results(folder))[1:]}
    assert len(set(machines.values())) == 2 and machines["Djinn"] == machines["PyTorch pinned"]
    assert machines["Djinn, eager decode"] not in ("0", machines["Djinn"])


def test_cells_that_were_measured_again_stand_beside_each_other(reference, tmp_path):
    assert readme.again(reference) == readme_benchmarks.NOT_YET
    folder = shutil.copytree(reference, tmp_path / "h100")
    rows = cell_rows("djinn", gpu=True).assign(run_id="before")
    rows["decode_ms"] = rows["decode_ms"].mask(rows["request"] == 3, rows["decode_ms"] / 5)
    manifest = read_manifest(folder / "requests" / "paper-25-djinn.manifest.json")
    slower = {**GPU_MACHINE, "eager_operator_us": 9.0}
    started = "2026-11-01T06:00:00+00:00"
    manifest |= {"run_id": "before", "machine": slower, "started_at_utc": started}
    write_replicate(rows, manifest, folder)
    head, first, second = lines(readme.again(folder))
    assert [row[head.index("machine")] for row in (first, second)] == ["1", "2"]
    assert first[0] == second[0] == "Djinn (`paper-25-djinn`)"
    spread = [float(row[head.index("decode, slowest / fastest")][:-1]) for row in (first, second)]
    assert spread[0] > 4 > 2 > spread[1] > 1
    assert "replicates" not in readme.results(folder)  # other tables are of the run's own cells


def test_steps_that_were_not_measured_count_with_the_next(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "h100")
    for system in ("djinn_graph", "djinn_compiled"):
        for path in (folder / "requests").glob(f"paper-25-{system}.*"):
            path.unlink()
    names = [row[0] for row in lines(readme.ablation(folder))[1:]]
    assert names[2:] == [
        "+ loading behind the prefill (`djinn_eager`)",
        "+ decoding from CUDA graphs + a compiled step + lookup tables in the host (`djinn`)",
    ]


def test_requests_that_wait_stand_beside_those_that_do_not(reference, tmp_path):
    assert "Not measured yet" in readme.waiting(reference)
    folder = shutil.copytree(reference, tmp_path / "h100")
    rows = cell_rows("djinn", repeats=2)
    start_s = rows.groupby("repeat")["total_ms"].cumsum().sub(rows["total_ms"]) / 1e3
    waiting = rows.assign(
        mode="concurrent", run_id="other", start_s=5.0 + start_s, queue_ms=7.0,
        total_ms=rows["total_ms"] + 7.0, ttft_ms=rows["ttft_ms"] + 7.0,
        switch_ms=rows["switch_ms"] / 100,
    )  # fmt: skip
    write_rows(
        rows_frame(waiting.to_dict("records")),
        folder / "requests" / "paper-25-djinn-concurrent.parquet",
    )
    manifest = read_manifest(folder / "requests" / "paper-25-djinn.manifest.json")
    write_manifest(
        {**manifest, "run_id": "other", "cell": "paper-25-djinn-concurrent"},
        folder / "requests" / "paper-25-djinn-concurrent.manifest.json",
    )
    alone = line_of(readme.waiting(folder), "Djinn, one after the other")
    line = line_of(readme.waiting(folder), "Djinn")
    later = later_touches(rows)["switch_ms"]
    assert float(alone["mean switch, ms"]) == pytest.approx(later.mean(), rel=0.01)
    assert float(line["longest switch, ms"]) == pytest.approx(later.max() / 100, rel=0.01)
    done_s = rows.groupby("repeat")["total_ms"].sum().mean() / 1e3
    assert float(line["all done after, s"]) == pytest.approx(done_s, rel=0.01)
    assert line["served"] == "60 of 60 (2 repeats)"
    assert "Left out" not in readme.waiting(folder)


def test_a_system_that_could_not_batch_is_left_out_of_those_that_wait(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "h100")
    for system in ("djinn", "vllm_sleep"):
        cell = f"paper-25-{system}"
        rows = cell_rows(system, gpu=True).assign(mode="concurrent", run_id=f"other-{system}")
        rows = rows_frame(rows.to_dict("records"))
        write_rows(rows, folder / "requests" / f"{cell}-concurrent.parquet")
        manifest = read_manifest(folder / "requests" / f"{cell}.manifest.json")
        manifest |= {"run_id": f"other-{system}", "cell": f"{cell}-concurrent"}
        write_manifest(manifest, folder / "requests" / f"{cell}-concurrent.manifest.json")
    text = readme.waiting(folder)
    assert [row[0] for row in lines(text)[1:]] == ["Djinn, one after the other", "Djinn"]
    assert "Left out: vLLM sleep (vLLM batches by default" in text


def test_models_larger_than_the_ring_have_the_share_of_their_ceiling(tmp_path):
    assert "Not measured yet" in readme.large(tmp_path)
    write_large_rows(tmp_path)
    head, *rows = lines(readme.large(tmp_path))
    assert [row[1] for row in rows] == ["resident", "djinn", "accelerate"]
    djinn = dict(zip(head, rows[1], strict=True))
    link_ms = (6 << 30) / 8e9 * 1e3
    assert float(djinn["these at the link's rate, ms"]) == pytest.approx(link_ms, rel=0.01)
    assert djinn["share of the ceiling"] == f"{link_ms / 900:.0%}"


def test_claims_have_their_verdicts(reference):
    text = readme.claims(reference)
    line = line_of(text, "Evictions copy nothing back to the host")
    assert (line["measured"], line["verdict"]) == ("0 bytes", "reproduced")
    assert line_of(text, "3 models totaling 31.3GB")["verdict"] == "**not reproduced**"
    assert "On Test GPU: " in text and "Not judged, 1 of them: no rows of system 'djinn'" in text
    assert "Withdrawn, 1 of them: the baseline could not batch" in text


def test_verdicts_of_a_run_without_a_gpu_stand_beside(reference):
    folder = reference.parent / "cpu"
    folder.mkdir()
    kept = [{"id": "ours-near-optimal", "measured": 1.08, "verdict": "reproduced"},
            {"id": "paper-p50-djinn", "measured": 5.0, "verdict": "not judged"},
            {"id": "ours-waiting-mean-vs-sleep", "measured": None,
             "verdict": "withdrawn"}]  # fmt: skip
    (folder / "claims.json").write_text(json.dumps(kept))
    head, *rows = lines(readme.claims(reference))
    assert head[-1] == "without a GPU"
    assert sorted({row[-1] for row in rows}) == ["-", "1.08 x, reproduced"]
    (folder / "claims.json").unlink()


def said_in(notebook: str) -> set[str]:
    """The texts that the cells of a published notebook put out."""
    cells = nbformat.read(REFERENCE / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    outputs = [o["data"] for cell in cells for o in cell.get("outputs", []) if "data" in o]
    return {text for data in outputs for text in (data.get("text/plain"), data.get("text/markdown"))
            if text}  # fmt: skip


def test_the_published_notebooks_say_what_follows_from_the_rows():
    run = load_run(REFERENCE)
    claims = said_in("05_claims")
    for tell in (fairness, explanations):
        assert tell(run, published()) in claims, (
            "python -m djinn_lib.publishing.publish was forgotten"
        )
    gains = speedup_table(run.sweep(), "pytorch_pinned").round(2)
    assert repr(gains) in said_in("03_sensitivity"), (
        "python -m djinn_lib.publishing.publish was forgotten"
    )
