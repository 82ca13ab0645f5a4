"""Decode a page on the CPU; `form` describes the compressed bytes.

A block of words is decoded at a time: all first codes, then the codes of the words that escaped
from them, level by level, then the other bits of all words. Each is a loop without branches that
depend on the weights, except for the rare last level.
"""

from __future__ import annotations

import numpy as np
from numba import uint16, uint32

from djinn_lib.engine.memory.compressed.compiled import compiled
from djinn_lib.engine.memory.compressed.encode import Bytes, Words
from djinn_lib.engine.memory.compressed.form import BLOCK_WORDS, RANKED_BYTES, TILE_WORDS, Form


def decode(compressed: Bytes, form: Form, words: Words) -> None:
    """Write the words of a page.

    Args:
        compressed: its compressed bytes (1-d).
        form: how they are compressed.
        words: output (1-d), `form.n_words` of them.
    """
    _decoded(compressed, form, words, only_compare=False)


def decodes_to(compressed: Bytes, form: Form, words: Words) -> bool:
    """Whether these are the words of a page; arguments as of `decode`."""
    return _decoded(compressed, form, words, only_compare=True)


def _decoded(compressed: Bytes, form: Form, words: Words, only_compare: bool) -> bool:
    at = form.sections
    starts = compressed[at.starts].view(np.int32).reshape(-1, 3)
    ranks = compressed[at.ranks].reshape(-1, RANKED_BYTES)
    sections: list[Bytes] = [compressed[section] for section in at[2:]]
    n_codes = form.n_second, form.n_third
    return _decode(form.exponent_bits, words, only_compare, n_codes, starts, ranks, *sections)


@compiled
def _decode(
    exponent_bits, words, only_compare, n_codes,
    starts, ranks, low, pairs, singles, first, second, third, last,
):  # fmt: skip
    """Write or compare the words; return whether all that were compared are the same."""
    n_second, n_third = n_codes
    symbols = np.empty(BLOCK_WORDS, np.uint8)
    # Places of words in their block; one more is written than is kept.
    escaped, deeper = np.empty(BLOCK_WORDS + 1, np.uint16), np.empty(BLOCK_WORDS + 1, np.uint16)
    decoded = np.empty(BLOCK_WORDS, np.uint16)
    four = np.empty(256, np.uint32)
    for block in range(len(starts)):
        begin = block * BLOCK_WORDS
        ranked = ranks[begin // TILE_WORDS]
        if begin % TILE_WORDS == 0:
            _tabulate(ranked, four)
        n_words = min(BLOCK_WORDS, len(words) - begin)
        of_first = _from(first, begin // 4, BLOCK_WORDS // 4)
        n_escaped = _first_symbols(of_first, four, symbols, escaped)
        # Damaged starts must not lead out of the sections.
        at = min(max(starts[block, 0], 0), n_second)
        n_deeper = 0
        for k in range(min(n_escaped, n_second - at)):
            code = (second[at >> 2] >> (2 * (at & 3))) & 3
            symbols[escaped[k]] = ranked[3 + code]
            deeper[n_deeper] = escaped[k]
            n_deeper += code == 3
            at += 1
        at = min(max(starts[block, 1], 0), n_third)
        at_last = min(max(starts[block, 2], 0), len(last))
        for k in range(min(n_deeper, n_third - at)):
            code = (third[at >> 2] >> (2 * (at & 3))) & 3
            if code < 3:
                symbols[deeper[k]] = ranked[6 + code]
            elif at_last < len(last):
                symbols[deeper[k]] = last[at_last]
                at_last += 1
            at += 1
        _join(symbols, _from(low, begin, BLOCK_WORDS), exponent_bits, decoded)
        if exponent_bits < 8:
            of_pairs = _from(pairs, begin // 4, BLOCK_WORDS // 4)
            _join_high(of_pairs, _from(singles, begin // 8, BLOCK_WORDS // 8), decoded)
        differs = False
        for i in range(n_words):
            if only_compare:
                differs |= words[begin + i] != decoded[i]
            else:
                words[begin + i] = decoded[i]
        if differs:
            return False
    return True


@compiled
def _from(section, begin, n_bytes):
    """Return the bytes of a block, with zeros behind the end of the section."""
    if begin + n_bytes <= len(section):
        return section[begin : begin + n_bytes]
    padded = np.zeros(n_bytes, np.uint8)
    for i in range(len(section) - begin):
        padded[i] = section[begin + i]
    return padded


@compiled
def _tabulate(ranked, four):
    """Fill a table of the four symbols of each byte of first codes."""
    for byte in range(256):
        symbols = uint32(0)
        for k in range(4):
            code = (byte >> (2 * k)) & 3
            if code < 3:
                symbols |= uint32(ranked[code]) << uint32(8 * k)
        four[byte] = symbols


@compiled
def _first_symbols(first, four, symbols, escaped):
    """Write symbols of the first level; return how many places of words with later codes."""
    n, fours = 0, symbols.view(np.uint32)
    for byte in range(BLOCK_WORDS // 4):
        codes = first[byte]
        fours[byte] = four[codes]
        are_escapes = codes & (codes >> 1)
        for k in range(4):
            escaped[n] = 4 * byte + k
            n += (are_escapes >> (2 * k)) & 1
    return n


@compiled
def _join(symbols, low, exponent_bits, words):
    """Put exponent, mantissa and sign together; then the sign comes first again."""
    for i in range(BLOCK_WORDS):
        rotated = uint16(uint16(symbols[i]) << uint16(16 - exponent_bits)) | uint16(low[i])
        words[i] = uint16(rotated >> uint16(1)) | uint16(rotated << uint16(15))


@compiled
def _join_high(pairs, singles, words):
    """Add bits 8 to 10 of the rotated words, which are bits 7 to 9 of the words."""
    for row in range(BLOCK_WORDS // 8):
        pair = uint32(pairs[2 * row]) | (uint32(pairs[2 * row + 1]) << uint32(8))
        single = uint32(singles[row])
        for k in range(8):
            high = ((pair >> uint32(2 * k)) & uint32(3)) << uint32(7)
            high |= ((single >> uint32(k)) & uint32(1)) << uint32(9)
            words[8 * row + k] |= uint16(high)
