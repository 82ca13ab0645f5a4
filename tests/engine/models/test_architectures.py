"""Every architecture is served with transformers' tokens, or refused in words."""

import architecture_matrix
import architectures
import pytest

SHOWN = ("llama", "gpt2", "zamba")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SHOWN else [pytest.mark.slow])
        for name in architectures.NAMES
        if name not in architectures.NOT_MADE
    ],
)
def test_an_architecture_is_served_with_transformers_tokens(name):
    verdicts = architecture_matrix.judge_apart(name)
    assert all(map(architecture_matrix.is_good, verdicts.values())), verdicts
