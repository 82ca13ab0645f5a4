"""Manifests: what they hold, and how an execution is noted in one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from row_factory import cell_rows
from run_factory import MACHINE, manifest_of

from djinn_lib.errors import RecordError
from djinn_lib.experiment.manifest import (
    Status,
    note_execution,
    read_execution,
    read_manifest,
    write_manifest,
)
from djinn_lib.paths import REFERENCE

NEWER = {
    "stolen_share": None,
    "host_loop_us": [],
    "execution": None,
    "gpu_uuid": None,
    "busy_neighbours": [],
    "batches": None,
    "peak_device_bytes": None,
    "serving_device_bytes": None,
    "decoding": None,
    "running_since": None,
}  # fmt: skip  (fields that older manifests lack)
MANIFEST = NEWER | manifest_of("paper-25-djinn", cell_rows("djinn").iloc[0], MACHINE)


def test_a_manifest_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "cell.manifest.json"
    write_manifest(MANIFEST, path)
    assert read_manifest(path) == json.loads(path.read_text()) == MANIFEST
    assert [file.name for file in path.parent.iterdir()] == ["cell.manifest.json"]


@pytest.mark.parametrize("field", ["run_id", "models", "notes"])
def test_every_field_of_a_manifest_must_be_there(tmp_path, field):
    path = tmp_path / "cell.manifest.json"
    less = {name: value for name, value in MANIFEST.items() if name != field}
    with pytest.raises(RecordError, match=rf"{path}: expected a manifest(?s:.*){field}"):
        write_manifest(less, path)
    assert not path.exists()
    path.write_text(json.dumps(less))
    with pytest.raises(RecordError, match=field):
        read_manifest(path)


def test_manifests_of_before_the_host_was_watched_can_be_read(tmp_path):
    path = tmp_path / "cell.manifest.json"
    older = {name: value for name, value in MANIFEST.items() if name not in NEWER}
    path.write_text(json.dumps(older))
    assert read_manifest(path) == older | NEWER


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("colour", "red"),
        ("notes", "one"),
        ("wall_s", math.nan),
        ("options", {"folder": Path("/")}),
        ("machine", {"link_rate_bytes_per_s": math.inf}),
    ],
    ids=str,
)
def test_a_manifest_takes_plain_data_of_the_right_types(tmp_path, field, value):
    with pytest.raises(RecordError, match=r"cell\.manifest\.json"):
        write_manifest({**MANIFEST, field: value}, tmp_path / "cell.manifest.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", "\x00"])
def test_a_broken_manifest_is_refused(tmp_path, content):
    path = tmp_path / "cell.manifest.json"
    with pytest.raises(RecordError, match="expected a manifest"):
        read_manifest(path)
    path.write_text(content)
    with pytest.raises(RecordError, match="expected a manifest"):
        read_manifest(path)


def test_an_execution_is_noted_beside_what_the_rows_are_from(tmp_path):
    path = tmp_path / "cell.manifest.json"
    write_manifest(MANIFEST, path)
    assert read_execution(path) is None
    status = Status("02_run_system.cell", "failed", 3.5, "oom", "no room", {"code": "abc"})
    note_execution(path, asdict(status))
    assert read_execution(path) == status
    assert read_manifest(path) == {**MANIFEST, "execution": asdict(status)}


def test_manifests_of_the_reference_run_can_be_read():
    paths = sorted((REFERENCE / "requests").glob("*.manifest.json"))
    assert len(paths) > 30
    assert {read_manifest(path)["profile"] for path in paths} == {"gpu"}
