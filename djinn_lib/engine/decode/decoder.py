"""Which way of decoding a model gets: the one asked for, or the next one that is right for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import GenerationMixin, PreTrainedModel

from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.eager import OnToken, Proceed, Tokens, generate_eager
from djinn_lib.engine.decode.generation_options import beyond_greedy
from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.decode.positions import changing_rotation, check_positions
from djinn_lib.engine.decode.recorded import RecordedDecoder
from djinn_lib.engine.decode.sampling import Draws
from djinn_lib.engine.models.packing import Unit, Wait
from djinn_lib.errors import ConfigError, DjinnError, in_words


class Decoder(Protocol):
    """Generates tokens with one model.

    Attributes:
        mode: how it decodes.
        logits_distance: greatest distance of its logits from those of transformers' `generate`, as
            a share of their norm, that was seen when it was made.
        kv_cache_bytes: device memory that it holds for keys and values.
    """

    mode: Decode
    logits_distance: float
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
        sampling: Draws | None = None,
        proceed: Proceed | None = None,
        on_token: OnToken | None = None,
    ) -> Tokens:
        """Continue a prompt; weights need not be there yet, and are waited for.

        `proceed` is called for each token; what it raises ends the generation. `on_token` gets each
        new token, and may end the sequence with it.
        """
        ...


class EagerDecoder:
    """transformers' own `generate`; the hooks of `hold_back` wait for weights.

    Args:
        model: whose weights need not be there yet.
        tokenizer: of the model, if it has one.

    Attributes:
        logits_distance: 0, since they are those of `generate`.
        beyond_greedy: what its generation_config asks for beside the most likely token, in words.

    Raises:
        ConfigError: its generation_config is one that transformers cannot follow.
    """

    mode: Decode = "eager"
    logits_distance = 0.0
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
        sampling: Draws | None = None,
        proceed: Proceed | None = None,
        on_token: OnToken | None = None,
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
                on_token,
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


def make_decoder(
    decode: Decode,
    model: PreTrainedModel,
    units: Sequence[Unit],
    max_model_len: int,
    recorder: Recorder,
    progress: Callable[[str], object],
    tokenizer: Any | None = None,
    wait: Wait = lambda extents: None,
) -> Decoder:
    """Return a decoder that works as wished, or as near to that as gives transformers' tokens.

    Not every forward pass can be compiled (some decide in Python what to compute next) or recorded
    (some look at values on the host), not every one gives the same with a cache of fixed length,
    and not all that a generation_config may ask for can be done by a recorded step. Such a model is
    served the next slower way, with a warning.

    Args:
        decode: the way that is wished.
        model, units, max_model_len, recorder, progress, wait: see `RecordedDecoder`.
        tokenizer: of the model, if it has one.

    Raises:
        ConfigError: the model's generation_config is one that transformers cannot follow.
    """
    eager = EagerDecoder(model, tokenizer)
    if decode == "eager":
        return eager
    if reason := _why_not_recorded(model, eager):
        return _warned(eager, reason)
    compiled = decode == "compiled"
    try:
        return RecordedDecoder(model, units, max_model_len, recorder, compiled, progress, wait)
    except Exception as error:  # of any kind: it comes from the architecture's own code
        said = str(error).strip().split("\n")[0]
        return _warned(eager, f"{type(error).__name__}: {said}")


def _why_not_recorded(model: PreTrainedModel, eager: EagerDecoder) -> str | None:
    """What is known beforehand to go beyond a recorded step."""
    if eager.beyond_greedy:
        return f"its generation_config asks for {eager.beyond_greedy}"
    usual, own = vars(GenerationMixin)["generate"], getattr(type(model), "generate", None)
    if own is not usual or "generate" in vars(model):
        return "it has a generate of its own"
    if getattr(model, "_is_stateful", False):  # how transformers marks them
        return "it keeps a state, not only keys and values"
    if kind := changing_rotation(model):
        return f"its rotary positions change with the length: {kind}"
    return None


def _warned(eager: EagerDecoder, reason: str) -> EagerDecoder:
    logging.getLogger(__name__).warning(
        "a %s cannot be recorded, and decodes with transformers' own generate (%s)",
        eager.model.config.model_type,
        reason,
    )
    return eager
