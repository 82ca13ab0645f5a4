"""A run published as the reference: what is refused, what is copied, and that no path is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import djinn
from profile_factory import tiny_profile
from row_factory import CAPACITIES, cell_rows
from run_factory import FEW, GPU_MACHINE, SWEPT, write_large_rows, write_run

from djinn_lib import files
from djinn_lib.analysis.run import load_run
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment.large_results import read_large
from djinn_lib.experiment.manifest import Status, read_manifest
from djinn_lib.files import write_json
from djinn_lib.paths import REFERENCE
from djinn_lib.publishing import publish as publish_module
from djinn_lib.publishing.publish import publish, publish_rows, scrub_text
from djinn_lib.rows import read_rows, rows_frame, write_rows

HOME = "/home/me/djinn"


@pytest.fixture(autouse=True)
def profile(monkeypatch) -> None:
    """The profile whose run the factory writes."""
    made = tiny_profile(
        traces={"paper": {"kind": "paper"}},
        capacities={label: f"{size}B" for label, size in CAPACITIES.items()},
        systems={name: {"system": "djinn"} for name in FEW},
        cells=[
            {"traces": ["paper"], "capacities": ["25"], "systems": [*FEW]},
            {"traces": ["paper"], "capacities": ["40"], "systems": [*SWEPT]},
        ],
    )
    monkeypatch.setattr(publish_module, "load_profile", lambda name: made)


@pytest.fixture
def reading(monkeypatch) -> None:
    """Stands for the notebooks that read rows."""

    def read_again(run_dir: Path, reference_dir: Path) -> list[Status]:
        assert (reference_dir / "engine.json").exists()
        load_run(run_dir)
        (run_dir / "figures").mkdir()
        for name in ("latency_cdf.png", "latency_cdf.pdf"):
            (run_dir / "figures" / name).write_bytes(b"picture")
        notebook = {"metadata": {"papermill": {"parameters": {"run_dir": str(run_dir)}}},
                    "cells": [{"source": [f"run_dir = '{run_dir}'\n"]}]}  # fmt: skip
        (run_dir / "notebooks" / "05_claims.ipynb").write_text(json.dumps(notebook))
        write_json(run_dir / "claims.json", [])
        write_json(run_dir / "comparison_summary.json", {})
        return [Status("05_claims", "ok", 1.0)]

    monkeypatch.setattr(publish_module, "read_again", read_again)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, with paths of the machine that ran it in every place that may hold one."""
    folder = write_run(tmp_path / "run", gpu=True, few=True)
    models = {"llama": {"folder": f"{HOME}/data/models/llama", "n_bytes": 5}}
    write_json(folder / "machine.json", {"machine": GPU_MACHINE, "models": models})
    notebook = {
        "metadata": {"papermill": {
            "parameters": {"run_dir": f"{HOME}/data/runs/gpu"},
            "input_path": f"{HOME}/notebooks/02_run_system.ipynb",
        }},
        "cells": [{"source": [f'run_dir = "{HOME}/data/runs/gpu"\n'], "outputs": [
            {"text": [f"{HOME}/djinn_lib/experiment/cells/cell.py:3: UserWarning\n"],
             "data": {"image/png": "iVBOR/home/me/w0KGgo/AAAA"}}]}],
    }  # fmt: skip
    for name in ("00_setup", "01_trace", "02_run_system.paper-25-djinn"):
        (folder / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook))
    (folder / "notebooks" / "02_run_system.x.partial.ipynb").write_text("cut")
    rows = cell_rows("vllm_recreate")
    rows.loc[~rows["ok"], "error"] = "could not start: /opt/venv/lib/python3.12/vllm/x.py died"
    path = folder / "requests" / "paper-25-vllm_recreate.parquet"
    write_rows(rows_frame(rows.to_dict("records")), path)
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "reference" / "h100"
    folder.mkdir(parents=True)
    shutil.copy(REFERENCE / "engine.json", folder)
    return folder


def change(run_dir: Path, **fields) -> None:
    path = run_dir / "requests" / "paper-25-djinn.manifest.json"
    write_json(path, {**read_manifest(path), **fields})


def test_rows_of_another_profile_are_kept_beside(run_dir, reference):
    folder = publish_rows(run_dir, "h100-bf16", parent=reference.parent)
    assert folder == reference.parent / "h100-bf16"
    assert load_run(folder).rows["total_ms"].equals(load_run(run_dir).rows["total_ms"])
    assert {path.name for path in folder.iterdir()} == {
        "requests", "traces", "notebooks", "machine.json",
    }  # fmt: skip
    text = (folder / "notebooks" / "02_run_system.paper-25-djinn.ipynb").read_text()
    assert json.loads(text)["cells"][0]["source"] == ['run_dir = "../data/reference/h100-bf16"\n']
    assert not [path for path in folder.rglob("*.json") if "/home/" in path.read_text()]
    with pytest.raises(ConfigError, match="--replace"):
        publish_rows(run_dir, "h100-bf16", parent=reference.parent)
    publish_rows(run_dir, "h100-bf16", replace=True, parent=reference.parent)
    assert {path.name for path in reference.parent.iterdir()} == {"h100", "h100-bf16"}
    assert [path.name for path in reference.iterdir()] == ["engine.json"]


@pytest.mark.parametrize("name", ["h100", "study", "", "../x", "a/b", ".hidden"])
def test_rows_never_take_the_place_of_something_else(run_dir, reference, name):
    (reference.parent / "study").mkdir()
    (reference.parent / "study" / "points.parquet").touch()
    with pytest.raises(ConfigError, match=r"expected a name .* such as h100-bf16"):
        publish_rows(run_dir, name, replace=True, parent=reference.parent)
    assert (reference.parent / "study" / "points.parquet").exists()
    with pytest.raises(RecordError, match="1 cells missing"):
        (run_dir / "requests" / "paper-40-djinn.parquet").unlink()
        publish_rows(run_dir, "h100-bf16", parent=reference.parent)


def test_a_finished_run_is_copied_and_nothing_else_is_lost(run_dir, reference, tmp_path, reading):
    publish(run_dir, reference=reference, figures=tmp_path / "figures")
    run = load_run(reference)
    assert run.rows["total_ms"].equals(load_run(run_dir).rows["total_ms"])
    assert {path.name for path in reference.iterdir()} == {
        "engine.json", "requests", "traces", "notebooks", "figures", "machine.json",
        "claims.json", "comparison_summary.json",
    }  # fmt: skip
    assert {path.name for path in (reference / "notebooks").iterdir()} == {
        "00_setup.ipynb", "01_trace.ipynb", "02_run_system.paper-25-djinn.ipynb",
        "05_claims.ipynb",
    }  # fmt: skip
    assert (tmp_path / "figures" / "latency_cdf.pdf").read_bytes() == b"picture"
    assert [path.name for path in reference.parent.iterdir()] == ["h100"]


def test_rows_of_models_larger_than_the_ring_go_with_it(run_dir, reference, tmp_path, reading):
    rows = write_large_rows(run_dir)
    publish(run_dir, reference=reference, figures=tmp_path / "figures")
    assert read_large(reference).equals(read_large(run_dir)) and len(rows) == 3
    assert (reference / "large_models.manifest.json").exists()


def test_no_path_of_the_machine_is_published(run_dir, reference, tmp_path, reading):
    requests, again = run_dir / "requests", run_dir / "replicates" / "again"
    again.parent.mkdir()
    shutil.copy(requests / "paper-25-vllm_recreate.parquet", again.with_suffix(".parquet"))
    manifest = read_manifest(requests / "paper-25-vllm_recreate.manifest.json")
    write_json(again.with_suffix(".manifest.json"), {**manifest, "run_id": "again"})
    notebook = run_dir / "notebooks" / "02_run_system.paper-25-djinn.ipynb"
    shutil.copy(notebook, again.with_suffix(".ipynb"))
    publish(run_dir, reference=reference, figures=tmp_path / "figures")
    for path in reference.rglob("*.json"):
        if path.name != "engine.json":
            assert "/home/" not in path.read_text() and str(tmp_path) not in path.read_text()
    state = json.loads((reference / "machine.json").read_text())
    assert state["models"]["llama"] == {"folder": "data/models/llama", "n_bytes": 5}
    errors = read_rows(reference / "requests" / "paper-25-vllm_recreate.parquet")["error"]
    assert set(errors) == {"", "could not start: x.py died"}
    text = (reference / "notebooks" / "02_run_system.paper-25-djinn.ipynb").read_text()
    cell = json.loads(text)["cells"][0]
    assert cell["source"] == ['run_dir = "../data/reference/h100"\n']
    assert cell["outputs"][0]["text"] == ["./djinn_lib/experiment/cells/cell.py:3: UserWarning\n"]
    assert cell["outputs"][0]["data"]["image/png"] == "iVBOR/home/me/w0KGgo/AAAA"
    claims = (reference / "notebooks" / "05_claims.ipynb").read_text()
    assert "run_dir = '../data/reference/h100'" in claims and ".publish-" not in claims


def test_what_is_published_stays_unless_told(run_dir, reference, tmp_path, reading):
    publish(run_dir, reference=reference, figures=tmp_path / "figures")
    with pytest.raises(ConfigError, match=r"got requests, traces, .*--replace"):
        publish(run_dir, reference=reference, figures=tmp_path / "figures")
    (reference / "requests" / "old.parquet").touch()
    publish(run_dir, replace=True, reference=reference, figures=tmp_path / "figures")
    assert not (reference / "requests" / "old.parquet").exists()
    assert (reference / "engine.json").exists()


def test_an_unfinished_run_is_refused_and_all_that_is_missing_named(run_dir, reference, tmp_path):
    (run_dir / "requests" / "paper-40-djinn.parquet").unlink()
    (run_dir / "requests" / "paper-20-djinn.journal.jsonl").touch()
    manifest = read_manifest(run_dir / "requests" / "paper-25-djinn.manifest.json")
    change(run_dir, git_dirty=True, parameters={**manifest["parameters"], "repeats": 0})
    with pytest.raises(RecordError) as refused:
        publish(run_dir, reference=reference, figures=tmp_path / "figures")
    said = str(refused.value)
    assert "1 cells missing: cell:paper-40-djinn" in said
    assert "0 repeats of paper-25-djinn, the profile asks for 1" in said
    assert "not ended: paper-20-djinn.journal.jsonl" in said and "changed working tree" in said
    assert [path.name for path in reference.iterdir()] == ["engine.json"]


def test_a_cpu_run_is_refused(tmp_path, reference):
    folder = write_run(tmp_path / "cpu", few=True)
    with pytest.raises(RecordError, match="a run on the device 'cpu'"):
        publish(folder, reference=reference, figures=tmp_path / "figures")


def test_a_notebook_that_fails_or_is_huge_publishes_nothing(
    run_dir, reference, tmp_path, reading, monkeypatch
):
    monkeypatch.setattr(publish_module, "NOTEBOOK_BYTES", 10)
    with pytest.raises(RecordError, match="which code hosts render"):
        publish(run_dir, reference=reference, figures=tmp_path / "figures")
    broken = Status("04_figures", "failed", 1.0, "other", "boom")
    monkeypatch.setattr(publish_module, "read_again", lambda *_: [broken])
    with pytest.raises(RecordError, match="04_figures: boom"):
        publish(run_dir, reference=reference, figures=tmp_path / "figures")
    assert [path.name for path in reference.iterdir()] == ["engine.json"]


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def texts(monkeypatch) -> Iterator[str]:
    """What the next publications write into every file, in place of a run's rows and figures."""
    versions = iter(("old", "new", "newer"))

    def copy(_, made: Path) -> None:
        for name in ("requests", "notebooks", "figures"):
            (made / name).mkdir()
        text = next(versions)
        for name in ("requests/a.parquet", "figures/a.png", "claims.json"):
            (made / name).write_text(f'"{text}"')
        write_json(made / "comparison_summary.json", text)

    monkeypatch.setattr(publish_module, "load_run", lambda folder: None)
    monkeypatch.setattr(publish_module, "_problems", lambda *_: [])
    monkeypatch.setattr(publish_module, "_copy", copy)
    monkeypatch.setattr(publish_module, "_read", lambda *_: None)
    return versions


@pytest.mark.parametrize("step", range(4))
def test_what_is_published_is_the_old_or_the_new_wherever_it_ends(
    reference, tmp_path, texts, monkeypatch, step
):
    """An error at each step: both folders put aside, both put in place."""
    figures, real, calls = tmp_path / "figures", os.rename, []
    publish(tmp_path, reference=reference, figures=figures)
    (figures / "drawn_by_hand.svg").write_text("stays")
    before = contents(reference), contents(figures)

    def rename(source, target):
        calls.extend({Path(source), Path(target)} & {reference, figures})
        if len(calls) == step + 1:
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(OSError, match="Permission denied"):
        publish(tmp_path, replace=True, reference=reference, figures=figures)
    assert (contents(reference), contents(figures)) == before
    assert [path.name for path in reference.parent.iterdir()] == ["h100"]
    publish(tmp_path, replace=True, reference=reference, figures=figures)
    assert (reference / "requests" / "a.parquet").read_text() == '"newer"'
    assert (figures / "a.png").read_text() == '"newer"'
    assert (figures / "drawn_by_hand.svg").exists() and (reference / "engine.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"figures", "reference"}


def test_the_command_says_why_it_refuses(tmp_path, capsys):
    assert djinn("publish", tmp_path / "none") == 2  # the run is looked at first
    assert "error: there is no folder" in capsys.readouterr().err
    assert djinn("publish", tmp_path) == 2
    assert "error: expected rows in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at /root/x/y.py line 3", "at y.py line 3"),
        ("/run/me/djinn/figures", "out/figures"),
        ("/run/me/djinn2/figures", "figures"),
        ("https://a.org/b/c/d", "https://a.org/b/c/d"),
        ("open('/data/{project}/[x]/y.py')", "open('y.py')"),
        ("f'{folder}/{name}/{n}.py', rows[0]/a/b, {x}/c/d", None),
        ("54 GB/s, host/device, </td></tr>, data/runs/cpu, 3 / 4", None),
    ],
)
def test_paths_in_texts(text, left):
    assert scrub_text(text, {"/run/me/djinn": "out"}) == (left or text)
