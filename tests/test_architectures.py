"""Every architecture is served with transformers' tokens, or refused in words."""

import json

import architecture_matrix
import architectures
import pytest
from architecture_matrix import MODES, PAGE, RESULTS

KEPT = json.loads(RESULTS.read_text())


def test_the_page_shows_what_was_measured():
    assert PAGE.read_text() == architecture_matrix.page(KEPT)


def test_every_architecture_of_transformers_was_tried_in_every_mode():
    results = KEPT["architectures"]
    assert sorted(results) == architectures.NAMES
    assert all(by.keys() == MODES.keys() for by in results.values())
    bad = {
        n: by for n, by in results.items() if not all(map(architecture_matrix.is_good, by.values()))
    }
    assert bad == {}
    made = {n for n, by in results.items() if not by["eager"].startswith("not made")}
    assert len(made) > 150 and made.isdisjoint(architectures.NOT_MADE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in architectures.NAMES if n not in architectures.NOT_MADE]
)
def test_an_architecture_is_served_as_it_was(name):
    verdicts = architecture_matrix.judge_apart(name)
    assert all(map(architecture_matrix.is_good, verdicts.values())), verdicts
    kept = KEPT["architectures"][name]
    assert {mode: _kind(verdicts[mode]) for mode in MODES} == {m: _kind(kept[m]) for m in MODES}


def _kind(verdict: str) -> str:
    return verdict.partition(":")[0]
