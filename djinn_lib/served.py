"""A model as `Djinn` serves it: what belongs to it beside its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from djinn_lib.decoder import Decoder
from djinn_lib.errors import ConfigError
from djinn_lib.generate import check_prompt, vocabulary
from djinn_lib.models import Unit


@dataclass(slots=True)
class ServedModel:
    """A module bound to its addresses, its units, and how text becomes tokens and tokens more.

    `n_bytes` are those that are paged.
    """

    name: str
    module: PreTrainedModel
    units: tuple[Unit, ...]
    n_bytes: int
    tokenizer: Any | None
    decoder: Decoder

    def prompt_ids(self, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the token ids of a prompt that this model can continue.

        Raises:
            ConfigError: it cannot; the message says why.
        """
        ids = check_prompt(
            self.tokenize(prompt) if isinstance(prompt, str) else prompt,
            vocabulary(self.module),
            max_new_tokens,
        )
        self.decoder.check_length(len(ids), max_new_tokens)
        return ids

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(
                f"expected token ids for {self.name!r}, got text, but the model has no tokenizer: "
                "pass a list of ids"
            )
        return list(self.tokenizer(text).input_ids)

    def text(self, token_ids: Sequence[int]) -> str | None:
        """Return what token ids say; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
