"""Launch the Triton kernels of a decode step of batch size 1, one per function.

Vector arguments may have any shape with the right number of elements. Results are 1-d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from djinn_lib.engine.decode.kernels import triton_kernels as decode_kernels

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
NO_ACTIVATION, SILU, GELU_TANH = 0, 1, 2
# Rows of a matrix per program, warps per program, and columns per iteration; positions per
# iteration of attention, and its warps. Of ten settings timed on an H100 with the shapes of
# Llama-7B, Mistral-7B and Phi-2, these are the best for all three: enough loads in flight, and
# enough programs per multiprocessor.
ROWS, WARPS, COLUMNS = 2, 4, 4096
POSITIONS, ATTENTION_WARPS = 256, 8
# Positions per iteration when attention shares a launch with a product, and the bytes of weights
# below which a program projects two pairs of rows. Chosen by the compiler's register counts and by
# the bytes that a program requests.
SHARED_POSITIONS, PROJECTED_BYTES = 64, 16 << 10
_kernels: Any = decode_kernels


@dataclass(frozen=True)
class Norm:
    """A norm: its kind, weight (width,), bias (width,) or None, and epsilon."""

    kind: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Product:
    """y = weight @ x + bias: contiguous (rows, width), and (rows,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def project(
    x: torch.Tensor,
    norm: Norm,
    query: Product,
    key: Product,
    value: Product,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Return the rotated queries of a normed vector, and store its keys and values.

    Args:
        x: (1, 1, width).
        norm: of x.
        query, key, value: the projections; all have a bias, or none has.
        cos, sin: (1, 1, rotated) for this position, or (1, capacity, rotated) for every position.
            The first `rotated` elements of each head are rotated; element i pairs with element
            i + rotated / 2.
        position: (1,), int64, of the token.
        keys, values: (1, key heads, capacity, head size), contiguous; written to at the position.

    Returns:
        (heads * head size,).
    """
    _, n_key_heads, capacity, head_size = keys.shape
    n_rows, width = query.weight.shape
    n_heads, half = n_rows // head_size, head_size // 2
    pairs = 2 if half % 2 == 0 and 2 * width * x.element_size() < PROJECTED_BYTES else 1
    queries = torch.empty(n_rows, dtype=x.dtype, device=x.device)
    _kernels.project_kernel[((n_heads + 2 * n_key_heads) * half // pairs,)](
        x, norm.weight, _or(norm.bias, x), norm.epsilon,
        query.weight, key.weight, value.weight,
        _or(query.bias, x), _or(key.bias, x), _or(value.bias, x),
        cos, sin, position, queries, keys, values,
        n_heads, n_key_heads, cos.shape[-1], capacity, width, head_size,
        NORM=norm.kind, HAS_BIAS=query.bias is not None, HAS_TABLES=cos.shape[1] > 1,
        PAIRS=pairs, BLOCK=triton.next_power_of_2(width), **_launch(x, WARPS),
    )  # fmt: skip
    return queries


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(query @ keys.T * scale) @ values over some positions.

    Args:
        query: (heads * head size,).
        keys, values: (1, key heads, capacity, head size), contiguous.
        scale: of the scores.
        mask: (1, 1, 1, capacity), bool, contiguous: the positions to attend to, at least one.
        last: (1,), int64: without a mask, the last position to attend to.

    Returns:
        (heads * head size,).
    """
    _, n_key_heads, length, head_size = keys.shape
    n_heads = query.numel() // head_size
    out = torch.empty_like(query)
    _kernels.attend_kernel[(n_heads,)](
        query, keys, values, _or(mask, query), _or(last, query), out, scale, length, head_size,
        HAS_MASK=mask is not None,
        GROUP=n_heads // n_key_heads, BLOCK=POSITIONS, WIDTH=triton.next_power_of_2(head_size),
        **_launch(query, ATTENTION_WARPS),
    )  # fmt: skip
    return out


def attend_and_multiply(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    last: torch.Tensor,
    x: torch.Tensor,
    product: Product,
    norm: Norm,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `attend` and activation(product(norm(x))) in one launch.

    Args:
        query, keys, values, scale, mask, last: see `attend`.
        x, product, norm, activation: see `multiply`.

    Returns:
        (heads * head size,) and (rows,).
    """
    _, n_key_heads, length, head_size = keys.shape
    n_heads = query.numel() // head_size
    n_rows, width = product.weight.shape
    attended = torch.empty_like(query)
    out = torch.empty(n_rows, dtype=x.dtype, device=x.device)
    _kernels.attend_and_multiply_kernel[(n_heads + triton.cdiv(n_rows, 2 * ROWS),)](
        query, keys, values, _or(mask, query), last, attended, scale, length, head_size, n_heads,
        x, norm.weight, _or(norm.bias, x), norm.epsilon,
        product.weight, _or(product.bias, x), out, n_rows, width,
        HAS_MASK=mask is not None, GROUP=n_heads // n_key_heads, POSITIONS=SHARED_POSITIONS,
        WIDTH=triton.next_power_of_2(head_size),
        NORM=norm.kind, ACTIVATION=activation, HAS_BIAS=product.bias is not None,
        ROWS=2 * ROWS, BLOCK=triton.next_power_of_2(width), **_launch(x, WARPS),
    )  # fmt: skip
    return attended, out


def multiply(
    x: torch.Tensor,
    product: Product,
    norm: Norm | None = None,
    gate: Product | None = None,
    activation: int = NO_ACTIVATION,
    other: tuple[torch.Tensor, Product] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return activation(product(norm(x))) + other product(other x) + residual.

    Args:
        x: a vector of the product's width.
        product: has a bias if and only if that of `other` has one.
        norm: of x, if any.
        gate: a product of the same shape, without bias. The result is then
            product(norm(x)) * activation(gate(norm(x))).
        activation: one of the constants above.
        other: another vector, and the product of it to add.
        residual: a vector to add.

    Returns:
        (rows,).
    """
    n_rows, width = product.weight.shape
    other_x, summand = other or (x, product)
    block = triton.next_power_of_2(width)
    rows = 2 * ROWS if norm and not gate else ROWS  # more rows amortise the norm of a program
    out = torch.empty(n_rows, dtype=x.dtype, device=x.device)
    _kernels.multiply_kernel[(triton.cdiv(n_rows, rows),)](
        x, norm.weight if norm else x, _or(norm.bias if norm else None, x),
        norm.epsilon if norm else 0.0, product.weight, gate.weight if gate else x,
        _or(product.bias, x), other_x, summand.weight, _or(summand.bias, x),
        _or(residual, x), out, n_rows, width, summand.weight.shape[1],
        NORM=norm.kind if norm else NO_NORM, ACTIVATION=activation, HAS_GATE=gate is not None,
        HAS_BIAS=product.bias is not None, HAS_OTHER=other is not None,
        HAS_RESIDUAL=residual is not None, ROWS=rows,
        BLOCK=block if norm else min(block, COLUMNS), **_launch(x, WARPS),
    )  # fmt: skip
    return out


def _or(tensor: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """Return a valid pointer for an absent tensor, which the kernel does not read."""
    return instead if tensor is None else tensor


def _launch(x: torch.Tensor, n_warps: int) -> dict[str, Any]:
    """Return launch options for the device of `x`."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"num_warps": n_warps, "PDL": True, "launch_pdl": True}
    return {"num_warps": n_warps, "PDL": False}
