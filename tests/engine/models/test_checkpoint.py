"""Names and formats of checkpoints; damage is tested through the public object."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tiny import CONFIGS, spec

from djinn_lib.engine.models import tensor_files
from djinn_lib.engine.models.checkpoint import weight_files
from djinn_lib.engine.models.hub import resolve_folder
from djinn_lib.engine.models.packing import bind
from djinn_lib.engine.models.sources import open_source
from djinn_lib.engine.models.tensor_files import read_tensors
from djinn_lib.errors import CheckpointError


def test_tensors_are_read_in_blocks_by_several_threads(tmp_path, monkeypatch):
    written = {
        "a": torch.randn(37, 113),
        "b": torch.randn(501).to(torch.bfloat16),
        "c": torch.empty(0, 4),
    }
    stored, offset = [], 7
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * offset)
        for tensor in written.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())
            stored.append((torch.full_like(tensor, -1.0), tmp_path / "file", offset))
            offset += tensor.nbytes
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 1000)
    read_tensors(stored)
    assert all(
        torch.equal(got, want) for (got, _, _), want in zip(stored, written.values(), strict=True)
    )


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"a\.safetensors \(4 bytes\) ends before"):
        read_tensors([(torch.zeros(2), path, 0)])


def test_weights_that_need_no_conversion_are_read_from_their_file(tmp_path, monkeypatch):
    """All of them, in whatever folder; and no file stays mapped."""
    folder = tmp_path / "with space (and) {braces}"
    model = spec("llama").build()
    model.save_pretrained(folder)
    read = []
    real = tensor_files.read_tensors
    monkeypatch.setattr(
        tensor_files,
        "read_tensors",
        lambda stored, advance: (read.extend(stored), real(stored, advance)),
    )
    opened = open_source(folder)
    views = {name: torch.empty_like(p) for name, p in opened.module.named_parameters()}
    opened.fill(views)
    bind(opened.module, views, torch.device("cpu"))
    assert len(read) == len(views) == len(list(model.parameters()))
    assert all(torch.equal(p, views[name]) for name, p in model.named_parameters())
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository: files by name in, the names that were fetched out."""
    remote, local, fetched = {}, tmp_path / "snapshot", []
    local.mkdir()

    def fetch(repo, revision=None, allow_patterns=(), ignore_patterns=()):
        assert (repo, revision) == ("someone/some-model", "abc123")
        for name in filter_repo_objects(
            remote, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (local / name).parent.mkdir(exist_ok=True)
            (local / name).write_text(remote[name])
            fetched.append(name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return remote, fetched


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
SHARDS = {"model.safetensors.index.json": INDEX, "model-1.safetensors": "",
          "model-2.safetensors": ""}  # fmt: skip
COPIES = {
    "original/consolidated.safetensors": "", "model.fp16.safetensors": "", "onnx/config.json": "{}",
    "optimizer.safetensors": "", "pytorch_model.bin": "", "adapter.py": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "files", "weights"),
    [
        ("{}", {"model.safetensors": ""}, {"model.safetensors"}),
        ("{}", SHARDS, {"model-1.safetensors", "model-2.safetensors"}),
        ("{}", {**SHARDS, "model.safetensors": ""}, {"model.safetensors"}),
        (
            '{"transformers_weights": "w.safetensors"}',
            {**SHARDS, "w.safetensors": ""},
            {"w.safetensors"},
        ),
    ],
)
def test_of_a_hub_id_only_what_counts_is_fetched(hub, config, files, weights):
    remote, fetched = hub
    remote.update({"config.json": config, "tokenizer.json": "", **COPIES, **files})
    folder = resolve_folder("someone/some-model", "abc123")
    assert {name for name in fetched if not name.endswith(".json")} == weights
    assert {path.name for path in weight_files(folder)} == weights
    assert {"config.json", "tokenizer.json"} <= set(fetched)


def test_code_of_a_hub_id_is_fetched_where_it_is_trusted(hub):
    remote, fetched = hub
    remote.update({"config.json": "{}", "modeling_own.py": "", "vocab.tiktoken": ""})
    resolve_folder("someone/some-model", "abc123")
    assert "modeling_own.py" not in fetched and "vocab.tiktoken" in fetched
    resolve_folder("someone/some-model", "abc123", trust_remote_code=True)
    assert "modeling_own.py" in fetched


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    offline = type("OfflineModeIsEnabled", (ConnectionError,), {})
    unnamed = type("ConnectError", (Exception,), {})
    causes = [None, ConnectionError("no route"), unnamed(), offline()]

    def fail(*_, **__):
        raise RuntimeError("no such model\nlong trace") from causes.pop(0)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"some-model.*no such model.*token") as caught:
        resolve_folder("someone/some-model")
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    for remedy in ("no network: pass a local", "no network: pass a local", "or unset HF_HUB_OFF"):
        with pytest.raises(CheckpointError, match=remedy):
            resolve_folder("someone/some-model")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_paths_are_not_taken_for_hub_ids(path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_folder(path)


def test_a_shard_that_is_not_there(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"do not exist: \['model-2.safetensors'\]"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no 'weight_map'"),
        ({"weight_map": {"w": "../../etc/model.safetensors"}}, "not a file next to it"),
    ],
)
def test_a_broken_index(tmp_path, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path)
