"""How many tokens a model has positions for.

Beyond the end of a table of positions, learned or computed, a model cannot go: on a GPU, reading
there ends not just the request but all use of the device by this process. What has no such table
(rotary positions, slopes, states) has no end, whatever `max_position_embeddings` its configuration
tells: that is how long its training texts were.

Which of the two a model is, its names do not say. So a prompt is run on shapes alone (see
`shapes_only`): tables that are read, or cut, as far as the prompt is long may be ones of positions,
and a prompt that is one token longer than such a table shows it: it fails there.
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

PROBE_TOKENS = 11  # a prompt for which tables are looked up; few other sizes are a prime number


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the positions of a model end.

    Attributes:
        limit: tokens of a prompt and its continuation; None where there is no end.
        source: whose number that is, in words.
    """

    limit: int | None
    source: str = ""


_KNOWN: WeakKeyDictionary[PreTrainedModel, Positions] = WeakKeyDictionary()


def check_positions(model: PreTrainedModel, n_prompt: int, max_new_tokens: int) -> None:
    """Make sure that a model has a position for each token of a prompt and its continuation.

    Raises:
        ConfigError: it has not.
    """
    n_tokens = n_prompt + max_new_tokens
    if longest(model, n_tokens) < n_tokens:
        positions = positions_of(model)
        raise ConfigError(
            f"expected at most {positions.limit} tokens of prompt and continuation together "
            f"({positions.source}), got {n_prompt} + {max_new_tokens}: shorten the prompt or ask "
            "for less"
        )


def longest(model: PreTrainedModel, n_tokens: int) -> int:
    """Return how many of so many tokens a model has positions for.

    Tables have the size that the configuration declares, but for a few positions that some keep
    for padding. Up to half of that, nobody needs to look.
    """
    declared = _declared(model)
    if declared and n_tokens <= declared // 2:
        return n_tokens
    limit = positions_of(model).limit
    return n_tokens if limit is None else min(n_tokens, limit)


def positions_of(model: PreTrainedModel) -> Positions:
    """Return where the positions of a model end; found out once a model, without its weights."""
    if model not in _KNOWN:
        _KNOWN[model] = _find(model)
    return _KNOWN[model]


def _find(model: PreTrainedModel) -> Positions:
    try:
        twin = on_shapes(model)
    except Exception as error:  # of any kind: it comes from the architecture's own code
        return _undecided(model, error)
    seen, usual = run_on_shapes(twin, PROBE_TOKENS)
    # An index into padding comes before that of the first token.
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
    said = str(error).strip().split("\n")[0][:100]
    return Positions(
        _declared(model),
        "max_position_embeddings of its configuration, as it could not be found out whether the "
        f"model can go further: {type(error).__name__}: {said}",
    )


def _declared(model: PreTrainedModel) -> int | None:
    """The positions that the configuration tells; None where it tells nothing."""
    try:
        declared = model.config.get_text_config().max_position_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return declared if isinstance(declared, int) else None


# -- rotary positions whose frequencies change with the length -----------------------------------

# Most frequencies are fixed. With "dynamic" and "longrope" a forward pass that goes beyond some
# length computes others and keeps them in the module; keys that were cached before have been turned
# by the old ones, and some models then compute the whole sequence anew. A recorded step can do none
# of that. And what a long request has left in a module must not reach the next one.
FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional", "mrope"})


def changing_rotation(model: PreTrainedModel) -> str | None:
    """Return the kind of rotary positions that changes with the length; None if none does.

    What is not known to be fixed counts as changing.
    """
    told = [*_told(model.config.to_dict()), *(kind for m in model.modules() for kind in _kinds(m))]
    return next((kind for kind in told if kind not in FIXED), None)


def _kinds(module: nn.Module) -> list[str]:
    """The kinds that a module computes: one, or one for each type of layer."""
    kind: Any = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return [kind for kind in kinds if isinstance(kind, str)]


def _told(options: Mapping[str, Any], rotary: bool = False) -> Iterator[str]:
    """The kinds that a configuration names, wherever it does."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _told(value, rotary or "rope" in str(key))
        elif rotary and key in ("rope_type", "type") and isinstance(value, str):
            yield value


_FRESH: WeakKeyDictionary[PreTrainedModel, list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]]
_FRESH = WeakKeyDictionary()


def forget_lengths(model: PreTrainedModel) -> None:
    """Let a model rotate as it did when this function first saw it, whatever it has computed since.

    It costs nothing where rotations are fixed.
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
