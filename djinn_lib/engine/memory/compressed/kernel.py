"""Decoding a page on a GPU, in Triton; see `form` for what the compressed bytes are.

A program decodes a block of words at a time, as rows of eight words. A thread reads the low bytes
of a row at once, and writes its words at once. The codes of a row lie back to back in every level,
at most 16 bits of them, so each level is read a row at a time too; the codes of a word are found in
these bits by shifts. What is left to wait for are three sums over the rows of the block.

Later levels are read at places that depend on what was read before. Those places are checked:
damaged bytes give wrong words, and never a fault of the device. Rows may reach over the end of a
section, but not over the 16 bytes at which the next one begins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from djinn_lib.engine.memory.compressed.form import BLOCK_WORDS, TILE_BLOCKS, Form

PROGRAMS_PER_PROCESSOR = 0.5  # of the device; see `_n_programs`
N_REGISTERS = 128  # of a thread; more would keep computations off the processor
N_WARPS = 4  # a row a thread; with fewer warps registers are what limits how many run at once


@triton.jit
def _halves(section):
    """The 16-bit numbers of a section of bytes."""
    return section.to(tl.pointer_type(tl.uint16))


@triton.jit
def _escapes(codes, n_codes):
    """How many of the first 0, 1, ... codes of a row are escapes, in 4 bits each; and in total."""
    escaped = codes & (codes >> 1) & 0x5555 & ((1 << (2 * n_codes)) - 1)
    # A bit every 2 bits becomes one every 4 bits; then the product adds up all below.
    escaped = (escaped | (escaped << 8)) & 0x00FF00FF
    escaped = (escaped | (escaped << 4)) & 0x0F0F0F0F
    escaped = (escaped | (escaped << 2)) & 0x33333333
    up_to = escaped * 0x11111111
    return up_to << 4, up_to >> 28


@triton.jit
def _places(begin, counts):
    """Where the codes of each row begin in their level."""
    counts = counts.to(tl.int32)
    return begin + tl.cumsum(counts, 0) - counts


@triton.jit
def _codes(level, place, counts, n_codes):
    """The codes of each row in a later level, which may begin anywhere in 16 bits."""
    half = place >> 3
    n_halves = (n_codes + 7) >> 3
    there = (counts > 0) & (half >= 0)
    lower = tl.load(_halves(level) + half, mask=there & (half < n_halves), other=0)
    upper = tl.load(_halves(level) + half + 1, mask=there & (half < n_halves - 1), other=0)
    both = lower.to(tl.uint32) | (upper.to(tl.uint32) << 16)
    return both >> ((place & 7) * 2).to(tl.uint32)


# Numbers differ from page to page, and must not make a new kernel of each.
@triton.jit(do_not_specialize=["n_words", "n_second", "n_third", "n_last"])
def decode_kernel(
    starts, ranks, low, pairs, singles, first, second, third, last, words,
    n_words, n_second, n_third, n_last,
    EXPONENT_BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the words of every n-th block, for n programs."""
    for block in range(tl.program_id(0), tl.cdiv(n_words, BLOCK), tl.num_programs(0)):
        _decode_block(
            block, starts, ranks, low, pairs, singles, first, second, third, last, words,
            n_words, n_second, n_third, n_last, EXPONENT_BITS, BLOCK, TILE,
        )  # fmt: skip


@triton.jit
def _decode_block(
    block, starts, ranks, low, pairs, singles, first, second, third, last, words,
    n_words, n_second, n_third, n_last,
    EXPONENT_BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the words of one block."""
    # Said to be apart, rows stay one a thread in all that follows: loads of several neighbours by a
    # thread would have them exchanged through shared memory time and again.
    row = tl.max_contiguous(block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[:, None], [1, 1])
    column = tl.arange(0, 8)[None, :]
    i = row * 8 + column
    inside = row < (n_words + 7) // 8
    lowest = tl.load(low + i, mask=inside, other=0).to(tl.uint32)
    # A row of each level: its codes, and how many escapes come before each.
    first_codes = tl.load(_halves(first) + row, mask=inside, other=0).to(tl.uint32)
    before_second, n_escaped = _escapes(first_codes, tl.full((BLOCK // 8, 1), 8, tl.uint32))
    place = _places(tl.load(starts + 3 * block), n_escaped)
    second_codes = _codes(second, place, n_escaped, n_second)
    before_third, n_escaped = _escapes(second_codes, n_escaped)
    place = _places(tl.load(starts + 3 * block + 1), n_escaped)
    third_codes = _codes(third, place, n_escaped, n_third)
    before_last, n_escaped = _escapes(third_codes, n_escaped)
    place = _places(tl.load(starts + 3 * block + 2), n_escaped)
    # Each word: its codes, then its symbol, by the deepest of them.
    at = column.to(tl.uint32)
    code = (first_codes >> (at * 2)) & 3
    at = (before_second >> (at * 4)) & 15
    second_code = (second_codes >> (at * 2)) & 3
    at = (before_third >> (at * 4)) & 7
    third_code = (third_codes >> (at * 2)) & 3
    at = (before_last >> (at * 4)) & 7
    table = (ranks + block // TILE * 16).to(tl.pointer_type(tl.uint32))
    to_3, to_7, to_11 = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    symbol = to_3 >> (code * 8)
    escaped = code == 3
    symbol = tl.where(escaped, ((to_3 >> 24) | (to_7 << 8)) >> (second_code * 8), symbol)
    escaped = escaped & (second_code == 3)
    symbol = tl.where(escaped, ((to_7 >> 16) | (to_11 << 16)) >> (third_code * 8), symbol)
    escaped = escaped & (third_code == 3)
    place = place + at.to(tl.int32)
    there = escaped & (place >= 0) & (place < n_last)
    symbol = tl.where(there, tl.load(last + place, mask=there, other=0).to(tl.uint32), symbol)
    # Exponent, mantissa, sign; then the sign comes first again.
    rotated = ((symbol & 255) << (16 - EXPONENT_BITS)) | lowest
    if EXPONENT_BITS < 8:
        pair = tl.load(_halves(pairs) + row, mask=inside, other=0).to(tl.uint32)
        single = tl.load(singles + row, mask=inside, other=0).to(tl.uint32)
        column = column.to(tl.uint32)
        rotated |= ((pair >> (column * 2)) & 3) << 8
        rotated |= ((single >> column) & 1) << 10
    word = ((rotated >> 1) | ((rotated & 1) << 15)).to(tl.int16)
    # A mask that differs within a row would have words written one by one.
    if (block + 1) * BLOCK <= n_words:
        tl.store(words + i, word)
    else:
        tl.store(words + i, word, mask=i < n_words)


def _n_programs(device: torch.device) -> int:
    """Programs for a page: as few as decode faster than the link brings pages.

    The more there are, the more they slow down computations, by more than the shorter time makes up
    for. On an H100 a load beside a decoding phi-2 slows it by 9% with a program for every second
    multiprocessor, and by 14% with two for each; with one for every fourth, loads take longer.
    That is for PCIe 5; a host on a much faster link, such as NVLink-C2C, needs more programs.
    """
    if device.type != "cuda":  # the interpreter
        return 4
    n_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, int(PROGRAMS_PER_PROCESSOR * n_processors))


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
    n_programs = min(form.n_blocks, _n_programs(target.device))
    kernel[(n_programs,)](
        compressed[at.starts].view(torch.int32), *sections, target.view(torch.int16),
        form.n_words, form.n_second, form.n_third, form.n_last,
        EXPONENT_BITS=form.exponent_bits, BLOCK=BLOCK_WORDS, TILE=TILE_BLOCKS,
        num_warps=N_WARPS, maxnreg=N_REGISTERS,
    )  # fmt: skip
