"""Find how many tokens a model has positions for.

A model cannot go beyond the end of a table of positions, learned or computed. On a GPU, such a read
makes the CUDA context unusable, not just the request. A model without a table (rotary positions,
slopes, states) has no limit; its `max_position_embeddings` is the length of its training texts.

Names do not tell which kind a model is. So a prompt is run on shapes alone (see `shapes_only`). A
table that is read or cut exactly as far as the prompt is long may be one of positions. A second
prompt, one token longer than the table, confirms it by failing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from djinn_lib.engine.decode.shapes_only import OutsideTable, on_shapes, run_on_shapes
from djinn_lib.errors import ConfigError

PROBE_TOKENS = 11  # prompt length; a prime, which few other sizes in a model equal


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the positions of a model end.

    Attributes:
        limit: maximum tokens of a prompt and its continuation; None without a limit.
        source: description of where the limit comes from.
    """

    limit: int | None
    source: str = ""


_KNOWN: WeakKeyDictionary[PreTrainedModel, Positions] = WeakKeyDictionary()


def check_positions(model: PreTrainedModel, n_prompt: int, max_new_tokens: int) -> None:
    """Check that a model has positions for a prompt and its continuation.

    Raises:
        ConfigError: it does not.
    """
    n_tokens = n_prompt + max_new_tokens
    if longest(model, n_tokens) < n_tokens:
        positions = positions_of(model)
        raise ConfigError(
            f"expected at most {positions.limit} tokens of prompt and continuation together "
            f"({positions.source}), got {n_prompt} + {max_new_tokens}: shorten the prompt or ask "
            "for fewer tokens"
        )


def longest(model: PreTrainedModel, n_tokens: int) -> int:
    """Return how many of `n_tokens` tokens a model has positions for.

    A table has the declared size, give or take a few positions for padding. So up to half of the
    declared size, no search is needed.
    """
    declared = _declared(model)
    if declared and n_tokens <= declared // 2:
        return n_tokens
    limit = positions_of(model).limit
    return n_tokens if limit is None else min(n_tokens, limit)


def positions_of(model: PreTrainedModel) -> Positions:
    """Return where the positions of a model end; cached per model, reads no weights."""
    if model not in _KNOWN:
        _KNOWN[model] = _find(model)
    return _KNOWN[model]


def _find(model: PreTrainedModel) -> Positions:
    try:
        twin = on_shapes(model)
    except Exception as error:  # the architecture's own code may raise anything
        return _undecided(model, error)
    seen, usual = run_on_shapes(twin, PROBE_TOKENS)
    # With padding, positions start after an offset: count from the index of the first token.
    ends = {
        size - (last - PROBE_TOKENS + 1) for size, last in seen.reads if last + 1 >= PROBE_TOKENS
    }
    ends |= {size for size, left in seen.cuts if left == PROBE_TOKENS < size}
    for end in sorted(ends):
        _, error = run_on_shapes(twin, end + 1)
        if isinstance(error, OutsideTable) or (error and type(error) is not type(usual)):
            return Positions(end, "the model's table of positions ends there")
    return Positions(None) if usual is None else _undecided(model, usual)


def _undecided(model: PreTrainedModel, error: Exception) -> Positions:
    message = str(error).strip().split("\n")[0][:100]
    return Positions(
        _declared(model),
        "max_position_embeddings of its configuration, because a search for the real limit failed: "
        f"{type(error).__name__}: {message}",
    )


def _declared(model: PreTrainedModel) -> int | None:
    """Return the positions that the configuration declares; None if it declares none."""
    try:
        declared = model.config.get_text_config().max_position_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return declared if isinstance(declared, int) else None


# -- rotary positions whose frequencies change with the length -----------------------------------

# Most frequencies are fixed. With "dynamic" and "longrope", a forward pass beyond some length
# computes other frequencies and keeps them in the module. Keys cached before were rotated by the
# old ones, and some models then recompute the whole sequence. A recorded step cannot do that. And
# frequencies that a long request leaves in a module must not reach the next request.
FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional", "mrope"})


def changing_rotation(model: PreTrainedModel) -> str | None:
    """Return a rotary kind that changes with the length; None if there is none.

    An unknown kind counts as changing.
    """
    kinds = [*_named(model.config.to_dict()), *(k for m in model.modules() for k in _kinds(m))]
    return next((kind for kind in kinds if kind not in FIXED), None)


def _kinds(module: nn.Module) -> list[str]:
    """List the kinds that a module computes: one, or one for each type of layer."""
    kind: Any = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return [kind for kind in kinds if isinstance(kind, str)]


def _named(options: Mapping[str, Any], rotary: bool = False) -> Iterator[str]:
    """Yield the kinds that a configuration names, at any depth."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _named(value, rotary or "rope" in str(key))
        elif rotary and key in ("rope_type", "type") and isinstance(value, str):
            yield value


_FRESH: WeakKeyDictionary[PreTrainedModel, list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]]
_FRESH = WeakKeyDictionary()


def forget_lengths(model: PreTrainedModel) -> None:
    """Restore the rotary state that a model had when this function first saw it.

    It does nothing where rotations are fixed.
    """
    if model not in _FRESH:
        _FRESH[model] = [
            (module, dict(vars(module)), dict(module._buffers))
            for module in model.modules()
            if any(kind not in FIXED for kind in _kinds(module))
        ]
    for module, attributes, buffers in _FRESH[model]:
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
