"""Decode a page on the CPU with numpy; `form` describes the compressed bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from djinn_lib.engine.memory.compressed.encode import Bytes, Words, tile_groups, tile_offsets
from djinn_lib.engine.memory.compressed.form import (
    BLOCK_WORDS,
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
    ranks = compressed[at.ranks].reshape(-1, RANKED_BYTES)
    for begin, end, n_tiles in tile_groups(form.n_words):
        n_words, block = end - begin, starts[begin // BLOCK_WORDS]
        first = unpack_pairs(compressed[at.first][begin // 4 :][: -(-n_words // 4)], n_words)
        later = second[block[0] :], third[block[1] :], compressed[at.last][block[2] :]
        tile = begin // TILE_WORDS
        symbols = _symbols(first.reshape(n_tiles, -1), ranks[tile : tile + n_tiles], later)
        rotated = symbols.astype(np.uint16) << (16 - form.exponent_bits)
        rotated |= compressed[at.low][begin:end]
        if form.exponent_bits < 8:
            pairs = unpack_pairs(compressed[at.pairs][begin // 4 :][: -(-n_words // 4)], n_words)
            single = compressed[at.singles][begin // 8 :][: -(-n_words // 8)]
            high = np.unpackbits(single, count=n_words, bitorder="little") << 2 | pairs
            rotated |= high.astype(np.uint16) << 8
        np.bitwise_or(rotated >> 1, rotated << 15, out=words[begin:end])


def _symbols(first: Bytes, ranks: Bytes, later: tuple[Bytes, Bytes, Bytes]) -> Bytes:
    """Return the symbols of a group of tiles.

    Args:
        first: codes of the first level, a tile a row.
        ranks: the ranked symbols of each tile, a tile a row.
        later: codes of the later levels, from the start of the group.
    """
    symbols = (first == 0).view(np.uint8) * ranks[:, 0:1]
    symbols += (first == 1).view(np.uint8) * ranks[:, 1:2]
    symbols += (first == 2).view(np.uint8) * ranks[:, 2:3]
    symbols = symbols.ravel()
    where = np.flatnonzero(first == 3)
    second = later[0][: len(where)]
    table = tile_offsets(where, first.shape, RANKED_BYTES)
    escaped = ranks.ravel().take(table + 3 + second)
    deeper = np.flatnonzero(second == 3)
    third = later[1][: len(deeper)]
    found = ranks.ravel().take(table.take(deeper) + 6 + third)
    deepest: NDArray[np.int64] = np.flatnonzero(third == 3)
    found[deepest] = later[2][: len(deepest)]
    escaped[deeper] = found
    symbols[where] = escaped
    return symbols


def unpack_pairs(compressed: Bytes, n_codes: int) -> Bytes:
    """Unpack 2-bit codes into one byte each."""
    return _FOUR[:, 0].take(compressed).view(np.uint8)[:n_codes]
