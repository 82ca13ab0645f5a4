"""Profiles: the ones we ship are sound, and what cannot be used is refused by name."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import ModelSpec, check_dtype, skeleton
from djinn_lib.errors import ConfigError, TraceError
from djinn_lib.experiment.profile import REPO, Profile, checked, load_profile
from djinn_lib.trace import paper_trace
from djinn_lib.units import parse_capacity

SMOLLM2_PARAMETERS = 134_515_008  # test_weights checks it against the real weights
PAPER_BYTES = {
    "llama-7b": 13_476_831_232,
    "mistral-7b": 14_483_464_192,
    "phi-2": 5_559_367_680,
}
GOOD: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "page": "64KiB",
    "prompt_tokens": 4,
    "new_tokens": 2,
    "repeats": 2,
    "models": {
        name: {"stands_for": "llama-7b", "config": {"model_type": "llama"}} for name in "abc"
    },
    "capacities": {"25": "25/31.3", "all": "1GiB"},
    "traces": {
        "paper": {"kind": "paper"},
        "zipf": {"kind": "zipf", "n": 5, "alpha": 1.0, "seed": 1, "rate_per_s": 2.0},
    },
    "systems": {
        "djinn": {"system": "djinn"},
        "djinn_whole": {"system": "djinn", "options": {"eviction": "models"}},
    },
    "cells": [
        {"traces": ["paper"], "capacities": ["25"], "systems": ["djinn", "djinn_whole"]},
        {"traces": ["paper", "zipf"], "capacities": ["25", "all"], "systems": ["djinn"],
         "repeats": 5},
    ],
}  # fmt: skip


def write(folder: Path, content: Any, name: str = "mine") -> Path:
    (folder / f"{name}.yml").write_text(yaml.safe_dump(content))
    return folder


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with the field at "a/b/0" set to a value; None takes the field away."""
    content = copy.deepcopy(GOOD)
    *parents, last = [int(key) if key.isdigit() and key != "25" else key for key in path.split("/")]
    holder: Any = content
    for key in parents:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return content


# -- the profiles of this repository ---------------------------------------------------------


@pytest.fixture(scope="module")
def cpu() -> Profile:
    return load_profile("cpu")


@cache
def sizes_of(name: str) -> dict[str, int]:
    """Bytes of each model of a profile, worked out from its configuration."""
    profile, sizes = load_profile(name), {}
    for model, entry in profile.models.items():
        if entry.config is None:
            sizes[model] = SMOLLM2_PARAMETERS * check_dtype(profile.dtype).itemsize
        else:
            config = ModelSpec(entry.config).resolve_config()
            layout, _ = pack(skeleton(config, check_dtype(profile.dtype)))
            sizes[model] = layout.n_bytes
    return sizes


def test_the_cells_of_the_cpu_profile(cpu):
    cells = cpu.all_cells()
    ids = [cell.id for cell in cells]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in ids)
    for cell, name in zip(cells, ids, strict=True):  # a name can be taken apart again
        more = [x for x in (cell.mode, cell.start) if x in ("concurrent", "warm")]
        assert name.split("-") == [cell.trace, cell.capacity_label, cell.system, *more]
    assert {cell.system for cell in cells} == set(cpu.systems)
    swept = {cell.capacity_label for cell in cells if cell.system == "djinn"}
    assert swept == {"20", "25", "32", "40"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPO / "params").glob("*.yml")))
def test_every_profile_loads_and_makes_its_traces(name):
    profile = load_profile(name)
    assert profile.name == name and profile.all_cells()
    assert all(trace.models for trace in map(profile.make_trace, profile.traces))


def test_small_models_are_to_each_other_as_the_paper_s(cpu):
    sizes = sizes_of("cpu")
    for model, entry in cpu.models.items():
        share = PAPER_BYTES[entry.stands_for] / sum(PAPER_BYTES.values())
        assert sizes[model] / sum(sizes.values()) == pytest.approx(share, abs=0.03)
    assert [entry.stands_for for entry in cpu.models.values()] == list(PAPER_BYTES)


@pytest.mark.slow
def test_the_models_of_the_gpu_profile_are_as_large_as_the_real_ones():
    assert sizes_of("gpu") == PAPER_BYTES


@pytest.mark.parametrize("name", ["cpu", pytest.param("gpu", marks=pytest.mark.slow), "smoke"])
def test_capacities_force_what_they_force_in_the_paper(name):
    sizes, total = sorted(sizes_of(name).values()), sum(sizes_of(name).values())
    capacities = load_profile(name).capacities
    capacity = {label: parse_capacity(text, total) for label, text in capacities.items()}
    assert sizes[-1] + sizes[-2] > capacity["25"] > sizes[-1] + sizes[0]
    assert capacity["25"] / total == pytest.approx(25 / 31.3, rel=0.003)  # 31.22 GiB on a GPU
    assert capacity["20"] > sizes[-1] and capacity["40"] > total


# -- cells and traces ------------------------------------------------------------------------


def test_cells_are_every_combination_once(tmp_path):
    profile = load_profile("mine", write(tmp_path, GOOD))
    assert [(cell.id, cell.repeats) for cell in profile.all_cells()] == [
        ("paper-25-djinn", 2),  # as first listed
        ("paper-25-djinn_whole", 2),
        ("paper-all-djinn", 5),
        ("zipf-25-djinn", 5),
        ("zipf-all-djinn", 5),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("papr", "25", "djinn"), r"a trace out of \['paper', 'zipf'\], got 'papr'"),
        (("paper", "25", "jinn"), r"a system out of \['djinn', 'djinn_whole'\], got 'jinn'"),
    ],
)
def test_an_unknown_cell_is_refused(tmp_path, names, message):
    profile = load_profile("mine", write(tmp_path, GOOD))
    with pytest.raises(ConfigError, match=rf"profile 'mine': expected {message}"):
        profile.cell(*names)


def test_traces_are_made_over_the_profile_s_models(tmp_path):
    profile = load_profile("mine", write(tmp_path, GOOD))
    assert profile.make_trace("paper") == paper_trace(("a", "b", "c"))
    zipf = profile.make_trace("zipf")
    assert len(zipf) == 5 and zipf.params["rate_per_s"] == 2.0
    (tmp_path / "some.yml").write_text(yaml.safe_dump(changed("traces/zipf/models", ["c"])))
    some = load_profile("some", tmp_path).make_trace("zipf")
    assert {request.model for request in some.requests} == {"c"}
    (tmp_path / "two.yml").write_text(yaml.safe_dump(changed("models/c", None)))
    with pytest.raises(TraceError, match="three different models"):
        load_profile("two", tmp_path).make_trace("paper")


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "colour is an unknown field: choose from name, device, dtype, "),
        ("repeat", 3, r"repeat is an unknown field: did you mean 'repeats'\?"),
        ("cells/0/sped", 3, r"cells\[0\]\.sped is an unknown field: did you mean 'speed'\?"),
        ("traces/zipf/rate", 3, r"traces\.zipf\.rate is an unknown field: .*'rate_per_s'"),
        ("models/a/had_id", "a/b", r"models\.a\.had_id is .*'hub_id'"),
        ("device", "tpu", "device: expected 'cpu' or 'cuda', got 'tpu'"),
        ("dtype", "float31", r"'float16' or 'bfloat16', got 'float31': did you mean 'float32'\?"),
        ("cells/0/mode", "serial", r"cells\[0\]\.mode: expected 'sequential' or 'concurrent'"),
        ("repeats", 0, "repeats: expected a number of at least 1, got 0"),
        ("repeats", "two", "repeats: expected a whole number, got 'two'"),
        ("cells/0/speed", -1, r"cells\[0\]\.speed: expected a number above 0, got -1"),
        ("cells/0/traces", "paper", r"cells\[0\]\.traces: expected a list, got 'paper'"),
        ("cells/0", 3, r"cells\[0\]: expected fields, got 3"),
        ("page", "64KB", "page: .*got '64KB'"),
        ("page", 64, "page: expected text, got 64"),
        ("capacities", {25: "1GiB"}, "capacities: the name 25 is not text: put it in quotes"),
        ("traces/zipf/kind", "zpf", r"traces\.zipf\.kind: .*, got 'zpf': did you mean 'zipf'\?"),
        ("traces/zipf/kind", None, r"traces\.zipf\.kind is missing: add it"),
        ("traces/zipf/models", ["x"], r"traces\.zipf\.models: expected a model out of .*got 'x'"),
        (
            "traces/zipf/models",
            [],
            r"traces\.zipf\.models: expected 1 or more entries, got an empty",
        ),
        ("traces/paper/models", ["a"], r"traces\.paper\.models is an unknown field"),
        ("models/a/config", None, "exactly one of folder, hub_id, gguf_package, config, got 0"),
        ("models/a/hub_id", "a/b", "exactly one of folder, hub_id, gguf_package, config, got 2"),
        ("capacities/25", "25/0", r"capacities\.25: .*got '25/0'"),
        ("traces/zipf/n", None, r"traces\.zipf\.n is missing: add it"),
        ("traces/paper/n", 60, r"traces\.paper\.n is an unknown field"),
        (
            "systems/djinn/system",
            "djin",
            r"systems\.djinn\.system: .*'djin': did you mean 'djinn'\?",
        ),
        ("cells/0/systems", ["x"], r"cells\[0\]\.systems: .* 'djinn_whole'\], got 'x': choose one"),
        ("large", {"b": {"capacity": "1GiB", "model": "x"}}, r"large\.b\.model: .*got 'x'"),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_by_name(tmp_path, path, value, message):
    write(tmp_path, changed(path, value))
    with pytest.raises(ConfigError, match=rf"mine\.yml cannot be used:\n.*{message}") as caught:
        load_profile("mine", tmp_path)
    assert not re.search("pydantic|input_|type=|Value error", str(caught.value))


def test_every_fault_has_a_line():
    content = {**GOOD, "name": "mine", "dtype": "int8", "repeat": 2, "new_tokens": 0}
    with pytest.raises(ConfigError) as caught:
        checked(content)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "dtype", "new_tokens", "repeat is an unknown field",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"(?s)^page: .*\ncapacities\.25: [^\n]*$"):
        checked({**GOOD, "name": "mine", "page": "64KB", "capacities": {"25": "x", "all": "1GiB"}})
    assert checked({**GOOD, "name": "mine"}).name == "mine"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("device: cpu\na: [\n", r"line 3, column 1 \(.* while parsing a flow node\)"),
        ("device: cpu: gpu\n", r"line 1, column 12 \(mapping values are not allowed here\)"),
        ("device: cpu\ndtype\n", r"line 3, column 1 \(.* simple key that begins in line 2\)"),
        ("a: \x07", r"\(.*special characters"),
    ],
    ids=["open list", "two colons", "no colon", "control character"],
)  # fmt: skip
def test_broken_yaml_is_placed(tmp_path, content, place):
    (tmp_path / "mine.yml").write_text(content)
    with pytest.raises(ConfigError, match=rf"(?s)not YAML.*{place}.*: correct the YAML$") as caught:
        load_profile("mine", tmp_path)
    assert "unicode string" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "name"),
    [("models", "../x"), ("capacities", ".."), ("traces", "a\nb"), ("systems", "x\x00"),
     ("models", ""), ("capacities", "a-b"), ("systems", "a-b")],
)  # fmt: skip
def test_names_that_are_no_file_names_or_not_to_be_taken_apart_are_refused(tmp_path, field, name):
    some_entry = next(iter(GOOD[field].values()))
    write(tmp_path, changed(field, {**GOOD[field], name: some_entry}))
    with pytest.raises(ConfigError, match=rf"mine\.yml cannot be used:(?s:.*){field}") as caught:
        load_profile("mine", tmp_path)
    assert name in str(caught.value) or repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "", "../params/cpu", "cpu.yml", "CPU"])
def test_an_unknown_profile_is_refused_with_those_there_are(name):
    said = "does not exist" if name.endswith(".yml") else r"choose one of \['cpu'.*'smoke'\]"
    with pytest.raises(ConfigError, match=said) as caught:
        load_profile(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "device: cpu", "1: 2", "a: 2026-13-45"])
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
    (tmp_path / "mine.yml").write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.yml cannot be used"):
        load_profile("mine", tmp_path)


# -- capacities ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "25", "25 GB", "0GiB", "25/0", "-1/2", "1/2/3", "half"])
def test_what_is_no_capacity_is_refused(text):
    with pytest.raises(ConfigError, match=r"as '25GiB', or a share .* as '25/31\.3'"):
        parse_capacity(text, 1_000_000)
