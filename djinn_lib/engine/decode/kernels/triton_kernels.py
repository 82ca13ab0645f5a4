"""Triton kernels of a decode step of batch size 1.

Such a step reads every weight once, so memory bandwidth bounds it, and any time without weight
loads in flight is lost. Three choices follow:

- There are only five or three kernels per layer. The kernel of a product also computes what comes
  before and after it (norm, bias, rotation, activation, residual).
- Each program recomputes the norm of its input vector, which is in its cache anyway.
- Each kernel issues its weight loads before it waits for the previous kernel (programmatic
  dependent launch, where the GPU has it). This closes the gap between the two kernels.

Sums use single precision. Values are rounded where transformers rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(at, there):
    """Load weights; evict them from the cache first, because they are read only once."""
    return tl.load(at, mask=there, other=0.0, eviction_policy="evict_first")


@triton.jit
def _normed(x, inside, weight, bias, column, width, epsilon, KIND: tl.constexpr):
    """Normalise a vector that one program holds entirely."""
    if KIND == 0:
        return x.to(tl.float32)
    values = x.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if KIND == 1:
        values = values / tl.sqrt(tl.sum(values * values, axis=0) / width + epsilon)
        return (scale * values.to(x.dtype)).to(tl.float32)
    else:
        values = tl.where(inside, values - tl.sum(values, axis=0) / width, 0.0)
        values = values / tl.sqrt(tl.sum(values * values, axis=0) / width + epsilon)
        values = values * scale.to(tl.float32)
        values += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        return values.to(x.dtype).to(tl.float32)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """Apply an activation and round to the precision of `x`."""
    values = x.to(tl.float32)
    if KIND == 1:
        values = values / (1.0 + tl.exp(-values))
    if KIND == 2:
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        values = values * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    return values.to(x.dtype)


@triton.jit
def project_kernel(
    x, norm_weight, norm_bias, epsilon,
    query_matrix, key_matrix, value_matrix, query_bias, key_bias, value_bias,
    cos, sin, position, queries, keys, values,
    n_heads, n_key_heads, n_rotated, capacity, width: tl.constexpr, head_size: tl.constexpr,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TABLES: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute queries, and store keys and values at the position.

    A program has pairs of rows of one head. The two rows of a pair are rotated together.
    """
    # Which projection, which head and which rows: programs are ordered queries, keys, values.
    half, program = head_size // 2, tl.program_id(0) * PAIRS
    is_query = program < n_heads * half
    is_value = program >= (n_heads + n_key_heads) * half
    matrix, bias = key_matrix, key_bias
    if is_query:
        matrix, bias = query_matrix, query_bias
    if is_value:
        matrix, bias = value_matrix, value_bias
    pair = program % half + tl.arange(0, PAIRS)
    head = program // half  # counted over queries, keys and values; next, within its kind
    head -= tl.where(is_query, 0, tl.where(is_value, n_heads + n_key_heads, n_heads))
    # Rotated rows pair up across the halves; values and the rest of a head pair with neighbours.
    rotates = (pair < n_rotated // 2) & (program < (n_heads + n_key_heads) * half)
    first = tl.where(rotates, pair, 2 * pair)
    second = tl.where(rotates, pair + n_rotated // 2, 2 * pair + 1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = (head * head_size).to(tl.int64)
    # The compiler cannot know which of three matrices this is, nor that all allow wide loads.
    at = tl.multiple_of(matrix, 16) + row * width + column[None, :]
    there = (pair < half)[:, None] & inside[None, :]  # equals `inside`, in two dimensions
    a = _weights(at + first[:, None] * width, there)
    b = _weights(at + second[:, None] * width, there)
    # Weights do not depend on the previous kernel, but everything below does: wait only now.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    now = tl.load(position)
    if HAS_TABLES:
        cos += now * n_rotated
        sin += now * n_rotated
    vector = tl.load(x + column, mask=inside, other=0.0)
    normed = _normed(vector, inside, norm_weight, norm_bias, column, width, epsilon, NORM)
    sum_a = tl.sum(a.to(tl.float32) * normed[None, :], axis=1)
    sum_b = tl.sum(b.to(tl.float32) * normed[None, :], axis=1)
    if HAS_BIAS:
        sum_a += tl.load(bias + row + first).to(tl.float32)
        sum_b += tl.load(bias + row + second).to(tl.float32)
    # Round before rotating, as transformers does. Unrotated rows have cos 1 and sin 0.
    y_a, y_b = sum_a.to(vector.dtype), sum_b.to(vector.dtype)
    out_a = y_a * tl.load(cos + first, mask=rotates, other=1.0)
    out_a -= y_b * tl.load(sin + first, mask=rotates, other=0.0)
    out_b = y_b * tl.load(cos + second, mask=rotates, other=1.0)
    out_b += y_a * tl.load(sin + second, mask=rotates, other=0.0)
    if is_query:
        tl.store(queries + row + first, out_a)
        tl.store(queries + row + second, out_b)
    else:
        place = (head.to(tl.int64) * capacity + now) * head_size
        if is_value:
            tl.store(values + place + first, out_a)
            tl.store(values + place + second, out_b)
        else:
            tl.store(keys + place + first, out_a)
            tl.store(keys + place + second, out_b)


@triton.jit
def attend_kernel(
    query, keys, values, mask, last, out, scale, length, head_size, HAS_MASK: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute attention with one program per query head and an online softmax.

    The mask is read first, and a block of positions that is masked out is not read. Without a mask,
    all positions up to the last one are attended to.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < head_size
    q = tl.load(query + head * head_size + column, mask=inside, other=0.0).to(tl.float32) * scale
    base = (head // GROUP) * length * head_size
    maximum = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.zeros([WIDTH], dtype=tl.float32)
    end = length
    if not HAS_MASK:
        end = tl.load(last).to(tl.int32) + 1
    for begin in range(0, end, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        visible = position < end
        if HAS_MASK:
            visible = tl.load(mask + position, mask=visible, other=0) != 0
        if tl.max(visible.to(tl.int32), axis=0) > 0:
            at = base + position[:, None] * head_size + column[None, :]
            wanted = visible[:, None] & inside[None, :]
            k = tl.load(keys + at, mask=wanted, other=0.0).to(tl.float32)
            v = tl.load(values + at, mask=wanted, other=0.0).to(tl.float32)
            score = tl.where(visible, tl.sum(q[None, :] * k, axis=1), -float("inf"))
            # Online softmax: rescale the running sums to the new maximum.
            new_maximum = tl.maximum(maximum, tl.max(score, axis=0))
            rescale = tl.exp(maximum - new_maximum)
            weight = tl.exp(score - new_maximum)
            total = total * rescale + tl.sum(weight, axis=0)
            weighted = weighted * rescale + tl.sum(weight[:, None] * v, axis=0)
            maximum = new_maximum
    result = (weighted / total).to(out.dtype.element_ty)
    tl.store(out + head * head_size + column, result, mask=inside)


@triton.jit
def multiply_kernel(
    x, norm_weight, norm_bias, epsilon, matrix, gate, bias,
    other_x, other_matrix, other_bias, residual, out, n_rows,
    width: tl.constexpr, other_width: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OTHER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, BEFORE: tl.constexpr = 0,
):  # fmt: skip
    """Compute rows of a product and what follows it, in programs from `BEFORE` on."""
    row = (tl.program_id(0) - BEFORE) * ROWS + tl.arange(0, ROWS)
    there = row < n_rows
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    # Request the weights before waiting for the previous kernel, which computes the vector.
    w = _weights(matrix + at, there[:, None] & inside[None, :])
    if HAS_GATE:
        g = _weights(gate + at, there[:, None] & inside[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    vector = tl.load(x + column, mask=inside, other=0.0)
    normed = _normed(vector, inside, norm_weight, norm_bias, column, width, epsilon, NORM)
    total = w.to(tl.float32) * normed[None, :]
    if HAS_GATE:
        gated = g.to(tl.float32) * normed[None, :]
    for begin in tl.static_range(BLOCK, width, BLOCK):  # empty with a norm, which needs all of x
        inside = column < width - begin
        w = _weights(matrix + at + begin, there[:, None] & inside[None, :])
        v = tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * v[None, :]
        if HAS_GATE:
            g = _weights(gate + at + begin, there[:, None] & inside[None, :])
            gated += g.to(tl.float32) * v[None, :]
    summed = tl.sum(total, axis=1)
    if HAS_BIAS:
        summed += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    y = summed.to(vector.dtype)
    if HAS_GATE:
        y = y * _activated(tl.sum(gated, axis=1).to(vector.dtype), ACTIVATION)
    else:
        y = _activated(y, ACTIVATION)
    if HAS_OTHER:
        other = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        other_at = row.to(tl.int64)[:, None] * other_width + column[None, :]
        for begin in tl.static_range(0, other_width, BLOCK):
            inside = column < other_width - begin
            w = _weights(other_matrix + other_at + begin, there[:, None] & inside[None, :])
            v = tl.load(other_x + begin + column, mask=inside, other=0.0).to(tl.float32)
            other += w.to(tl.float32) * v[None, :]
        other_sum = tl.sum(other, axis=1)
        if HAS_BIAS:
            other_sum += tl.load(other_bias + row, mask=there, other=0.0).to(tl.float32)
        y += other_sum.to(vector.dtype)
    if HAS_RESIDUAL:
        y += tl.load(residual + row, mask=there, other=0.0)
    tl.store(out + row, y, mask=there)


@triton.jit
def attend_and_multiply_kernel(
    query, keys, values, mask, last, attended, scale, length, head_size, n_heads: tl.constexpr,
    x, norm_weight, norm_bias, epsilon, matrix, bias, out, n_rows, width: tl.constexpr,
    HAS_MASK: tl.constexpr, GROUP: tl.constexpr, POSITIONS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Run attention and an independent product in one launch: their loads overlap."""
    if tl.program_id(0) < n_heads:
        attend_kernel(
            query, keys, values, mask, last, attended, scale, length, head_size, HAS_MASK,
            GROUP, POSITIONS, WIDTH, PDL,
        )  # fmt: skip
    else:
        multiply_kernel(
            x, norm_weight, norm_bias, epsilon, matrix, x, bias,
            x, matrix, bias, x, out, n_rows, width, width,
            NORM, ACTIVATION, False, HAS_BIAS, False, False, ROWS, BLOCK, PDL, n_heads,
        )  # fmt: skip
