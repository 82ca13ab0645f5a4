"""What an environment with vLLM lacks, and what a user chose."""

import os

import pytest

from djinn_lib.fleet import environment

SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


@pytest.mark.parametrize(
    ("installed", "chosen", "expected"),
    [(False, None, "0"), (False, "1", "1"), (True, None, None), (True, "0", "0")],
)
def test_flashinfer_is_used_where_it_is_installed(monkeypatch, installed, chosen, expected):
    monkeypatch.setattr(os, "environ", {SAMPLER: chosen} if chosen else {})
    monkeypatch.setattr(environment, "find_spec", lambda name: object() if installed else None)
    environment.without_flashinfer()
    assert os.environ.get(SAMPLER) == expected
