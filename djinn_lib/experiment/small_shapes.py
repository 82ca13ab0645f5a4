"""Shapes of tiny models that a laptop computes with at once, for examples."""

from __future__ import annotations

from typing import Any


def llama(n_layers: int) -> dict[str, Any]:
    """Return the configuration of a small Llama, of about 2.5 MiB of float32 weights a layer.

    Args:
        n_layers: how many layers it has.
    """
    return {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # random weights as small as usual give one token again and again
    }
