"""Traces: the published one to the last digit, others by distribution, files by every damage."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn_lib.errors import TraceError
from djinn_lib.experiment.profile import REPO
from djinn_lib.trace import (
    PAPER_MODELS,
    Request,
    Trace,
    check_models,
    paper_trace,
    read_trace,
    renamed,
    write_trace,
    zipf_trace,
)

SEQUENCE = list("mllpppllmmlmlplmlmmlpmppmpllll")
ARRIVALS_S = {
    0: 0.9385361799537182,
    1: 6.958779041788761,
    2: 9.59227042887966,
    15: 32.444930284712406,
    28: 48.252890664448934,
    29: 48.34801836396175,
}
REMEDY = "generate it again"


def written(trace: Trace, folder: Path) -> Path:
    path = folder / "trace.jsonl"
    write_trace(trace, path)
    return path


# -- the published trace ---------------------------------------------------------------------


def test_the_paper_trace_is_the_published_one():
    trace = paper_trace()
    letters: dict[str, str] = dict(zip(PAPER_MODELS, "lmp", strict=True))
    assert [letters[request.model] for request in trace.requests] == SEQUENCE
    assert {i: trace.requests[i].arrival_s for i in ARRIVALS_S} == ARRIVALS_S
    assert [request.request for request in trace.requests] == list(range(30)) and len(trace) == 30


@pytest.mark.parametrize("models", [(), ("a", "b"), ("a", "b", "b"), ("a", "b", "c", "d")], ids=str)
def test_the_paper_trace_needs_three_different_models(models):
    with pytest.raises(TraceError, match="three different models"):
        paper_trace(models)


def test_a_renamed_trace_names_its_new_models_everywhere():
    trace = renamed(paper_trace(("l", "m", "p")), {"l": "llama", "m": "mistral"}, keep=("m",))
    assert set(trace.models) == {"llama", "m", "p"} == set(trace.params["models"])
    assert [len(request.model) for request in trace.requests[:3]] == [1, 5, 5]


# -- zipf ------------------------------------------------------------------------------------


def test_zipf_draws_by_rank_and_arrives_at_the_rate():
    models = ["a", "b", "c", "d"]
    trace = zipf_trace(40_000, 1.0, models, seed=1, rate_per_s=4.0)
    counts = Counter(request.model for request in trace.requests)
    for rank, model in enumerate(models, start=1):
        share = (1 / rank) / sum(1 / r for r in range(1, 5))
        assert counts[model] / len(trace) == pytest.approx(share, abs=0.01)  # 4 standard errors
    assert len(trace) / trace.requests[-1].arrival_s == pytest.approx(4.0, rel=0.02)
    gaps_s = [after.arrival_s - before.arrival_s for before, after in pairwise(trace.requests)]
    assert min(gaps_s) >= 0
    mean_s = sum(gaps_s) / len(gaps_s)
    deviation_s = math.sqrt(sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s))
    assert deviation_s == pytest.approx(mean_s, rel=0.03)  # as exponential gaps have it


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n": 0}, "got n=0"),
        ({"n": 10**9}, "got n=1000000000"),
        ({"alpha": -0.1}, "alpha from 0 to 100, got -0.1"),
        ({"rate_per_s": 0.0}, "rate_per_s, got 0.0"),
        ({"rate_per_s": math.nan}, "rate_per_s, got nan"),
        ({"seed": -1}, "seed of at least 0, got -1"),
        ({"models": ["a", "a"]}, "different models"),
    ],
    ids=str,
)
def test_zipf_refuses_bad_parameters(bad, message):
    good = {"n": 5, "alpha": 1.0, "models": ["a", "b"], "seed": 0, "rate_per_s": 1.0}
    with pytest.raises(TraceError, match=message):
        zipf_trace(**{**good, **bad})


# -- files -----------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=12)


@given(
    gaps_s=st.lists(st.floats(0, 1e6), min_size=0, max_size=8),
    names=st.lists(NAMES, min_size=1, max_size=4),
    kind=NAMES,
)
def test_what_is_written_is_read_again(tmp_path_factory, gaps_s, names, kind):
    requests, at_s = [], 0.0
    for i, gap_s in enumerate(gaps_s):
        at_s += gap_s
        requests.append(Request(i, at_s, names[i % len(names)]))
    trace = Trace(kind, {"models": names, "note": {"of": [1, 2.5, None]}}, tuple(requests))
    read = read_trace(written(trace, tmp_path_factory.mktemp("trace")))
    assert read == trace and read.sha256 == trace.sha256


@pytest.mark.parametrize("name", ["paper", "zipf"])
def test_the_samples_are_reproduced_byte_for_byte(tmp_path, name):
    made = {"paper": paper_trace(), "zipf": zipf_trace(300, 1.0, PAPER_MODELS, 42, 0.5)}[name]
    sample = REPO / "data" / "traces" / f"{name}.jsonl"
    assert written(made, tmp_path).read_bytes() == sample.read_bytes()
    assert read_trace(sample) == made


def edit(line: int, **fields: object):
    """A damage: fields of one line (from 1) are replaced; None takes a field away."""

    def damage(lines: list[str]) -> list[str]:
        content = {**json.loads(lines[line - 1]), **fields}
        content = {name: value for name, value in content.items() if value is not None}
        return [*lines[: line - 1], json.dumps(content), *lines[line:]]

    return damage


DAMAGES = {  # what is done to the lines of the file
    "cut at the end": lambda lines: lines[:20],
    "cut within a line": lambda lines: [*lines[:9], lines[9][:15]],
    "cut at the front": lambda lines: lines[1:],
    "a line too many": lambda lines: [*lines, lines[-1]],
    "a line lost": lambda lines: lines[:4] + lines[5:],
    "a blank line": lambda lines: [*lines[:4], "", *lines[4:]],
    "lines swapped": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "empty": lambda lines: [],
    "not an object": lambda lines: [lines[0], "[]", *lines[2:]],
    "another model": edit(5, model="phi-3"),
    "another parameter": edit(1, params={"seed": 43}),
    "another format": edit(1, format="djinn-trace/2"),
    "no format": edit(1, format=None),
    "no count": edit(1, n=None),
    "no hash": edit(1, sha256=None),
    "params that are not numbers": edit(1, params={"a": math.nan}),
    "no number": edit(4, arrival_s=math.nan),
    "an arrival in words": edit(4, arrival_s="soon"),
    "no model": edit(4, model=None),
    "a field too many": edit(4, tokens=7),
    "out of order": edit(4, arrival_s=1.0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path, damage):
    path = written(paper_trace(), tmp_path)
    lines = DAMAGES[damage](path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(TraceError, match=REMEDY) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


SAMPLE = (REPO / "data" / "traces" / "paper.jsonl").read_text()


@given(st.integers(0, len(SAMPLE) - 1), st.sampled_from('"{}[],:.-+0123456789eEnaNI\n x'))
def test_no_single_character_can_be_changed_unseen(tmp_path_factory, position, character):
    path = tmp_path_factory.mktemp("damaged") / "trace.jsonl"
    path.write_text(SAMPLE[:position] + character + SAMPLE[position + 1 :])
    try:
        assert read_trace(path) == paper_trace()  # a change of blank space
    except TraceError as error:
        assert REMEDY in str(error)


def test_files_that_are_no_traces(tmp_path):
    with pytest.raises(
        TraceError, match=r"no\.jsonl cannot be read .*: check the path, or generate it again"
    ):
        read_trace(tmp_path / "no.jsonl")
    with pytest.raises(TraceError, match="generate it again"):
        read_trace(tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="generate it again"):
        read_trace(tmp_path / "binary.jsonl")
    for content in ("# A heading\n\nText.\n", "", "[1]\n", "[" * 100_000):
        (tmp_path / "README.md").write_text(content)
        with pytest.raises(
            TraceError, match=r"README\.md is not a trace: .*'djinn-trace/1' and"
        ) as e:
            read_trace(tmp_path / "README.md")
        assert "Expecting value" not in str(e.value)


def test_a_trace_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "t.jsonl"
    with pytest.raises(
        OSError, match=r"^\S*file/t\.jsonl cannot be written \(.*\): choose another"
    ):
        write_trace(paper_trace(), path)


# -- models ----------------------------------------------------------------------------------


def test_every_model_of_a_trace_must_be_known():
    trace = paper_trace()
    check_models(trace, {*PAPER_MODELS, "another"})
    with pytest.raises(TraceError, match=r"\['llama-7b', 'phi-2'\], got 'mistral-7b': add it"):
        check_models(trace, ["llama-7b", "phi-2"])
    check_models(replace(trace, requests=()), [])
