"""Generating tokens, one path for a hit and a miss.

`generate_eager` is transformers' own `generate`, timed; the baselines use the same function, so
systems differ in how weights move and in nothing else. `hold_back` makes each unit of a model wait
for its bytes, so that a prefill follows the copy layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from djinn_lib.errors import ConfigError
from djinn_lib.models import Unit


@dataclass(frozen=True, slots=True)
class Tokens:
    """New token ids, and the seconds from the call to the first and to the last of them."""

    token_ids: tuple[int, ...]
    first_s: float
    last_s: float


def hold_back(model: PreTrainedModel, units: Sequence[Unit], wait: Callable[[int], None]) -> None:
    """Call `wait(end_byte)` before each unit of `model` runs, from now on."""
    for unit in units:
        model.get_submodule(unit.module).register_forward_pre_hook(
            lambda *_, end_byte=unit.end_byte: wait(end_byte)
        )


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_new_tokens: int) -> list[int]:
    """Return the prompt as a list, if it can be used.

    Raises:
        ConfigError: empty, an id outside the vocabulary, or no tokens asked for.
    """
    ids = [int(i) for i in token_ids]
    if not ids:
        raise ConfigError("expected a prompt of at least 1 token, got none")
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        raise ConfigError(
            f"expected token ids from 0 to {vocab_size - 1}, got {outside[0]}: the prompt was "
            "tokenised for another model"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
    return ids


class _FirstToken(BaseStreamer):
    """Notes when the first new token is known; `generate` reports the prompt before it."""

    def __init__(self) -> None:
        self.n_puts = 0
        self.at_s = float("nan")

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each new token (already on the host)."""
        self.n_puts += 1
        if self.n_puts == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        """Called after the last token."""


def generate_eager(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    ignore_eos: bool = False,
) -> Tokens:
    """Decode greedily with `model.generate`.

    Args:
        model: a transformers model, in evaluation mode.
        prompt_ids: token ids of one prompt.
        max_new_tokens: upper limit of new tokens; with `ignore_eos` exactly as many.
        ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.

    Raises:
        ConfigError: the prompt cannot be used with this model.
    """
    begin_s = time.perf_counter()
    ids = check_prompt(prompt_ids, model.config.get_text_config().vocab_size, max_new_tokens)
    inputs = torch.tensor([ids], device=model.device)
    eos = None if ignore_eos else model.generation_config.eos_token_id
    clock = _FirstToken()
    generate: Any = model.generate  # its signature is wider than its annotations say
    with torch.no_grad():
        output: Any = generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=eos,
            pad_token_id=0,
            streamer=clock,
        )
    new_ids = tuple(output[0, len(ids) :].tolist())
    return Tokens(new_ids, clock.at_s - begin_s, time.perf_counter() - begin_s)
