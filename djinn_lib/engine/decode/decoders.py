"""Which way of decoding a model gets: the one asked for, or the next one that is right for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.decoder import Decoder, EagerDecoder
from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.decode.recorded import RecordedDecoder
from djinn_lib.engine.decode.rotations import changing_rotation
from djinn_lib.engine.models.packing import Unit, Wait


def make_decoder(
    decode: Decode,
    model: PreTrainedModel,
    units: Sequence[Unit],
    max_model_len: int,
    recorder: Recorder,
    progress: Callable[[str], None],
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
