"""Generating tokens as transformers does, and what every way of generating has in common.

`generate_eager` is transformers' own `generate`, timed; the baselines use the same function, so
systems differ in how weights move and in nothing else. `hold_back` makes each unit of a model wait
for its bytes, so that a prefill follows the copy layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from djinn_lib.arguments import whole_number
from djinn_lib.engine.decode.generation_options import (
    ensure_generates,
    eos_ids,
    mode_of,
    request_options,
)
from djinn_lib.engine.decode.positions import check_positions, forget_lengths
from djinn_lib.engine.decode.sampling import (
    MOST_TOKENS,
    DrawNext,
    Draws,
    OwnDraws,
    Sampler,
)
from djinn_lib.engine.models.hooks import Hook
from djinn_lib.engine.models.packing import Unit, Wait
from djinn_lib.engine.prompts import read_ids
from djinn_lib.errors import ConfigError, shown

Proceed = Callable[[], None]  # called for each token; what it raises ends the generation
OnToken = Callable[[int], bool]  # called with each new token; whether the sequence ends with it
_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # a token a step, for good
_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass(frozen=True, slots=True)
class Tokens:
    """New token ids, and the seconds from the call to the first and to the last of them.

    `ended` is False where nothing but the number of tokens ended the sequence.
    """

    token_ids: tuple[int, ...]
    first_s: float
    last_s: float
    ended: bool = False


def ends_with(token: int, ends: Collection[int], on_token: OnToken | None) -> bool:
    """Show a new token to whoever wants to see it; returns whether the sequence ends with it."""
    is_last = on_token is not None and on_token(token)
    return is_last or token in ends


def hold_back(model: PreTrainedModel, units: Sequence[Unit], wait: Wait) -> None:
    """Call `wait(unit.extents)` before each unit of `model` runs, from now on."""
    for unit in units:
        hook = Hook(wait, unit.extents)
        model.get_submodule(unit.module).register_forward_pre_hook(hook)


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many token ids a model can look up.

    That is how many rows its table of embeddings has, which may be more than the tokenizer has
    tokens, and no more than any second table has (`vocab_size_per_layer_input`, for example).

    Raises:
        ConfigError: the model has no such table.
    """
    sizes = {
        name: size
        for name, size in vars(model.config.get_text_config()).items()
        if name.startswith("vocab_size") and isinstance(size, int) and size > 0
    }
    with suppress(NotImplementedError, AttributeError):  # some models do not say where it is
        weight: Any = model.get_input_embeddings().weight
        if weight.dim() == 2:
            sizes["vocab_size"] = weight.shape[0]
    if not sizes:
        raise ConfigError(
            f"expected a model that looks up token ids, got a {type(model).__name__} without a "
            "vocab_size or input embeddings: it is no causal language model"
        )
    return min(sizes.values())


def check_prompt(prompt: Sequence[int], vocab_size: int, max_new_tokens: int) -> list[int]:
    """Return the token ids of a prompt, if they can be continued.

    Args:
        prompt: token ids, as `prompts.read_ids` takes them.
        vocab_size: how many ids the model can look up.
        max_new_tokens: how many new ones are asked for.

    Raises:
        ConfigError: empty, an id that the model does not know, or no tokens asked for.
    """
    ids = read_ids(prompt)
    if not ids:
        raise ConfigError("expected a prompt of at least 1 token, got none")
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        raise ConfigError(
            f"expected token ids from 0 to {vocab_size - 1}, got {shown(outside[0])}: the prompt "
            "was tokenised for another model"
        )
    whole_number(max_new_tokens, "max_new_tokens", 1, MOST_TOKENS)
    return ids


class _Proceed(StoppingCriteria):
    """Asks after each token whether to go on; whoever says no raises."""

    def __init__(self, proceed: Proceed) -> None:
        self._proceed = proceed

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Called with the sequence so far; returns which sequences have ended: none."""
        self._proceed()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _EndsWith(StoppingCriteria):
    """Ends the one sequence with the token of which `on_token` says so.

    Attributes:
        has_ended: whether it said so.
    """

    def __init__(self, on_token: OnToken | None) -> None:
        self._on_token = on_token or (lambda token: False)
        self.has_ended = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Called with the sequence so far, of shape (1, tokens); returns whether it has ended."""
        self.has_ended = self._on_token(int(input_ids[0, -1]))
        return torch.full((1,), self.has_ended, dtype=torch.bool, device=input_ids.device)

    def cut(self, token_ids: list[int]) -> list[int]:
        """Show it all tokens; returns those up to the one that ends the sequence."""
        for i, token in enumerate(token_ids):
            self.has_ended = self._on_token(token)
            if self.has_ended:
                return token_ids[: i + 1]
        return token_ids


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
    sampling: Draws | None = None,
    proceed: Proceed | None = None,
    on_token: OnToken | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any | None = None,
) -> Tokens:
    """Decode with `model.generate`, as its generation_config says; see `generation_options`.

    Args:
        model: a transformers model, in evaluation mode.
        prompt_ids: token ids of one prompt.
        max_new_tokens: upper limit of new tokens; with `ignore_eos` exactly as many.
        ignore_eos: do not stop at the end-of-sequence token, as benchmarks do.
        sampling: how to choose tokens; default is the most likely one.
        proceed: called after each token; what it raises ends the generation.
        on_token: called with each new token; the sequence ends with one for which it says True.
            Where transformers may take tokens back (several beams, say) it is called at the end.
        device: where it computes; default is where its first parameter is.
        tokenizer: of the model, where its generation_config names texts that end a sequence.

    Raises:
        ConfigError: the prompt cannot be used with this model.
    """
    begin_s = time.perf_counter()
    ensure_generates(model)
    ids = check_prompt(prompt_ids, vocabulary(model), max_new_tokens)
    check_positions(model, len(ids), max_new_tokens)
    options = request_options(model, max_new_tokens, ignore_eos, sampling)
    criteria = StoppingCriteriaList([_Proceed(proceed)] if proceed else [])
    stops = model.generation_config.stop_strings
    if tokenizer is not None and stops and not ignore_eos:
        criteria.append(StopStringCriteria(tokenizer, stops))
        options["stop_strings"] = None  # else `generate` would hand the tokenizer to the model
    if model.generation_config.token_healing:
        options["tokenizer"] = tokenizer
    clock, mode = _FirstToken(), mode_of(model, options)
    if mode not in _BEAMS:  # no token is known before the last
        options["streamer"] = clock
    told = _EndsWith(on_token)
    is_told_early = mode in _ONE_BY_ONE and not model.generation_config.token_healing
    if on_token and is_told_early:
        criteria.append(told)
    device, drawing = torch.device(device or model.device), nullcontext()
    if sampling is not None and not sampling.greedy:
        sampler = Sampler(sampling, device)
        if mode in _BEAMS or model.generation_config.watermarking_config:
            drawing = OwnDraws(sampler)
        else:  # as a recorded step does
            options |= request_options(model, max_new_tokens, ignore_eos)
            options["logits_processor"] = LogitsProcessorList([DrawNext(sampler)])
    with drawing:
        output = call_generate(model, ids, device, stopping_criteria=criteria, **options)
    new_ids = output[0, len(ids) :].tolist()
    if on_token and not is_told_early:
        new_ids = told.cut(new_ids)
    last_s = time.perf_counter() - begin_s
    ends = frozenset() if ignore_eos else eos_ids(model)
    return Tokens(
        tuple(new_ids),
        clock.at_s - begin_s if clock.n_puts > 1 else last_s,
        last_s,
        ended=told.has_ended
        or len(new_ids) < max_new_tokens
        or new_ids[-1] in ends
        or any(one(output, None).any() for one in criteria if isinstance(one, StopStringCriteria)),
    )


def call_generate(
    model: PreTrainedModel, ids: Sequence[int], device: torch.device, **options: Any
) -> Any:
    """Call transformers' `generate` for one prompt that has been checked; returns what it does."""
    inputs = torch.tensor([ids], device=device)
    if "attention_mask" in signature(model.forward).parameters:
        # Else ids that happen to be that of padding would count as such.
        options["attention_mask"] = torch.ones_like(inputs)
    forget_lengths(model)
    generate: Any = model.generate  # its signature is wider than its annotations say
    with torch.no_grad():
        return generate(inputs, **options)
