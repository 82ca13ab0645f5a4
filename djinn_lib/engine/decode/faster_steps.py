"""Ways to make the decode step of a model faster than transformers' own code is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from djinn_lib.engine.decode.compiled import CompiledUnits, attentions, has_triton
from djinn_lib.engine.decode.kv_cache import KvCache
from djinn_lib.engine.models.packing import Unit
from djinn_lib.errors import ConfigError

Manner = Callable[[], AbstractContextManager[None]]  # in which a step runs
FUSED = "fused layers"


def faster_ways(
    model: PreTrainedModel, units: Sequence[Unit], cache: KvCache
) -> Iterator[tuple[str, Callable[[], Manner]]]:
    """Names of ways, the fastest first, and what makes each; it may raise anything."""
    if has_triton(model.device):
        from djinn_lib.engine.decode.fused_layers import FusedUnits  # needs triton

        yield FUSED, lambda: FusedUnits(model, units, cache).in_place
    for attention in attentions(model.device):
        yield (
            f"torch.compile, attention {attention}",
            lambda attention=attention: CompiledUnits(model, units, cache, attention).in_place,
        )


def note_refusal(model: PreTrainedModel, way: str, error: Exception) -> None:
    """Log why a step is not made in some way; that layers are of another kind is no surprise."""
    refused = way == FUSED and isinstance(error, ConfigError)
    logging.getLogger(__name__).log(
        logging.INFO if refused else logging.WARNING,
        "the decode step of a %s cannot be made with %s (%s: %s)",
        model.config.model_type,
        way,
        type(error).__name__,
        str(error).strip().split("\n")[0],
    )
