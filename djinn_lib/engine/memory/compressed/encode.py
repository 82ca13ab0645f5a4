"""Encode a page on the CPU with numpy, which releases the interpreter lock.

Pages are encoded tile by tile, so that intermediate arrays stay in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from djinn_lib.engine.memory.compressed.form import (
    BLOCK_WORDS,
    N_RANKED,
    RANKED_BYTES,
    TILE_WORDS,
    Form,
)

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]

_SAMPLED = 8  # every 8th word is counted to rank symbols


def encode(words: Words, exponent_bits: int) -> tuple[Bytes, Form]:
    """Compress the words of a page.

    Args:
        words: 1-d, of at least one word.
        exponent_bits: see `EXPONENT_BITS`.

    Returns:
        The compressed bytes and their form. They can be larger than the page.
    """
    fixed = Form(exponent_bits, len(words))
    compressed = np.zeros(fixed.n_bytes, np.uint8)  # the sections of known size
    at, tiles = fixed.sections, []
    n_second = n_third = n_last = 0
    starts = compressed[at.starts].view(np.int32).reshape(-1, 3)
    for begin in range(0, len(words), TILE_WORDS):
        tile = slice(begin, min(begin + TILE_WORDS, len(words)))
        rotated = (words[tile] << 1) | (words[tile] >> 15)
        compressed[at.low][tile] = rotated.astype(np.uint8)
        if exponent_bits < 8:
            high = (rotated >> 8).astype(np.uint8)
            _write(compressed[at.pairs], begin // 4, pack_pairs(high & 3))
            _write(compressed[at.singles], begin // 8, np.packbits(high & 4, bitorder="little"))
        symbols = (rotated >> (16 - exponent_bits)).astype(np.uint8)
        coded = _encode_tile(symbols)
        ranked = begin // TILE_WORDS * RANKED_BYTES
        compressed[at.ranks][ranked : ranked + N_RANKED] = coded.ranked
        _write(compressed[at.first], begin // 4, pack_pairs(coded.first))
        block = begin // BLOCK_WORDS
        starts[block : block + len(coded.starts)] = np.add(
            coded.starts, (n_second, n_third, n_last)
        )
        n_second += len(coded.second)
        n_third += len(coded.third)
        n_last += len(coded.last)
        tiles.append(coded)
    form = Form(exponent_bits, len(words), n_second, n_third, n_last)
    return _joined(compressed, tiles, form), form


class _Tile(NamedTuple):
    """The codes of a tile, one a byte, and where the codes of each block begin."""

    ranked: Bytes
    first: Bytes
    second: Bytes
    third: Bytes
    last: Bytes
    starts: NDArray[np.int64]


def _encode_tile(symbols: Bytes) -> _Tile:
    ranked = most_frequent(symbols)
    first = _first_codes(symbols, ranked)
    where = np.flatnonzero(first == 3)
    escaped = symbols.take(where)
    ranks = _later_ranks(ranked).take(escaped)
    deeper = np.flatnonzero(ranks >= 3)
    third = np.minimum(ranks.take(deeper) - 3, 3)
    deepest = deeper[third == 3]
    blocks = np.arange(0, len(symbols), BLOCK_WORDS)
    levels = (where, where.take(deeper), where.take(deepest))
    starts = np.stack([np.searchsorted(level, blocks) for level in levels], axis=1)
    return _Tile(ranked, first, np.minimum(ranks, 3), third, escaped.take(deepest), starts)


def most_frequent(symbols: Bytes) -> Bytes:
    """Return the symbols that get a rank, most frequent first; counted in a sample."""
    sample = symbols[::_SAMPLED] if len(symbols) > BLOCK_WORDS else symbols
    counts = np.bincount(sample, minlength=256)
    return np.argsort(-counts, kind="stable")[:N_RANKED].astype(np.uint8)


def _first_codes(symbols: Bytes, ranked: Bytes) -> Bytes:
    """Return the codes of the first level. Comparisons are ten times faster than a lookup."""
    code = (symbols == ranked[0]).view(np.uint8) * np.uint8(3)
    code += (symbols == ranked[1]).view(np.uint8) * np.uint8(2)
    code += (symbols == ranked[2]).view(np.uint8)
    return np.subtract(3, code, out=code)


def _later_ranks(ranked: Bytes) -> Bytes:
    """Return, for each symbol, its rank minus 3, or one more than the last rank."""
    ranks = np.full(256, N_RANKED - 3, np.uint8)
    ranks[ranked[3:]] = np.arange(N_RANKED - 3)
    return ranks


def pack_pairs(codes: NDArray[np.integer]) -> Bytes:
    """Put four 2-bit codes into each byte, the first one in the lowest bits; zeros at the end."""
    if len(codes) % 4:
        codes = np.pad(codes, (0, -len(codes) % 4))
    four = np.ascontiguousarray(codes, np.uint8).view(np.uint32)
    return (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8)


def _write(section: Bytes, begin: int, content: Bytes) -> None:
    section[begin : begin + len(content)] = content


def _joined(fixed: Bytes, tiles: list[_Tile], form: Form) -> Bytes:
    """Return the whole compressed page: the sections so far, then the later levels."""
    compressed, at = np.zeros(form.n_bytes, np.uint8), form.sections
    compressed[: len(fixed)] = fixed
    compressed[at.second] = pack_pairs(np.concatenate([tile.second for tile in tiles]))
    compressed[at.third] = pack_pairs(np.concatenate([tile.third for tile in tiles]))
    compressed[at.last] = np.concatenate([tile.last for tile in tiles])
    return compressed
