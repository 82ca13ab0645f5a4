"""What every way of decoding has in common, and the plainest of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from djinn_lib.decode_modes import Decode
from djinn_lib.generate import Tokens, generate_eager
from djinn_lib.recording import Wait
from djinn_lib.sampling import Sampling

Proceed = Callable[[], None]


class Decoder(Protocol):
    """Generates tokens with one model.

    Attributes:
        mode: how it decodes.
        kv_cache_bytes: device memory that it holds for keys and values.
    """

    mode: Decode
    kv_cache_bytes: int

    def check_length(self, n_prompt: int, max_new_tokens: int) -> None:
        """Raise `ConfigError` when a prompt and its continuation do not fit."""
        ...

    def close(self) -> None:
        """Release device memory."""
        ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        wait: Wait = ...,
        proceed: Proceed | None = None,
    ) -> Tokens:
        """Continue a prompt, calling `wait(end_byte)` before weights up to there are read.

        `proceed` is called for each token; what it raises ends the generation.
        """
        ...


class EagerDecoder:
    """transformers' own `generate`; the hooks of `hold_back` wait for weights."""

    mode: Decode = "eager"
    kv_cache_bytes = 0  # transformers allocates them for each request

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def check_length(self, n_prompt: int, max_new_tokens: int) -> None:
        """Any length will do: the cache grows with the sequence."""

    def close(self) -> None:
        """Nothing is held between requests."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        wait: Wait = lambda end_byte: None,
        proceed: Proceed | None = None,
    ) -> Tokens:
        """Continue a prompt."""
        return generate_eager(self.model, prompt_ids, max_new_tokens, ignore_eos, sampling, proceed)
