"""A profile of two tiny models of random weights, for tests that build folders and runs."""

from __future__ import annotations

from typing import Any

from djinn_lib.experiment.profile import Profile

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 200,
        "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip


def tiny_profile(models: dict[str, Any] | None = None, **fields: Any) -> Profile:
    """A checked profile; `models` and `fields` replace what it would have."""
    defaults = {
        "name": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "page": "4KiB",
        "prompt_tokens": 4,
        "new_tokens": 2,
        "repeats": 1,
        "models": models or {"llama": entry(LLAMA, 1), "gpt2": entry(GPT2, 2)},
        "capacities": {"half": "1/2", "all": "64MiB"},
        "traces": {"zipf": {"kind": "zipf", "n": 6, "alpha": 1.0, "seed": 3, "rate_per_s": 2.0}},
        "systems": {"djinn": {"system": "djinn"}},
        "cells": [{"traces": ["zipf"], "capacities": ["all"], "systems": ["djinn"]}],
    }
    return Profile.model_validate({**defaults, **fields})


def entry(config: dict[str, Any], seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A model of random weights; `changes` are to its configuration."""
    return {"stands_for": "llama-7b", "seed": seed, "config": {**config, **changes}}
