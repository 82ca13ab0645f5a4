"""Attention of one new token over a partly filled KV cache.

The library kernels read the whole capacity of a cache. On an H100, a step of llama-7b takes 0.4 ms
longer with room for 512 tokens than with room for 192. This kernel reads the mask first and skips
blocks of positions that are masked out, so unused capacity costs memory but no time. It is
registered with transformers as an attention implementation (see `AttentionInterface` there).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.library import triton_op, wrap_triton
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from djinn_lib.engine.decode.kernels import triton_kernels as kernels
from djinn_lib.errors import ConfigError

NAME = "djinn_decode"
BLOCK, N_WARPS = 64, 8  # positions per block, and warps per program
# Arguments that transformers also passes, and whose effect the mask already contains.
_IN_MASK = {"sliding_window", "is_causal", "position_ids", "use_cache", "cache_position"}


@triton_op("djinn::attend_to_cache", mutates_args={})
def attend_to_cache(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return softmax(query @ keys.T * scale) @ values over the allowed positions.

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
    wrap_triton(kernels.attend_kernel)[(n_heads,)](
        query.contiguous(), keys, values, mask.contiguous(), mask, out, scale, length, head_size,
        HAS_MASK=True, GROUP=n_heads // n_key_heads, BLOCK=BLOCK, WIDTH=width, PDL=False,
        num_warps=N_WARPS,
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
    """Compute attention in a layer for transformers; shapes as in `attend_to_cache`.

    Raises:
        ConfigError: the architecture needs more than a softmax under a mask.
    """
    unset = (None, False)  # compared by identity: a tensor has no truth value
    more = [
        name
        for name, given in kwargs.items()
        if name not in _IN_MASK and not any(given is value for value in unset)
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
