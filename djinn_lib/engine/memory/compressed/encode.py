"""Encode a page on the CPU; `form` describes the compressed bytes.

Symbols are counted first. So it is known how many codes each level has and where every section
begins, and a second pass writes them all. It takes a block of words at a time, which stays in the
cache, in loops without branches that depend on the weights: those would be mispredicted.
"""

from __future__ import annotations

import numpy as np
from numba import uint8, uint16, uint32
from numpy.typing import NDArray

from djinn_lib.engine.memory.compressed.compiled import compiled
from djinn_lib.engine.memory.compressed.form import (
    BLOCK_WORDS,
    N_RANKED,
    RANKED_BYTES,
    TILE_WORDS,
    Form,
)

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]

# Instead of the count of a symbol that has its rank. Counts are less, because pages are smaller.
_TAKEN = np.uint32(0xFFFFFFFF)


def encode(words: Words, exponent_bits: int) -> tuple[Bytes, Form]:
    """Compress the words of a page.

    Args:
        words: 1-d, of at least one word.
        exponent_bits: see `EXPONENT_BITS`.

    Returns:
        The compressed bytes and their form. They can be larger than the page.
    """
    ranked = np.zeros((-(-len(words) // TILE_WORDS), RANKED_BYTES), np.uint8)
    n_codes = np.zeros(3, np.int64)
    _rank(words, exponent_bits, ranked, n_codes)
    form = Form(exponent_bits, len(words), *n_codes.tolist())
    compressed, at = np.zeros(form.n_bytes, np.uint8), form.sections
    compressed[at.ranks] = ranked.ravel()
    starts = compressed[at.starts].view(np.int32).reshape(-1, 3)
    _write(words, exponent_bits, ranked, starts, *(compressed[section] for section in at[2:]))
    return compressed, form


@compiled
def _rank(words, exponent_bits, ranked, n_codes):
    """Rank the symbols of each tile, most frequent first, and count the codes of later levels."""
    shift, mask = uint16(15 - exponent_bits), uint16((1 << exponent_bits) - 1)
    # In turns, because equal symbols follow each other and a count waits for the one before.
    counts = np.empty((4, 256), np.uint32)
    for tile in range(len(ranked)):
        part = words[tile * TILE_WORDS : (tile + 1) * TILE_WORDS]
        counts[:] = 0
        whole = len(part) // 4 * 4
        for i in range(0, whole, 4):
            counts[0, (part[i] >> shift) & mask] += uint32(1)
            counts[1, (part[i + 1] >> shift) & mask] += uint32(1)
            counts[2, (part[i + 2] >> shift) & mask] += uint32(1)
            counts[3, (part[i + 3] >> shift) & mask] += uint32(1)
        for i in range(whole, len(part)):
            counts[0, (part[i] >> shift) & mask] += uint32(1)
        total = counts[0]
        for symbol in range(256):
            total[symbol] += counts[1, symbol] + counts[2, symbol] + counts[3, symbol]
        n_left = len(part)
        for rank in range(N_RANKED):
            best = -1
            for symbol in range(256):
                if total[symbol] != _TAKEN and (best < 0 or total[symbol] > total[best]):
                    best = symbol
            ranked[tile, rank] = best
            n_left -= total[best]
            total[best] = _TAKEN
            if rank % 3 == 2:
                n_codes[rank // 3] += n_left


@compiled
def _write(words, exponent_bits, ranked, starts, low, pairs, singles, first, second, third, last):
    """Write all sections, which are zeros so far, except for the ranks."""
    ranks = np.empty(256, np.uint8)  # of each symbol of the tile
    codes = np.empty(BLOCK_WORDS, np.uint8)
    escaped = np.empty(BLOCK_WORDS + 1, np.uint8)  # symbols; one more is written than is kept
    n_second = n_third = n_last = 0
    for block in range(len(starts)):
        begin = block * BLOCK_WORDS
        tile = begin // TILE_WORDS
        if begin % TILE_WORDS == 0:
            ranks[:] = N_RANKED
            for rank in range(N_RANKED):
                ranks[ranked[tile, rank]] = rank
        starts[block, 0], starts[block, 1], starts[block, 2] = n_second, n_third, n_last
        part = words[begin : begin + BLOCK_WORDS]
        n_words = len(part)
        if n_words < BLOCK_WORDS:  # the rest is filled with words that have no later codes
            part = np.empty(BLOCK_WORDS, np.uint16)
            part[:] = uint16(ranked[tile, 0]) << uint16(15 - exponent_bits)
            _fill(part, 0, words[begin:], n_words)
        _fill(low, begin, _low_bytes(part), n_words)
        if exponent_bits < 8:
            of_pairs, of_singles = _pairs_and_singles(part)
            _fill(pairs, begin // 4, of_pairs, (n_words + 3) // 4)
            _fill(singles, begin // 8, of_singles, (n_words + 7) // 8)
        of_first, n = _first_codes(part, exponent_bits, ranks, escaped)
        _fill(first, begin // 4, of_first, (n_words + 3) // 4)
        n_deeper = 0
        for k in range(n):
            symbol = escaped[k]
            rank = uint8(ranks[symbol] - 3)
            codes[k] = min(rank, uint8(3))
            escaped[n_deeper] = symbol
            n_deeper += rank >= 3
        n_second = _append(codes[:n], second, n_second)
        for k in range(n_deeper):
            symbol = escaped[k]
            rank = uint8(ranks[symbol] - 6)
            codes[k] = min(rank, uint8(3))
            if rank >= 3:
                last[n_last] = symbol
                n_last += 1
        n_third = _append(codes[:n_deeper], third, n_third)


@compiled
def _fill(section, begin, content, n_bytes):
    """Copy bytes. A loop, because numba takes two seconds to compile an assignment of slices."""
    for i in range(n_bytes):
        section[begin + i] = content[i]


@compiled
def _low_bytes(words):
    low = np.empty(BLOCK_WORDS, np.uint8)
    for i in range(BLOCK_WORDS):
        low[i] = uint8((words[i] << 1) | (words[i] >> 15))
    return low


@compiled
def _pairs_and_singles(words):
    """Return bits 8 and 9, and bit 10, of the rotated words, packed."""
    pairs, singles = np.empty(BLOCK_WORDS // 4, np.uint8), np.empty(BLOCK_WORDS // 8, np.uint8)
    for row in range(BLOCK_WORDS // 8):
        pair = single = uint32(0)
        for k in range(8):
            high = uint32(words[8 * row + k]) >> uint32(7)
            pair |= (high & uint32(3)) << uint32(2 * k)
            single |= ((high >> uint32(2)) & uint32(1)) << uint32(k)
        pairs[2 * row], pairs[2 * row + 1] = uint8(pair), uint8(pair >> uint32(8))
        singles[row] = uint8(single)
    return pairs, singles


@compiled
def _first_codes(words, exponent_bits, ranks, escaped):
    """Return the codes of the first level, and how many symbols were put into `escaped`."""
    first, n_escaped = np.empty(BLOCK_WORDS // 4, np.uint8), 0
    for byte in range(BLOCK_WORDS // 4):
        codes = uint32(0)
        for k in range(4):
            symbol = uint8(uint16(words[4 * byte + k] << uint16(1)) >> uint16(16 - exponent_bits))
            rank = ranks[symbol]
            codes |= uint32(min(rank, uint8(3))) << uint32(2 * k)
            escaped[n_escaped] = symbol
            n_escaped += rank >= 3
        first[byte] = uint8(codes)
    return first, n_escaped


@compiled
def _append(codes, section, n_codes):
    """Put 2-bit codes behind the `n_codes` of a section; return how many it has then."""
    k = 0
    while k < len(codes):
        if n_codes % 4 == 0 and k + 4 <= len(codes):
            four = codes[k] | (codes[k + 1] << 2) | (codes[k + 2] << 4) | (codes[k + 3] << 6)
            section[n_codes // 4] = uint8(four)
            k, n_codes = k + 4, n_codes + 4
        else:
            section[n_codes // 4] |= uint8(codes[k] << (2 * (n_codes % 4)))
            k, n_codes = k + 1, n_codes + 1
    return n_codes
