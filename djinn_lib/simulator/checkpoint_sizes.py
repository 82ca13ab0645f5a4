"""Sizes of public checkpoints, and fleets of models drawn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from djinn_lib.errors import ConfigError
from djinn_lib.paths import REPO

CHECKPOINTS = REPO / "data" / "sizes" / "checkpoints.csv"
BYTES_PER_PARAMETER = 2  # half precision
PAPER = ("Llama-2-7b", "Mistral-7B-v0.1", "phi-2")


def checkpoint_bytes(path: Path = CHECKPOINTS) -> dict[str, int]:
    """Return the bytes of public checkpoints in half precision, by name."""
    table = pd.read_csv(path, comment="#")
    sizes = table["parameters"].astype("int64") * BYTES_PER_PARAMETER
    return dict(zip(table["name"], sizes.tolist(), strict=True))


def fleet(n_models: int, seed: int = 0) -> dict[str, int]:
    """Return the bytes of `n_models` models by name.

    A fleet of three is the paper's; any other is drawn from `checkpoint_bytes`, with replacement.

    Raises:
        ConfigError: fewer than one model.
    """
    if n_models < 1:
        raise ConfigError(f"expected a fleet of at least 1 model, got {n_models}")
    known = checkpoint_bytes()
    if n_models == len(PAPER):
        return {name: known[name] for name in PAPER}
    drawn = np.random.default_rng(seed).choice(list(known), size=n_models)
    return {f"{name}#{i}": known[str(name)] for i, name in enumerate(drawn)}
