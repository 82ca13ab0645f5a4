"""Parts of a run put together: what belongs together, which cell is taken, what is kept of each."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pytest
from command import djinn
from row_factory import SIZES, cell_rows
from run_factory import GPU_MACHINE, write_cell, write_large_rows

from djinn_lib.analysis.run import load_run
from djinn_lib.analysis.tables import machines_table
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment.large_results import read_large
from djinn_lib.experiment.locks import run_locks
from djinn_lib.experiment.manifest import read_manifest, read_statuses
from djinn_lib.files import write_json
from djinn_lib.publishing.merge import merge
from djinn_lib.rows import read_rows
from djinn_lib.trace import paper_trace, write_trace

FOLDERS = TemporaryDirectory(prefix="djinn-parts-")  # removed at the end of the process
FASTER = {**GPU_MACHINE, "link_rate_bytes_per_s": 10e9, "eager_operator_us": 2.5}


def part_of(folder: Path, systems: dict[str, int], machine: dict[str, Any] = GPU_MACHINE) -> Path:
    """A run folder with cells of these systems, each with so many failed requests."""
    for name in ("requests", "traces", "notebooks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    models = {name: {"folder": f"/home/me/models/{name}"} for name in SIZES}
    write_json(folder / "machine.json", {"machine": machine, "models": models})
    write_trace(paper_trace(tuple(SIZES)), folder / "traces" / "paper.jsonl")
    notebooks = ["00_setup", *(f"02_run_system.paper-25-{system}" for system in systems)]
    for name in notebooks:
        (folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"of": folder.name}))
    for system, n_failed in systems.items():
        shutil.copytree(measured(system, n_failed, machine is FASTER), folder, dirs_exist_ok=True)
    return folder


@cache
def measured(system: str, n_failed: int, faster: bool) -> Path:
    """A folder with the rows and the manifest of a cell; made once, as checking takes a while."""
    folder = Path(FOLDERS.name) / f"{system}-{n_failed}-{faster}"
    (folder / "requests").mkdir(parents=True)
    rows = cell_rows(system, gpu=True)
    rows.loc[: n_failed - 1, ["ok", "error_kind", "error"]] = [False, "oom", "no memory"]
    times = ["queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms"]
    rows.loc[: n_failed - 1, times] = float("nan")
    write_cell(folder, rows, FASTER if faster else GPU_MACHINE)
    return folder


def change_manifest(part: Path, system: str, **fields: Any) -> None:
    path = part / "requests" / f"paper-25-{system}.manifest.json"
    write_json(path, {**read_manifest(path), **fields})


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    one = part_of(tmp_path / "one", {"djinn": 0, "pytorch_lru": 0})
    two = part_of(tmp_path / "two", {"vllm_sleep": 0}, FASTER)
    change_manifest(two, "vllm_sleep", started_at_utc="2026-11-24T06:00:00+00:00")
    return [one, two]


def test_cells_of_two_machines_are_one_run(parts, tmp_path, capsys):
    merge(tmp_path / "run", parts)
    run = load_run(tmp_path / "run")
    assert set(run.manifests) == {"paper-25-djinn", "paper-25-pytorch_lru", "paper-25-vllm_sleep"}
    for part in parts:
        for path in (part / "requests").glob("*.parquet"):
            pd.testing.assert_frame_equal(
                read_rows(path), read_rows(tmp_path / "run" / "requests" / path.name)
            )
    assert run.manifests["paper-25-djinn"]["notes"] == ["ran in the part one"]
    tasks = {status.task: status.state for status in read_statuses(tmp_path / "run")}
    assert tasks["02_run_system.paper-25-djinn"] == "ok" and len(tasks) == 3
    notebooks = {path.name for path in (tmp_path / "run" / "notebooks").iterdir()}
    assert {"00_setup.ipynb", "00_setup.one.ipynb"} <= notebooks and len(notebooks) == 5
    assert json.loads((tmp_path / "run" / "notebooks" / "00_setup.ipynb").read_text()) == {
        "of": "two"  # the newest
    }


def test_a_part_may_have_nothing_but_models_larger_than_the_ring(parts, tmp_path):
    third = part_of(tmp_path / "three", {})
    write_large_rows(third)
    merge(tmp_path / "run", [*parts, third])
    assert len(read_large(tmp_path / "run")) == 3
    state = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert [m["part"] for m in state["machines"]] == ["one", "two"]
    with pytest.raises(RecordError, match="at least one cell among them"):
        merge(tmp_path / "run2", [third])


def test_machine_json_tells_of_every_machine(parts, tmp_path):
    merge(tmp_path / "run", parts)
    state = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert state["machine"]["link_rate_bytes_per_s"] == 10e9  # the better one: it is a ceiling
    assert state["machine"]["eager_operator_us"] == 2.5
    assert [(m["part"], len(m["cells"])) for m in state["machines"]] == [("one", 2), ("two", 1)]
    assert state["machines"][1]["machine"]["link_rate_bytes_per_s"] == 10e9
    table = machines_table(load_run(tmp_path / "run"))
    assert list(table["link_rate (GB/s)"]) == [8.0, 10.0] and list(table["cells"]) == [2, 1]


@pytest.mark.parametrize(
    ("failed", "taken"), [({"djinn": 0}, "later"), ({"djinn": 3}, "early")], ids=["whole", "broken"]
)
def test_of_a_cell_in_two_parts_the_later_whole_one_is_taken(tmp_path, capsys, failed, taken):
    early = part_of(tmp_path / "early", {"djinn": 0})
    later = part_of(tmp_path / "later", failed)
    change_manifest(later, "djinn", started_at_utc="2026-11-25T06:00:00+00:00")
    (cell,) = merge(tmp_path / "run", [early, later])
    assert cell.part == taken
    said = capsys.readouterr().out
    other = "early" if taken == "later" else "later (2026-11-25T06:00, 3 of 30 requests failed)"
    assert f"taken from {taken}" in said and f"also run: {other}" in said
    notes = read_manifest(tmp_path / "run" / "requests" / "paper-25-djinn.manifest.json")["notes"]
    run = load_run(tmp_path / "run")
    rows, manifests = run.replicates, run.replicate_manifests
    if taken == "early":  # one that failed requests is not kept, and that is said
        assert any(f"left out: {other}" in note for note in notes) and rows.empty
    else:
        assert len(rows) == 30 and not any("left out" in note for note in notes)
        (manifest,) = manifests.values()
        assert manifest["notes"] == ["ran in the part early"]
        (notebook,) = (tmp_path / "run" / "replicates").glob("*.ipynb")
        assert json.loads(notebook.read_text()) == {"of": "early"}


def test_replicates_go_on_into_the_next_merge_once(tmp_path, capsys):
    early = part_of(tmp_path / "early", {"djinn": 0})
    later = part_of(tmp_path / "later", {"djinn": 0}, FASTER)
    change_manifest(later, "djinn", started_at_utc="2026-11-25T06:00:00+00:00", run_id="later")
    merge(tmp_path / "half", [early, later])
    last = part_of(tmp_path / "last", {"djinn": 0}, FASTER)
    change_manifest(last, "djinn", started_at_utc="2026-11-26T06:00:00+00:00", run_id="last")
    (cell,) = merge(tmp_path / "run", [tmp_path / "half", early, last])
    assert cell.manifest["run_id"] == "last"
    run = load_run(tmp_path / "run")
    rows, manifests = run.replicates, run.replicate_manifests
    assert set(manifests) == {"later", "paper-25-djinn-test"} and len(rows) == 60
    assert run.machine_numbers == {"last": 2, "later": 2, "paper-25-djinn-test": 1}
    assert list(machines_table(run)["cells"]) == [1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"page_bytes": 1 << 20, "new_tokens": 7}}, "parameter new_tokens"),
        ({"trace_sha256": "f" * 64}, "sha256 of the trace paper"),
        ({"git_commit": "fedcba98"}, "commit: 0123456789abcdef in one .*fedcba98 in two"),
        (
            {"machine": {**GPU_MACHINE, "versions": {**GPU_MACHINE["versions"], "driver": "590"}}},
            "version of driver, set-up: 580.159.04 in one .*590 in two",
        ),
        (
            {"models": {name: {"bytes": size, "dtype": "float32", "sha256": "1" * 64}
                        for name, size in SIZES.items()}},
            "sha256 of the weights",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(parts, tmp_path, fields, message):
    if message.startswith("parameter"):
        change_manifest(parts[0], "djinn", parameters={"page_bytes": 1 << 20, "new_tokens": 50})
    change_manifest(parts[1], "vllm_sleep", **fields)
    with pytest.raises(RecordError, match=f"(?s)expected parts that belong together.*{message}"):
        merge(tmp_path / "run", parts)
    assert not (tmp_path / "run").exists()


def test_of_large_values_only_the_entries_that_differ_are_shown(parts, tmp_path):
    models = {name: {"config": {"hidden_size": 64, "note": "x" * 500}} for name in "abcdef"}
    other = {name: {"config": {"hidden_size": 128, "note": "y" * 500}} for name in "abcdef"}
    change_manifest(parts[0], "djinn", parameters={"models": models, "sizes": [1, 2]})
    change_manifest(parts[1], "vllm_sleep", parameters={"models": other, "sizes": [1, 2, 3]})
    with pytest.raises(RecordError, match="run the cells again that differ") as caught:
        merge(tmp_path / "run", parts)
    said = str(caught.value)
    assert "parameter models, a.config.hidden_size: 64 in one" in said and "128 in two" in said
    assert "parameter models: 9 more differ" in said
    assert "parameter sizes, [2]: absent in one" in said
    assert "{" not in said and max(map(len, said.splitlines())) < 300


def test_a_folder_that_cannot_be_made_is_refused(parts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"can be written to.*: choose another folder"):
        merge(tmp_path / "file" / "run", parts)


def test_a_profile_may_get_more_traces_and_capacities_between_parts(parts, tmp_path):
    profile = {"page_bytes": 1 << 20, "capacities": {"25": "3/4"}, "traces": {"paper": {}}}
    more = {
        **profile, "start": "warm",
        "capacities": {"25": "3/4", "40": "all"}, "traces": {"paper": {}, "load_1": {}},
    }  # fmt: skip
    change_manifest(parts[0], "djinn", parameters=profile)
    change_manifest(parts[1], "vllm_sleep", parameters=more)
    merge(tmp_path / "run", parts)
    change_manifest(parts[1], "vllm_sleep", parameters={**more, "capacities": {"25": "1/2"}})
    with pytest.raises(RecordError, match=r"capacity 25: 3/4 in one .*, 1/2 in two"):
        merge(tmp_path / "run2", parts)


def test_a_package_that_only_one_machine_has_is_no_difference(parts, tmp_path):
    versions = {**GPU_MACHINE["versions"], "vllm": "0.24.0"}
    change_manifest(parts[1], "vllm_sleep", machine={**GPU_MACHINE, "versions": versions})
    merge(tmp_path / "run", parts)
    change_manifest(
        parts[0], "djinn", machine={**GPU_MACHINE, "versions": {**versions, "vllm": "0.9"}}
    )
    with pytest.raises(
        RecordError, match=r"version of vllm, set-up: 0\.9 in one .*0\.24\.0 in two"
    ):
        merge(tmp_path / "run2", parts)


def test_other_commits_can_be_allowed_and_are_noted(parts, tmp_path):
    change_manifest(parts[1], "vllm_sleep", git_commit="fedcba9876543210")
    merge(tmp_path / "run", parts, allow_commits=True)
    manifests = load_run(tmp_path / "run").manifests
    assert (
        "ran at the commit fedcba987654, others did not"
        in (manifests["paper-25-vllm_sleep"]["notes"])
    )
    change_manifest(parts[1], "vllm_sleep", profile="smoke")
    with pytest.raises(RecordError, match="profile"):
        merge(tmp_path / "run2", parts, allow_commits=True)


def test_a_cell_that_ran_beside_another_gpu_gives_way(parts, tmp_path):
    three = part_of(tmp_path / "three", {"vllm_sleep": 0}, FASTER)
    later = "2026-11-25T06:00:00+00:00"
    change_manifest(
        three, "vllm_sleep", started_at_utc=later, run_id="later", busy_neighbours=["GPU-b"]
    )
    merge(tmp_path / "run", [*parts, three])
    run = load_run(tmp_path / "run")
    assert run.manifests["paper-25-vllm_sleep"]["started_at_utc"] < later
    assert set(run.replicate_manifests) == {"later"}


def test_a_cell_in_a_new_form_leaves_its_older_runs_out(parts, tmp_path):
    cell = "paper-25-vllm_sleep"
    three = part_of(tmp_path / "three", {"vllm_sleep": 0}, FASTER)
    change_manifest(
        three, "vllm_sleep", started_at_utc="2026-11-25T06:00:00+00:00", options={"level": 2}
    )
    with pytest.raises(RecordError, match=r"options of vllm_sleep.*\n.*--newest-of CELL"):
        merge(tmp_path / "run", [*parts, three])
    with pytest.raises(ConfigError, match=r"got 'paper-25-ray'.*paper-25-djinn, paper-25-pytorch"):
        merge(tmp_path / "run", [*parts, three], newest_of=["paper-25-ray"])
    assert djinn("merge", tmp_path / "run", *parts, three, "--newest-of", cell) == 1
    run = load_run(tmp_path / "run")
    assert run.manifests[cell]["options"] == {"level": 2}
    assert any("left out: two (2026-11-24T06:00)" in note for note in run.manifests[cell]["notes"])
    assert not (tmp_path / "run" / "replicates").exists()


def test_nothing_is_overwritten_unless_told(parts, tmp_path):
    merge(tmp_path / "run", parts[:1])
    with pytest.raises(ConfigError, match="replace it with --replace"):
        merge(tmp_path / "run", parts)
    merge(tmp_path / "run", parts, replace=True)
    assert len(load_run(tmp_path / "run").manifests) == 3
    with pytest.raises(ConfigError, match="name each part once"):
        merge(tmp_path / "run", [tmp_path / "run", *parts], replace=True)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "run"}


def test_a_folder_that_a_run_uses_is_not_replaced(parts, tmp_path):
    merge(tmp_path / "run", parts[:1])
    with run_locks(tmp_path / "run", "cpu"):
        before = contents(tmp_path / "run")
        with pytest.raises(ConfigError, match=r"the run folder .* is in use"):
            merge(tmp_path / "run", parts, replace=True)
        assert contents(tmp_path / "run") == before
    merge(tmp_path / "run", parts, replace=True)
    assert len(load_run(tmp_path / "run").manifests) == 3


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_folder_without_cells_is_no_part(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="run notebook 00_setup first"):
        merge(tmp_path / "run", [*parts, tmp_path / "empty"])
    bare = part_of(tmp_path / "bare", {})
    with pytest.raises(RecordError, match="at least one cell"):
        merge(tmp_path / "run", [*parts, bare])


def test_the_command_says_what_is_still_to_be_run(parts, tmp_path, capsys):
    assert djinn("merge", tmp_path / "run", *parts) == 1
    said = capsys.readouterr().out
    assert "3 cells of 2 parts" in said
    assert "cell:paper-25-djinn_graph" in said and "cell:paper-25-djinn " not in said
    assert djinn("merge", tmp_path / "run", parts[0]) == 2
    assert "--replace" in capsys.readouterr().err
