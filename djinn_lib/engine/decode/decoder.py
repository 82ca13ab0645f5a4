"""What every way of decoding has in common, and the plainest of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from djinn_lib.engine.decode.eager import Tokens, generate_eager
from djinn_lib.engine.decode.generation_options import beyond_greedy
from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.decode.positions import check_positions
from djinn_lib.engine.decode.sampling import Sampling
from djinn_lib.errors import ConfigError, DjinnError, in_words

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
        proceed: Proceed | None = None,
    ) -> Tokens:
        """Continue a prompt; weights need not be there yet, and are waited for.

        `proceed` is called for each token; what it raises ends the generation.
        """
        ...


class EagerDecoder:
    """transformers' own `generate`; the hooks of `hold_back` wait for weights.

    Args:
        model: whose weights need not be there yet.
        tokenizer: of the model, if it has one.

    Attributes:
        beyond_greedy: what its generation_config asks for beside the most likely token, in words.

    Raises:
        ConfigError: its generation_config is one that transformers cannot follow.
    """

    mode: Decode = "eager"
    kv_cache_bytes = 0  # transformers allocates them for each request

    def __init__(self, model: PreTrainedModel, tokenizer: Any | None = None) -> None:
        self.model, self._tokenizer = model, tokenizer
        self.beyond_greedy = beyond_greedy(model, tokenizer)

    def check_length(self, n_prompt: int, max_new_tokens: int) -> None:
        """Check that the model has positions for all tokens; the cache grows with the sequence."""
        check_positions(self.model, n_prompt, max_new_tokens)

    def close(self) -> None:
        """Nothing is held between requests."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        proceed: Proceed | None = None,
    ) -> Tokens:
        """Continue a prompt.

        Raises:
            ConfigError: transformers cannot, or not as its generation_config asks for.
        """
        try:
            return generate_eager(
                self.model,
                prompt_ids,
                max_new_tokens,
                ignore_eos,
                sampling,
                proceed,
                tokenizer=self._tokenizer,
            )
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
            # Subclasses of RuntimeError are of the device: no memory, a kernel that failed.
            of_device = isinstance(error, RuntimeError) and type(error) is not RuntimeError
            if isinstance(error, DjinnError) or of_device:
                raise
            raise ConfigError(
                f"expected a {self.model.config.model_type} that transformers' generate can serve, "
                f"got {in_words(error)}: {self._remedy}"
            ) from error

    @property
    def _remedy(self) -> str:
        if self.beyond_greedy:
            return f"take out of its generation_config what it may be: {self.beyond_greedy}"
        return "this architecture, or this checkpoint of it, cannot be served"
