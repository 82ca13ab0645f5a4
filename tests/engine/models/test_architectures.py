"""Every architecture is served with transformers' tokens, or refused in words."""

import json

import architecture_matrix
import pytest

# Kinds that no other test serves: `make architectures` tries them all, which takes hours.
SAMPLE = ("bloom", "gemma2", "mixtral", "qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_served_with_transformers_tokens(name):
    verdicts = architecture_matrix.judge_apart(name)
    assert all(map(architecture_matrix.is_good, verdicts.values())), verdicts


def test_the_page_shows_what_was_measured_and_nothing_of_it_is_wrong():
    kept = json.loads(architecture_matrix.RESULTS.read_text())
    assert architecture_matrix.PAGE.read_text() == architecture_matrix.page(kept)
    bad = {
        name: entry["verdicts"]
        for name, entry in kept.items()
        if not all(map(architecture_matrix.is_good, entry["verdicts"].values()))
    }
    assert bad == {}
