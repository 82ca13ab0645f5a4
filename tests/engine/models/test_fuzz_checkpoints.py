"""Damaged checkpoint folders: each is served, or refused in words within seconds, and none harms.

A process of its own gets them, so that a crash is an outcome and not the end of the tests.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_damage import damaged_file, header_of, with_header
from fuzz_worker import serve_folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONFIGS
from tokenizer_factory import save_tokenizer

from djinn_lib.engine.models.spec import ModelSpec

SECONDS = 30  # for one folder, on a machine that does other things as well
FORK = multiprocessing.get_context("fork")


class Worker:
    """A forked child that serves folders; another one when a folder has ended it."""

    def __init__(self) -> None:
        self._process: multiprocessing.Process | None = None

    def serve(self, folder: Path) -> dict[str, str]:
        """What came of a folder; see `fuzz_worker.outcome`."""
        if self._process is None:
            self._connection, theirs = FORK.Pipe()
            self._process = FORK.Process(target=serve_folders, args=(theirs,))
            self._process.start()
            theirs.close()
        self._connection.send(folder)
        is_late = not self._connection.poll(SECONDS)
        try:
            if not is_late:
                return self._connection.recv()
        except EOFError:
            pass
        self.close()
        return {"add": f"bare end of the process: {'late' if is_late else 'it crashed'}"}

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint with everything that can be damaged."""
    folder = tmp_path_factory.mktemp("whole")
    config = {**CONFIGS["llama"].to_dict(), "num_hidden_layers": 1}
    ModelSpec(config, "float32", seed=5).build().save_pretrained(folder, max_shard_size="200KB")
    save_tokenizer(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    return folder


@pytest.fixture(scope="module")
def worker(whole) -> Iterator[Worker]:
    worker = Worker()
    assert set(worker.serve(whole).values()) == {"ok"}
    yield worker
    worker.close()


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def ensure_in_words(said: dict[str, str]) -> None:
    """Whatever went wrong was said by a `DjinnError`."""
    assert not any(what.startswith("bare") for what in said.values()), said


# -- damage of every kind, once ----------------------------------------------------------------

DEEP = "[" * 200_000
FILES: dict[str, list[str]] = {
    "tokenizer.json": ["", "{", "[]", "{}", "null", "5", DEEP],
    "tokenizer_config.json": ["", "{", "[]", "null", "5", DEEP],
    "special_tokens_map.json": ["", "[1]", "5"],
    "chat_template.jinja": ["{% if %}", "{{ ''.__class__ }}", "{{ 'x' * 10**11 }}", "{{ 1 / 0 }}"],
    "config.json": ["", "{", "[]", "null", "5", DEEP],
    "generation_config.json": ["", "{", "[]", "null", DEEP],
    "model.safetensors.index.json": [
        "", "[]", '{"weight_map": 5}', '{"weight_map": {"x": 5}}', DEEP
    ],
}  # fmt: skip
FIELDS: dict[str, list[dict[str, Any]]] = {
    "tokenizer.json": [
        {"model": 5}, {"model": {}}, {"added_tokens": 5}, {"post_processor": {"type": "x"}},
        {"normalizer": 5}, {"decoder": {"type": "Replace"}},
    ],
    "tokenizer_config.json": [
        {"tokenizer_class": 5}, {"eos_token": 5}, {"added_tokens_decoder": {"x": {}}},
        {"auto_map": 5}, {"model_max_length": "x"}, {"chat_template": 5}, {"padding_side": "x"},
    ],
    "config.json": [
        *({name: value} for value in (0, 2**63) for name in (
            "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")),
        {"num_hidden_layers": -1}, {"max_position_embeddings": "x"}, {"rope_parameters": 5},
        {"rope_parameters": {"rope_type": "x", "rope_theta": 1.0}}, {"hidden_act": "x"},
        {"dtype": "x"}, {"dtype": 5}, {"_attn_implementation": "x"},
        {"attn_implementation": "flash_attention_2"}, {"model_type": "x"}, {"model_type": None},
        {"model_type": "t5"}, {"model_type": "llava"}, {"auto_map": 5}, {"text_config": 5},
        {"tie_word_embeddings": "x"}, {"eos_token_id": "x"}, {"quantization_config": 5},
    ],
    "generation_config.json": [
        {"eos_token_id": "x"}, {"eos_token_id": [2**70]}, {"max_length": "x"}, {"num_beams": -1},
        {"repetition_penalty": "x"}, {"temperature": "x"}, {"bad_words_ids": [[]]},
    ],
}  # fmt: skip


def each(cases: dict[str, list[Any]]) -> list[Any]:
    """A parameter for each case: the file, and what becomes of it."""
    return [
        pytest.param(name, case, id=f"{name} {case!r}"[:70])
        for name, of_file in cases.items()
        for case in of_file
    ]


@pytest.mark.parametrize(("name", "content"), each(FILES))
def test_another_content(worker, copy, name, content):
    (copy / name).write_text(content)
    ensure_in_words(worker.serve(copy))


@pytest.mark.parametrize(("name", "fields"), each(FIELDS))
def test_other_values(worker, copy, name, fields):
    file = copy / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    ensure_in_words(worker.serve(copy))


def header_cases() -> dict[str, Any]:
    """Changes to a safetensors header, and to the file around it, by name."""
    return {
        "no length": lambda header, data: b"\1\2",
        "a length of nothing": lambda header, data: with_header(header, data, 0),
        "a length beyond the file": lambda header, data: with_header(header, data, 1 << 20),
        "the longest length": lambda header, data: with_header(header, data, 2**64 - 1),
        "no JSON": lambda header, data: with_header(b"x" * 64, data),
        "no mapping": lambda header, data: with_header([1], data),
        "no data": lambda header, data: with_header(header, b""),
        "data cut short": lambda header, data: with_header(header, data[:-1]),
        "data beyond the tensors": lambda header, data: with_header(header, data + bytes(64)),
        "another type": lambda header, data: with_header(all_with(header, dtype="F64"), data),
        "an unknown type": lambda header, data: with_header(all_with(header, dtype="X9"), data),
        "a negative shape": lambda header, data: with_header(all_with(header, shape=[-1]), data),
        "a huge shape": lambda header, data: with_header(all_with(header, shape=[2**62] * 3), data),
        "no shape": lambda header, data: with_header(all_with(header, shape=[]), data),
        "all at one place": lambda header, data: with_header(
            all_with(header, data_offsets=[0, 4]), data
        ),
        "backwards": lambda header, data: with_header(all_with(header, data_offsets=[8, 0]), data),
        "far away": lambda header, data: with_header(
            all_with(header, data_offsets=[2**63, 2**63 + 4]), data
        ),
        "no tensors": lambda header, data: with_header({}, b""),
    }  # fmt: skip


def all_with(header: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A header in which every tensor has another value of a field."""
    return {
        name: entry if name == "__metadata__" else {**entry, **fields}
        for name, entry in header.items()
    }


@pytest.mark.parametrize("case", header_cases())
def test_another_header(worker, copy, case):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(header_cases()[case](*header_of(shard.read_bytes())))
    said = worker.serve(copy)
    ensure_in_words(said)
    assert said["add"] != "ok" or case == "data beyond the tensors"


@pytest.mark.slow
@pytest.mark.parametrize("n_layers", [5000, 2**31, 2**63])
def test_more_layers_than_there_are_tensors(worker, copy, n_layers):
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": n_layers}))
    ensure_in_words(worker.serve(copy))


# -- any damage ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "pattern",
    [
        "tokenizer*.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "*.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
    ],
)
@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage(worker, whole, tmp_path_factory, pattern, data):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "copy"))
    file = data.draw(st.sampled_from(sorted(folder.glob(pattern))))
    file.write_bytes(data.draw(damaged_file(file)))
    try:
        ensure_in_words(worker.serve(folder))
    finally:
        shutil.rmtree(folder.parent)
