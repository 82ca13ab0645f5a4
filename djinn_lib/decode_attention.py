"""Attention of one new token over a KV cache of which only a part is filled.

The library kernels read the whole capacity of a cache, filled or not: on an H100 a step of llama-7b
takes 0.4 ms longer with room for 512 tokens than with room for 192. This one looks at the mask
first and skips what nobody may attend to, so that capacity costs memory and no time. It is offered
to transformers as one more attention implementation (see `AttentionInterface` there).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from djinn_lib.errors import ConfigError

NAME = "djinn_decode"
BLOCK, N_WARPS = 64, 8  # positions at a time, and who loads them
# What implementations are told besides, and what the mask says already.
_HARMLESS = {"sliding_window", "is_causal", "position_ids", "use_cache", "cache_position"}


@triton.jit
def _attend(
    query, keys, values, mask, out, scale, length, head_size,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a query head: a softmax over blocks of positions, kept up to date as it goes."""
    head = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < head_size
    q = tl.load(query + head * head_size + column, mask=inside, other=0.0).to(tl.float32) * scale
    base = (head // GROUP) * length * head_size
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([WIDTH], dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        seen = tl.load(mask + position, mask=position < length, other=0) != 0
        if tl.max(seen.to(tl.int32), axis=0) > 0:
            at = base + position[:, None] * head_size + column[None, :]
            wanted = seen[:, None] & inside[None, :]
            k = tl.load(keys + at, mask=wanted, other=0.0).to(tl.float32)
            v = tl.load(values + at, mask=wanted, other=0.0).to(tl.float32)
            score = tl.where(seen, tl.sum(q[None, :] * k, axis=1), -float("inf"))
            new_top = tl.maximum(top, tl.max(score, axis=0))
            shrink = tl.exp(top - new_top)
            weight = tl.exp(score - new_top)
            total = total * shrink + tl.sum(weight, axis=0)
            mixed = mixed * shrink + tl.sum(weight[:, None] * v, axis=0)
            top = new_top
    result = (mixed / total).to(out.dtype.element_ty)
    tl.store(out + head * head_size + column, result, mask=inside)


@triton_op("djinn::attend_to_cache", mutates_args={})
def attend_to_cache(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return softmax(query @ keys.T * scale) @ values over the positions that the mask allows.

    Args:
        query: (1, heads, 1, head size).
        keys, values: (1, key heads, capacity, head size), contiguous.
        mask: (1, 1, 1, capacity), bool; at least one position is True.
        scale: of the scores.

    Returns:
        (1, heads, 1, head size), in the dtype of the query.
    """
    _, n_heads, _, head_size = query.shape
    n_key_heads, length = keys.shape[1], keys.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    width = triton.next_power_of_2(head_size)
    wrap_triton(_attend)[(n_heads,)](
        query.contiguous(), keys, values, mask.contiguous(), out, scale, length, head_size,
        GROUP=n_heads // n_key_heads, BLOCK=BLOCK, WIDTH=width, num_warps=N_WARPS,
    )  # fmt: skip
    return out


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in a layer; shapes as above.

    Raises:
        ConfigError: the architecture asks for more than a softmax under a mask.
    """
    nothing = (None, False)  # by identity: a tensor has no truth value
    more = [
        name
        for name, given in kwargs.items()
        if name not in _HARMLESS and not any(given is value for value in nothing)
    ]
    fits = query.shape[0] == query.shape[2] == 1 and key.shape[-1] == value.shape[-1]
    if more or dropout or attention_mask is None or attention_mask.dtype != torch.bool or not fits:
        raise ConfigError(
            f"expected attention of one token under a bool mask, got also {more or 'other shapes'}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend_to_cache(query, key.contiguous(), value.contiguous(), attention_mask, scale)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
