"""A model as `Djinn` serves it: everything that belongs to it except its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from djinn_lib.engine.decode.decoder import Decoder
from djinn_lib.engine.decode.eager import check_prompt, vocabulary
from djinn_lib.engine.decode.sampling import Sampling
from djinn_lib.engine.lending.lender import Lending
from djinn_lib.engine.models.packing import Unit
from djinn_lib.engine.models.tokenizer import Tokenizer
from djinn_lib.engine.prompts import ReadPrompt, read_prompts
from djinn_lib.engine.serving.request import GenerationRequest
from djinn_lib.errors import ConfigError, shown


@dataclass(slots=True)
class ServedModel:
    """A module bound to its addresses, with its units, tokenizer and decoder.

    `n_bytes` counts the paged bytes. Users get the module's twin, from `lending`. Once the model is
    `removed`, its addresses are invalid, even if another model has the same name.
    """

    name: str
    module: PreTrainedModel
    units: tuple[Unit, ...]
    n_bytes: int
    tokenizer: Tokenizer | None
    decoder: Decoder
    lending: Lending
    removed: bool = False

    def __post_init__(self) -> None:
        n_ids = vocabulary(self.module)
        if self.tokenizer and len(self.tokenizer) > n_ids:
            logging.getLogger(__name__).warning(
                "the tokenizer of %r knows %d ids, and the model %d: prompts with other ids are "
                "refused; if there are many, tokenizer and model do not belong together",
                self.name,
                len(self.tokenizer),
                n_ids,
            )

    def ask(
        self, prompt: object, sampling: Sampling
    ) -> GenerationRequest | list[GenerationRequest]:
        """Return the request for a prompt, or a list of requests for a list of prompts.

        Everything is checked here, before any wait or load.

        Args:
            prompt: see `prompts.read_prompts`.
            sampling: how to choose tokens, and how many.

        Raises:
            ConfigError: this model cannot continue it; the message says why.
        """
        begin_s = time.perf_counter()
        if sampling.stops and self.tokenizer is None:
            raise ConfigError(
                f"stop needs a tokenizer, and {self.name!r} has none: leave it out, or add the "
                "model from a folder with its tokenizer"
            )
        prompts, many = read_prompts(prompt)
        requests = []
        for i, one in enumerate(prompts):
            try:
                ids = self._prompt_ids(one, sampling.max_new_tokens)
            except ConfigError as error:
                raise ConfigError(f"prompt {i} of the list: {error}" if many else error) from error
            requests.append(GenerationRequest(self.name, ids, sampling, begin_s))
        return requests if many else requests[0]

    def _prompt_ids(self, prompt: ReadPrompt, max_new_tokens: int) -> list[int]:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        ids = check_prompt(ids, vocabulary(self.module), max_new_tokens)
        self.decoder.check_length(len(ids), max_new_tokens)
        return ids

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`.

        Raises:
            ConfigError: the model has no tokenizer, or its tokenizer cannot encode the text or
                gives ids outside the model's vocabulary.
        """
        if not isinstance(text, str):
            raise ConfigError(f"expected text to tokenize, got {shown(text)}")
        return self._known(self._tokenizer().encode(text))

    def chat_ids(self, messages: object) -> list[int]:
        """Return the token ids of a conversation, up to the start of the model's answer.

        Raises:
            ConfigError: the model has no tokenizer or chat template, or the template cannot format
                these messages.
        """
        return self._known(self._tokenizer().encode_chat(messages))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.name!r} has no tokenizer, so it cannot read text: pass a list of token "
                "ids, or add the model from a folder with its tokenizer"
            )
        return self.tokenizer

    def _known(self, ids: list[int]) -> list[int]:
        """Return the tokenizer's ids if all of them are in the model's vocabulary."""
        n_ids = vocabulary(self.module)
        if outside := [i for i in ids if not 0 <= i < n_ids]:
            raise ConfigError(
                f"expected a tokenizer of {self.name!r} that gives ids below {n_ids}, got "
                f"{outside[0]}: tokenizer and model do not belong together, or the text has a "
                "token that was added after training"
            )
        return ids

    def text(self, token_ids: Sequence[int]) -> str | None:
        """Decode token ids; None without a tokenizer, or if it cannot decode them."""
        return self.tokenizer.decode(token_ids) if self.tokenizer else None
