"""What a checkpoint's generation_config asks of decoding, and what a request does.

A checkpoint may come with a `generation_config` that does more than to take the most likely token:
penalties, suppressed or forced tokens, beams, texts that end a sequence. The default of a request,
`Sampling()`, gives what transformers' `generate(do_sample=False)` gives, so all of that counts. A
request that samples brings its own temperature, top_k and top_p, and the file's options for
sampling (`OF_SAMPLING`) do not count; all others still do.

Only transformers' `generate` can do these things. Whether there are any is asked of transformers
itself: it is told to prepare what it would decode with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GENERATION_MODES_MAPPING

from djinn_lib.engine.decode.sampling import Draws
from djinn_lib.errors import ConfigError

OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
               "eta_cutoff")  # fmt: skip
# What ends a sequence early, or makes its end more likely.
_ENDS = ("eos_token_id", "stop_strings", "max_time", "exponential_decay_length_penalty")
# One sequence of token ids is returned, and by code that is not compiled: compiled code would not
# wait for weights. The longest sequence is that of the request. Nothing is ever padded, but without
# an id for padding transformers says so at each request.
_ALWAYS: Mapping[str, Any] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": None,
    "output_logits": None,
    "output_attentions": None,
    "output_hidden_states": None,
    "disable_compile": True,
    "max_length": None,
    "pad_token_id": 0,
}
_DYNAMIC_CACHES = (None, "dynamic")
_SOME_IDS = torch.zeros((1, 4), dtype=torch.long)


def eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end a sequence, as the model's generation configuration has them."""
    ids: Any = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def request_options(
    model: PreTrainedModel,
    max_new_tokens: int,
    ignore_eos: bool,
    sampling: Draws | None = None,
) -> dict[str, Any]:
    """Return what transformers' `generate` is called with for a request, beside its input."""
    options = {**_ALWAYS, "max_new_tokens": max_new_tokens}
    options |= {name: None for name in OF_SAMPLING if hasattr(model.generation_config, name)}
    options["do_sample"] = sampling is not None and not sampling.greedy
    if sampling is not None and not sampling.greedy:
        options["temperature"] = sampling.temperature
        options["top_p"], options["top_k"] = sampling.top_p, sampling.top_k
    if ignore_eos:
        options |= dict.fromkeys(_ENDS)
    return options


def mode_of(model: PreTrainedModel, options: Mapping[str, Any]) -> GenerationMode:
    """Return how transformers would generate with such options.

    Raises:
        ConfigError: by code that is not part of transformers.
    """
    asked = copy.copy(model.generation_config)
    vars(asked).update({name: options[name] for name in options if name != "top_k"})
    if asked.top_k is None:  # with which penalty_alpha asks for contrastive search
        asked.top_k = asked._get_default_generation_params()["top_k"]
    mode = asked.get_generation_mode()
    if "/" in (place := GENERATION_MODES_MAPPING[mode]):
        raise ConfigError(
            f"expected a generation_config that transformers can follow by itself, got one of a "
            f"{model.config.model_type} that asks for {mode.value}, which is at {place}: take the "
            "option out of generation_config.json"
        )
    return mode


def beyond_greedy(model: PreTrainedModel, tokenizer: Any | None = None) -> str | None:
    """Say what a model's generation_config asks for beside the most likely token; None if nothing.

    Args:
        model: its weights are not looked at.
        tokenizer: of the model, for what needs one.

    Raises:
        ConfigError: transformers cannot do it either.
    """
    ensure_generates(model)
    try:
        demands = _demands(model, tokenizer, {})
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # transformers checks some values, and stumbles over others
        said = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"expected a generation_config that transformers can follow, got one of a "
            f"{model.config.model_type} that it cannot ({type(error).__name__}: {said}): correct "
            "generation_config.json"
        ) from error
    return _in_words(model, tokenizer, demands) if demands else None


def ensure_generates(model: PreTrainedModel) -> None:
    """Refuse a model that has no `generate` with a `ConfigError`."""
    if getattr(model, "generation_config", None) is None or not hasattr(model, "generate"):
        raise ConfigError(
            f"expected a model that transformers can generate with, got a {type(model).__name__}: "
            "it is no causal language model"
        )


def _demands(
    model: PreTrainedModel, tokenizer: Any | None, changes: Mapping[str, Any]
) -> list[str]:
    """Names of what `generate(do_sample=False)` would do beside taking the most likely token."""
    hidden: Any = model  # these are transformers' own steps, in its own order
    options = {**request_options(model, 4, ignore_eos=False), **changes}
    config, _ = hidden._prepare_generation_config(None, **options)
    hidden._prepare_special_tokens(config, True, device="cpu", batch_size=1)
    mode = mode_of(model, options)
    processors = hidden._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=_SOME_IDS.shape[1],
        encoder_input_ids=_SOME_IDS,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(),
        device="cpu",
        model_kwargs={},
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
    )
    criteria = hidden._get_stopping_criteria(
        generation_config=config, stopping_criteria=StoppingCriteriaList(), tokenizer=tokenizer
    )
    usual = (MaxLengthCriteria, EosTokenCriteria)
    names = [type(part).__name__ for part in (*processors, *criteria) if type(part) not in usual]
    if mode is not GenerationMode.GREEDY_SEARCH:
        names.append(mode.value)
    if config.cache_implementation not in _DYNAMIC_CACHES:
        names.append(f"a cache of the kind {config.cache_implementation}")
    if config.token_healing:
        names.append("token healing")
    return names


def _in_words(model: PreTrainedModel, tokenizer: Any | None, demands: list[str]) -> str:
    """The options without which there would be fewer demands; failing that, the demands."""
    usual, asked = GenerationConfig(), model.generation_config
    options = []
    for name, value in vars(asked).items():
        if name.startswith("_") or value is None or value == getattr(usual, name, None):
            continue
        if name == "eos_token_id":  # what it is kept from is another option
            continue
        try:
            fewer = len(_demands(model, tokenizer, {name: None})) < len(demands)
        except Exception:  # it may take several options together
            fewer = False
        if fewer:
            said = repr(value)
            options.append(f"{name}={said if len(said) <= 40 else said[:40] + '...'}")
    return ", ".join(options or demands)
