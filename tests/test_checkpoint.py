"""Names and formats of checkpoints; damage is tested through the public object."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, PROMPT, spec

import djinn_lib as dj
from djinn_lib import checkpoint
from djinn_lib.checkpoint import read_tensors, resolve_folder, weight_files
from djinn_lib.errors import CheckpointError


def rename(folder, change):
    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def tokens_of(folder):
    with dj.Djinn("2MiB", page="16KiB") as djinn:
        djinn.add("m", folder)
        return djinn.generate("m", PROMPT, 6, ignore_eos=True).token_ids


def test_tensors_are_read_in_blocks_by_several_threads(tmp_path, monkeypatch):
    stored = {
        "matrix": torch.randn(37, 113),
        "half": torch.randn(501).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "not asked for": torch.randn(9),
    }
    save_file(stored, tmp_path / "a.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 1000)
    views = {k: torch.full_like(t, -1.0) for k, t in stored.items() if k != "not asked for"}
    read_tensors(tmp_path / "a.safetensors", list(views.items()))
    assert all(torch.equal(view, stored[key]) for key, view in views.items())


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"a\.safetensors \(\d+ bytes\), which ends before"):
        read_tensors(path, [("w", torch.zeros(5000))])


def test_weights_of_another_type_are_converted(tmp_path, monkeypatch):
    spec("llama").build().save_pretrained(tmp_path)
    expected = tokens_of(tmp_path)
    path = tmp_path / "model.safetensors"
    wide = {name: tensor.double() for name, tensor in load_file(path).items()}
    save_file(wide, path, metadata={"format": "pt"})
    monkeypatch.setattr(checkpoint, "_read_converted", None)
    assert tokens_of(tmp_path) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_names_without_the_base_models_prefix(tmp_path, name, monkeypatch):
    model = spec(name).build()
    model.save_pretrained(tmp_path)
    expected = tokens_of(tmp_path)
    prefix = f"{model.base_model_prefix}."
    rename(tmp_path, lambda key: key.removeprefix(prefix))
    monkeypatch.setattr(checkpoint, "_read_converted", None)  # the straight way must do
    assert tokens_of(tmp_path) == expected


def test_another_naming_goes_through_transformers_own_conversion(tmp_path, monkeypatch):
    spec("llama").build().save_pretrained(tmp_path)
    expected, used = tokens_of(tmp_path), []
    real = checkpoint._read_converted
    monkeypatch.setattr(checkpoint, "_match", lambda *_: None)
    monkeypatch.setattr(
        checkpoint, "_read_converted", lambda *a, **k: (used.append(1), real(*a, **k))
    )
    assert tokens_of(tmp_path) == expected
    assert used


def test_persistent_buffers_are_read_too(tmp_path, monkeypatch):
    """A buffer of the checkpoint reaches the model, although it lives outside the ring."""
    from transformers.models.llama.modeling_llama import LlamaModel

    init = LlamaModel.__init__

    def with_buffer(self, config):
        init(self, config)
        self.register_buffer("scale", torch.ones(3))

    monkeypatch.setattr(LlamaModel, "__init__", with_buffer)
    model = spec("llama").build()
    model.model.scale.fill_(4.0)
    model.save_pretrained(tmp_path)
    with dj.Djinn("2MiB", page="16KiB") as djinn:
        djinn.add("m", tmp_path)
        with djinn.lease("m") as bound:
            assert bound.model.scale.tolist() == [4.0, 4.0, 4.0]


def test_a_hub_id_is_fetched_by_revision(tmp_path, monkeypatch):
    asked = {}

    def fetch(repo, revision=None, allow_patterns=None):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_folder("someone/some-model", "abc123") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("someone/some-model", "abc123")
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["patterns"])


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"someone/some-model.*no route.*access token"):
        resolve_folder("someone/some-model")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_paths_are_not_taken_for_hub_ids(path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_folder(path)


def test_no_weights_at_all(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="got none"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "JSON index"), ("{}", "weight_map"), (None, "beside")],
)
def test_a_broken_index(tmp_path, content, message):
    outside = json.dumps({"weight_map": {"w": "../../etc/model.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(content or outside)
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path)


def test_an_unreadable_config(tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    with dj.Djinn("1MiB", page="16KiB") as djinn, pytest.raises(CheckpointError, match="config"):
        djinn.add("m", tmp_path)
