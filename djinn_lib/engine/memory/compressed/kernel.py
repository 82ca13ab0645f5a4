"""Decoding a page on a GPU, in Triton; see `form` for what the compressed bytes are.

One program a block of words. Each of its words looks its symbol up by itself, so there is nothing
to wait for but three sums over the block. Only later levels are read at places that depend on what
was read before, and those places are checked: damaged bytes give wrong words, and never a fault of
the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from djinn_lib.engine.memory.compressed.form import BLOCK_WORDS, TILE_BLOCKS, Form

N_WARPS = 8


@triton.jit
def _pair(section, i, there):
    """Number `i` of 2-bit numbers, four a byte; 0 where there is none."""
    return (tl.load(section + (i >> 2), mask=there, other=0).to(tl.int32) >> ((i & 3) * 2)) & 3


@triton.jit
def _place(begin, escaped, n_codes):
    """Where the codes of escapes lie in their level, and whether that is inside of it."""
    counted = escaped.to(tl.int32)
    place = begin + tl.cumsum(counted, 0) - counted
    return place, escaped & (place >= 0) & (place < n_codes)


# Numbers differ from page to page, and must not make a new kernel of each.
@triton.jit(do_not_specialize=["n_words", "n_second", "n_third", "n_last"])
def decode_kernel(
    starts, ranks, low, pairs, singles, first, second, third, last, words,
    n_words, n_second, n_third, n_last,
    EXPONENT_BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the words of one block."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_words
    # The rank of each word: a code of the first level, and of later ones where it is an escape.
    rank = _pair(first, i, inside)
    place, there = _place(tl.load(starts + 3 * block), inside & (rank == 3), n_second)
    rank += _pair(second, place, there)
    place, there = _place(tl.load(starts + 3 * block + 1), there & (rank == 6), n_third)
    rank += _pair(third, place, there)
    place, there = _place(tl.load(starts + 3 * block + 2), there & (rank == 9), n_last)
    symbol = tl.load(ranks + block // TILE * 16 + rank, mask=inside, other=0).to(tl.int32)
    symbol = tl.where(there, tl.load(last + place, mask=there, other=0).to(tl.int32), symbol)
    # Exponent, mantissa, sign; then the sign comes first again.
    rotated = symbol << (16 - EXPONENT_BITS)
    rotated |= tl.load(low + i, mask=inside, other=0).to(tl.int32)
    if EXPONENT_BITS < 8:
        rotated |= _pair(pairs, i, inside) << 8
        single = tl.load(singles + (i >> 3), mask=inside, other=0).to(tl.int32)
        rotated |= ((single >> (i & 7)) & 1) << 10
    word = (rotated >> 1) | ((rotated & 1) << 15)
    tl.store(words + i, word.to(tl.int16), mask=inside)


def decode(compressed: torch.Tensor, form: Form, target: torch.Tensor) -> None:
    """Write the words of a page, on the current stream.

    Args:
        compressed: its compressed bytes (1-d uint8, device), aligned to 16 bytes.
        form: how they are compressed.
        target: where to (1-d uint8, device), of `form.plain_bytes`.
    """
    at = form.sections
    sections = [compressed[section] for section in at[1:]]
    kernel: Any = decode_kernel
    kernel[(form.n_blocks,)](
        compressed[at.starts].view(torch.int32), *sections, target.view(torch.int16),
        form.n_words, form.n_second, form.n_third, form.n_last,
        EXPONENT_BITS=form.exponent_bits, BLOCK=BLOCK_WORDS, TILE=TILE_BLOCKS, num_warps=N_WARPS,
    )  # fmt: skip
