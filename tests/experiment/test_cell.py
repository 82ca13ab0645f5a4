"""One cell: rows, manifest, journal, and everything that can go wrong in between."""

import json
import math

import pytest
from profile_factory import tiny_profile

from djinn_lib import provenance
from djinn_lib.experiment.bench import Bench, set_up
from djinn_lib.experiment.cells.cell import close_dead_cell, run_cell
from djinn_lib.experiment.cells.running import CellRecord
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.experiment.setup import machine
from djinn_lib.rows import read_rows
from djinn_lib.systems.pytorch import PyTorchPinned

SYSTEMS = {
    "djinn": {"system": "djinn"},
    "pytorch_pinned": {"system": "pytorch_pinned"},
    "vllm_sleep": {"system": "vllm_sleep"},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("cell")
    profile = tiny_profile(
        systems=SYSTEMS, repeats=2, capacities={"half": "3/4", "all": "64MiB", "small": "8KiB"}
    )
    bench = set_up(profile, root / "run", root / "models", progress=lambda step: None)
    bench.write_traces()
    return Bench.open(profile, root / "run")


def cell_of(bench, system, label="half"):
    return bench.profile.cell("zipf", label, system)


@pytest.fixture(scope="module")
def measured(bench):
    """Rows and manifest of a cell of either system, for tests that only look at them."""
    cells = {system: cell_of(bench, system) for system in ("djinn", "pytorch_pinned")}
    return {
        system: (run_cell(bench, cell), read_manifest(bench.run.cell(cell.id).manifest))
        for system, cell in cells.items()
    }


def test_rows_and_manifest(bench, measured):
    cell, (rows, manifest) = cell_of(bench, "djinn"), measured["djinn"]
    assert rows.equals(read_rows(bench.run.cell(cell.id).rows))
    assert rows["ok"].all()
    assert list(zip(rows["repeat"], rows["request"], strict=True)) == [
        (repeat, request) for repeat in range(2) for request in range(6)
    ]
    assert (rows["n_tokens"] == bench.profile.new_tokens).all()
    assert not bench.run.cell(cell.id).journal.exists()
    assert manifest["run_id"] == rows["run_id"][0]
    assert manifest["parameters"]["page_bytes"] == 4096
    facts = manifest["models"].values()
    assert all(0 < f["device_bytes"] < f["bytes"] for f in facts)  # tables stay in the host
    assert {m: f["bytes"] for m, f in manifest["models"].items()} == {
        name: files.n_bytes for name, files in bench.models.items()
    }
    assert manifest["setup_s"] > 0
    assert [len(of_repeat) for of_repeat in manifest["host_loop_us"]] == [6, 6]
    decoding = {"mode": "eager", "logits_distance": 0.0}
    assert manifest["decoding"] == dict.fromkeys(manifest["models"], decoding)
    assert measured["pytorch_pinned"][1]["decoding"] is None
    assert min(us for of_repeat in manifest["host_loop_us"] for us in of_repeat) > 1
    assert 0 <= manifest["stolen_share"] < 1


def test_each_model_warms_up_with_a_whole_request(bench, monkeypatch):
    real, calls = PyTorchPinned.serve, []

    def serve(self, model, prompt_ids, max_new_tokens):
        calls.append((model, len(prompt_ids), max_new_tokens))
        return real(self, model, prompt_ids, max_new_tokens)

    monkeypatch.setattr(PyTorchPinned, "serve", serve)
    rows = run_cell(bench, cell_of(bench, "pytorch_pinned"))
    sizes = bench.profile.prompt_tokens, bench.profile.new_tokens
    assert calls[: -len(rows)] == [(model, *sizes) for model in bench.models]


def test_requests_that_arrive_together_wait_for_each_other(bench, measured):
    system = "djinn"
    one_by_one = measured[system][0]
    cell = bench.profile.cell("zipf", "half", system, "concurrent")
    cell = cell.model_copy(update={"speed": math.inf})
    rows = run_cell(bench, cell)
    assert cell.id == f"zipf-half-{system}-concurrent"
    assert rows["ok"].all() and set(rows["mode"]) == {"concurrent"}
    assert len(rows) == len(one_by_one)
    assert rows.groupby("repeat").queue_ms.max().gt(rows.groupby("repeat").queue_ms.min()).all()
    last = rows.groupby("repeat").total_ms.max()
    assert (last >= rows.groupby("repeat").decode_ms.sum()).all()  # one after the other
    keys = ["repeat", "request"]
    tokens = rows.set_index(keys).token_sha.sort_index()
    assert tokens.equals(one_by_one.set_index(keys).token_sha.sort_index())
    manifest = read_manifest(bench.run.cell(cell.id).manifest)
    assert manifest["parameters"]["mode"] == "concurrent"
    assert manifest["host_loop_us"] == []  # a loop beside requests would hold them up


def test_a_request_that_fails_beside_others_fails_alone(bench, monkeypatch):
    real, calls = PyTorchPinned.serve, []

    def serve(self, *arguments):
        calls.append(arguments)
        if len(calls) == 7:  # after warming up three models
            raise MemoryError("no room")
        return real(self, *arguments)

    monkeypatch.setattr(PyTorchPinned, "serve", serve)
    cell = bench.profile.cell("zipf", "half", "pytorch_pinned", "concurrent")
    rows = run_cell(bench, cell.model_copy(update={"speed": math.inf}))
    assert (~rows["ok"]).sum() == 1
    assert rows[~rows["ok"]].error_kind.tolist() == ["oom"]


def test_every_repeat_starts_cold_and_costs_the_same_bytes(measured):
    rows = measured["djinn"][0]
    first, second = (rows[rows["repeat"] == repeat] for repeat in (0, 1))
    for column in ("loaded_bytes", "evicted_bytes", "resident_before_bytes", "token_sha"):
        assert first[column].tolist() == second[column].tolist(), column
    assert first["resident_before_bytes"].iloc[0] == 0


def test_a_warm_start_has_asked_for_every_model_once(bench):
    cell = bench.profile.cell("zipf", "all", "djinn", start="warm")
    rows = run_cell(bench, cell)
    assert cell.id == "zipf-all-djinn-warm" and set(rows["start"]) == {"warm"}
    assert (rows["loaded_bytes"] == 0).all()  # there is room for all
    assert len(rows) == 2 * 6  # what warmed up is no row
    cold = run_cell(bench, cell_of(bench, "djinn", "all"))
    assert set(cold["start"]) == {"cold"} and cold["loaded_bytes"].iloc[0] > 0
    assert rows["token_sha"].tolist() == cold["token_sha"].tolist()
    # With less room the last models are there, as after a request for each.
    tight = run_cell(bench, bench.profile.cell("zipf", "half", "djinn", start="warm"))
    held = tight[tight["request"] == 0]["resident_bytes"].map(json.loads)
    assert all(sum(models.values()) > 0 for models in held)


def test_a_cell_of_the_first_requests_serves_these_alone(bench, measured):
    whole, _ = measured["pytorch_pinned"]
    cell = cell_of(bench, "pytorch_pinned", "small").model_copy(update={"requests": 4})
    rows = run_cell(bench, cell)
    of_first = whole[whole["request"] < 4]
    assert rows["request"].tolist() == of_first["request"].tolist() == [0, 1, 2, 3] * 2
    assert rows["token_sha"].tolist() == of_first["token_sha"].tolist()
    assert read_manifest(bench.run.cell(cell.id).manifest)["parameters"]["requests"] == 4
    assert len(close_dead_cell(bench, cell, "other", "killed")) == len(rows)


def test_residency_after_each_request_is_kept(measured):
    rows, manifest = measured["djinn"]
    models = manifest["models"]
    for row in rows.itertuples():
        resident = json.loads(row.resident_bytes)
        assert resident[row.model] == models[row.model]["device_bytes"]
        assert sum(resident.values()) <= row.capacity_bytes


def test_systems_agree_on_tokens(measured):
    shas = [rows["token_sha"] for rows, _ in measured.values()]
    assert shas[0].tolist() == shas[1].tolist()
    assert shas[0].nunique() > 2


def test_a_system_that_cannot_run_here_says_so_in_every_row(bench):
    rows = run_cell(bench, cell_of(bench, "vllm_sleep"))
    assert (rows["error_kind"] == "unavailable").all()
    assert rows["error"].str.contains("CUDA").all()
    assert len(rows) == 12


def test_a_system_that_cannot_start_fails_every_request_with_the_cause(bench):
    rows = run_cell(bench, cell_of(bench, "djinn", "small"))
    assert len(rows) == 12
    assert set(rows["error_kind"]) == {"oom"}
    assert rows["error"].str.contains("raise the capacity").all()


def test_a_dirty_tree_and_other_gpu_processes_are_noted(bench, monkeypatch):
    monkeypatch.setattr(provenance, "git_state", lambda repo: ("abc", True))
    monkeypatch.setattr(machine, "other_gpu_processes", lambda: ["12 python 5"])
    seen = iter([[], ["GPU-b"]])  # it began to work while the cell ran
    monkeypatch.setattr(CellRecord, "_busy_neighbours", lambda _: next(seen))
    cell = cell_of(bench, "djinn")
    run_cell(bench, cell)
    manifest = read_manifest(bench.run.cell(cell.id).manifest)
    assert (manifest["git_commit"], manifest["git_dirty"]) == ("abc", True)
    assert any("working tree" in note for note in manifest["notes"])
    assert any("other processes" in note for note in manifest["notes"])
    assert manifest["busy_neighbours"] == ["GPU-b"]
    assert "another GPU of the host was in use" in manifest["notes"]
