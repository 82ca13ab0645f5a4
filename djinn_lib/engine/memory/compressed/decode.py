"""Decode a page on the CPU with numpy; `form` describes the compressed bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from djinn_lib.engine.memory.compressed.encode import Bytes, Words
from djinn_lib.engine.memory.compressed.form import (
    BLOCK_WORDS,
    N_RANKED,
    RANKED_BYTES,
    TILE_WORDS,
    Form,
)

# For each byte: its four 2-bit codes, one a byte.
_FOUR = ((np.arange(256)[:, None] >> np.array([0, 2, 4, 6])) & 3).astype(np.uint8).view(np.uint32)


def decode(compressed: Bytes, form: Form, words: Words) -> None:
    """Write the words of a page.

    Args:
        compressed: its compressed bytes (1-d), intact.
        form: how they are compressed.
        words: output (1-d), `form.n_words` of them.
    """
    at = form.sections
    starts = compressed[at.starts].view(np.int32).reshape(-1, 3)
    second = unpack_pairs(compressed[at.second], form.n_second)
    third = unpack_pairs(compressed[at.third], form.n_third)
    for begin in range(0, form.n_words, TILE_WORDS):
        tile = slice(begin, min(begin + TILE_WORDS, form.n_words))
        n_words, block = tile.stop - begin, starts[begin // BLOCK_WORDS]
        first = unpack_pairs(compressed[at.first][begin // 4 :][: -(-n_words // 4)], n_words)
        ranks = compressed[at.ranks][begin // TILE_WORDS * RANKED_BYTES :][: N_RANKED + 1]
        later = second[block[0] :], third[block[1] :], compressed[at.last][block[2] :]
        symbols = _symbols(first, ranks, later)
        rotated = symbols.astype(np.uint16) << (16 - form.exponent_bits)
        rotated |= compressed[at.low][tile]
        if form.exponent_bits < 8:
            pairs = unpack_pairs(compressed[at.pairs][begin // 4 :][: -(-n_words // 4)], n_words)
            single = compressed[at.singles][begin // 8 :][: -(-n_words // 8)]
            high = np.unpackbits(single, count=n_words, bitorder="little") << 2 | pairs
            rotated |= high.astype(np.uint16) << 8
        np.bitwise_or(rotated >> 1, rotated << 15, out=words[tile])


def _symbols(first: Bytes, ranks: Bytes, later: tuple[Bytes, Bytes, Bytes]) -> Bytes:
    """Return the symbols of a tile; `later` are the codes of the later levels from its start."""
    symbols = (first == 0).view(np.uint8) * ranks[0]
    symbols += (first == 1).view(np.uint8) * ranks[1]
    symbols += (first == 2).view(np.uint8) * ranks[2]
    where = np.flatnonzero(first == 3)
    second = later[0][: len(where)]
    escaped = ranks[3:].take(second)
    deeper = np.flatnonzero(second == 3)
    third = later[1][: len(deeper)]
    found = ranks[6:].take(third)
    deepest: NDArray[np.int64] = np.flatnonzero(third == 3)
    found[deepest] = later[2][: len(deepest)]
    escaped[deeper] = found
    symbols[where] = escaped
    return symbols


def unpack_pairs(compressed: Bytes, n_codes: int) -> Bytes:
    """Unpack 2-bit codes into one byte each."""
    return _FOUR[:, 0].take(compressed).view(np.uint8)[:n_codes]
