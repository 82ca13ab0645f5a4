"""Run decoder layers of common architectures as a few fused kernels.

They serve steps of one token. They are written by hand, because `torch.compile` does not fuse a
norm into the product after it. It also does not request weights before the previous kernel ends. A
layer that is not exactly of a known kind is refused and then compiled (see `compiled`). The logits
are compared with those of the plain step in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from djinn_lib.engine.decode.compiled import replaced_forwards
from djinn_lib.engine.decode.kernels.attention import NAME
from djinn_lib.engine.decode.kernels.operators import (
    GELU_TANH,
    LAYER_NORM,
    RMS_NORM,
    SILU,
    Norm,
    Product,
    attend,
    attend_and_multiply,
    multiply,
    project,
)
from djinn_lib.engine.decode.kv_cache import KvCache
from djinn_lib.engine.models.packing import Unit
from djinn_lib.errors import ConfigError

UNMASKED = "djinn_fused"  # an attention that never runs, because whole layers are replaced
WIDEST = 8192  # elements of a vector that one program can hold
Forward = Callable[..., torch.Tensor]
# Arguments of `attend`: queries, keys, values, scale, mask, position.
AttendArguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None, torch.Tensor
]

_ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "NewGELUActivation": GELU_TANH,
                "GELUTanh": GELU_TANH}  # fmt: skip
_FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn"}  # others also depend on the length
_RMS_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"}


class FusedUnits:
    """Hand-written replacements for all units of a model, for steps of one token.

    Args:
        model: the model of the units.
        units: decoder layers, the norm after them and the head.
        cache: the model's `past_key_values`.

    Raises:
        ConfigError: a unit is of another kind; the message says which.
    """

    def __init__(self, model: PreTrainedModel, units: Sequence[Unit], cache: KvCache) -> None:
        self._model = model
        modules = [model.get_submodule(unit.module) for unit in units]
        layers = [module for module in modules if type(module).__name__ in _LAYERS]
        rest = [m for m in modules if m not in layers and not isinstance(m, nn.Embedding)]
        if not layers or len(rest) != 2 or rest[1] is not model.get_output_embeddings():
            raise ConfigError(
                f"expected decoder layers out of {sorted(_LAYERS)}, a norm and a head, got "
                f"{sorted({type(module).__name__ for module in modules})}"
            )
        self._replacements: list[tuple[nn.Module, Callable[..., Any]]] = [
            (layer, _LAYERS[type(layer).__name__](layer, cache)) for layer in layers
        ]
        # The head computes the final norm too, so the norm passes its input through.
        norm, head = rest
        self._replacements += [(norm, lambda x: x), (head, _head(norm, head))]
        self._replacements += _rotations(model, cache.kv_layers[0].max_cache_len)
        self._attention = _attention_for(model, cache.kv_layers[0].max_cache_len)

    def in_place(self) -> AbstractContextManager[None]:
        """Replace the units in the model during a block."""
        return replaced_forwards(self._model, self._replacements, self._attention)


def _rotations(
    model: PreTrainedModel, capacity: int
) -> list[tuple[nn.Module, Callable[..., tuple[torch.Tensor, torch.Tensor]]]]:
    """Return a replacement that looks up cosines and sines computed once.

    The list is empty if they depend on more than the position.
    """
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in _FIXED_ROTATIONS:
        return []
    positions = torch.arange(capacity, device=model.device)[None]
    with torch.no_grad():
        tables = rotary(torch.empty(1, dtype=model.dtype, device=model.device), positions)
    return [(rotary, lambda *given, **named: tables)]


def _attention_for(model: PreTrainedModel, capacity: int) -> str:
    """Return the attention to set; one without a mask if all tokens are visible."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return NAME if window is not None and window < capacity else UNMASKED


def _head(norm: nn.Module, head: nn.Module) -> Forward:
    of_norm, product = _norm(norm), _product(head)
    return lambda x: multiply(x, product, of_norm).view(1, 1, -1)


def _sequential(layer: Any, cache: KvCache) -> Forward:
    """Build attention and a gated network, each after a norm, with a residual."""
    inputs, after = _attention_inputs(layer, cache), _norm(layer.post_attention_layernorm)
    out, mlp = _product(layer.self_attn.o_proj), layer.mlp
    up, gate, down = (_product(p) for p in (mlp.up_proj, mlp.gate_proj, mlp.down_proj))
    activation = _activation(mlp.act_fn)
    if any(product.bias is not None for product in (up, gate, down)):
        raise ConfigError("expected a gated network without biases")

    def forward(hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        attended = attend(*inputs(hidden_states, **given))
        x = multiply(attended, out, residual=hidden_states)
        inner = multiply(x, up, after, gate=gate, activation=activation)
        return multiply(inner, down, residual=x).view_as(hidden_states)

    return forward


def _parallel(layer: Any, cache: KvCache) -> Forward:
    """Build attention and a network in parallel, with one norm and one residual."""
    inputs, norm = _attention_inputs(layer, cache), _norm(layer.input_layernorm)
    out, mlp = _product(layer.self_attn.dense), layer.mlp
    up, down = _product(mlp.fc1), _product(mlp.fc2)
    activation = _activation(mlp.activation_fn)
    if layer.self_attn.qk_layernorm:
        raise ConfigError("expected queries and keys without a norm")
    if {out.bias is None, down.bias is None} == {True, False}:
        raise ConfigError("expected a bias in both of the last products or in none")

    def forward(hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        attended, inner = attend_and_multiply(
            *inputs(hidden_states, **given), hidden_states, up, norm, activation
        )
        y = multiply(inner, down, other=(attended, out), residual=hidden_states)
        return y.view_as(hidden_states)

    return forward


_LAYERS: dict[str, Callable[[Any, KvCache], Forward]] = {
    "LlamaDecoderLayer": _sequential,
    "MistralDecoderLayer": _sequential,
    "Qwen2DecoderLayer": _sequential,
    "PhiDecoderLayer": _parallel,
}


def _attention_inputs(layer: Any, cache: KvCache) -> Callable[..., AttendArguments]:
    """Build the part up to `attend`: store keys and values, return its arguments."""
    norm, own = _norm(layer.input_layernorm), layer.self_attn
    query, key, value = (_product(p) for p in (own.q_proj, own.k_proj, own.v_proj))
    if len({product.bias is None for product in (query, key, value)}) == 2:
        raise ConfigError("expected a bias in all of queries, keys and values or in none")
    kept, scale = cache.kv_layers[own.layer_idx], float(own.scaling)

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> AttendArguments:
        mask = attention_mask
        fits = mask is None or (mask.dtype == torch.bool and mask.is_contiguous())
        if (
            past_key_values is not cache
            or hidden_states.shape[:2] != (1, 1)
            or position_embeddings is None
            or not fits
        ):
            raise ConfigError("expected one token, a bool mask or none, and the cache of the model")
        assert kept.keys is not None and kept.values is not None
        cos, sin = position_embeddings
        queries = project(
            hidden_states, norm, query, key, value, cos, sin, kept.position, kept.keys, kept.values
        )
        return queries, kept.keys, kept.values, scale, mask, kept.position

    return forward


def _norm(module: Any) -> Norm:
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if weight is None or weight.dim() != 1 or weight.numel() > WIDEST:
        raise ConfigError(f"expected a norm of at most {WIDEST} weights, got {module}")
    if name in _RMS_NORMS:
        return Norm(RMS_NORM, weight.detach(), None, float(module.variance_epsilon))
    if type(module) is nn.LayerNorm and module.bias is not None:
        return Norm(LAYER_NORM, weight.detach(), module.bias.detach(), float(module.eps))
    raise ConfigError(f"expected a layer norm with a bias or a root mean square norm, got {name}")


def _product(module: Any) -> Product:
    if type(module) is not nn.Linear or not module.weight.is_contiguous():
        raise ConfigError(f"expected a linear layer, got {type(module).__name__}")
    bias = None if module.bias is None else module.bias.detach()
    return Product(module.weight.detach(), bias)


def _never(*_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    raise ConfigError("expected fused layers, got one that calls its attention function")


def _activation(module: nn.Module) -> int:
    name = type(module).__name__
    if name not in _ACTIVATIONS:
        raise ConfigError(f"expected an activation out of {sorted(_ACTIVATIONS)}, got {name}")
    return _ACTIVATIONS[name]


# Registered as an attention but not as one with a mask, so that the model makes no mask.
AttentionInterface.register(UNMASKED, _never)
