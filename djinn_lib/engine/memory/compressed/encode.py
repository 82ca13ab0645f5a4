"""Encode a page on the CPU with numpy, which releases the interpreter lock.

Pages are encoded some tiles at a time. With fewer, threads would spend their time passing the
interpreter lock around; with more, intermediate arrays would leave the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
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
_GROUP_TILES = 16  # encoded or decoded at a time


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
    at, groups = fixed.sections, []
    n_second = n_third = n_last = 0
    starts = compressed[at.starts].view(np.int32).reshape(-1, 3)
    ranks = compressed[at.ranks].reshape(-1, RANKED_BYTES)
    for begin, end, n_tiles in tile_groups(len(words)):
        rotated = (words[begin:end] << 1) | (words[begin:end] >> 15)
        compressed[at.low][begin:end] = rotated.astype(np.uint8)
        if exponent_bits < 8:
            high = (rotated >> 8).astype(np.uint8)
            _write(compressed[at.pairs], begin // 4, pack_pairs(high & 3))
            _write(compressed[at.singles], begin // 8, np.packbits(high & 4, bitorder="little"))
        symbols = (rotated >> (16 - exponent_bits)).astype(np.uint8)
        coded = _encode_tiles(symbols.reshape(n_tiles, -1))
        tile, block = begin // TILE_WORDS, begin // BLOCK_WORDS
        ranks[tile : tile + n_tiles, :N_RANKED] = coded.ranked
        _write(compressed[at.first], begin // 4, pack_pairs(coded.first))
        starts[block : block + len(coded.starts)] = np.add(
            coded.starts, (n_second, n_third, n_last)
        )
        n_second += len(coded.second)
        n_third += len(coded.third)
        n_last += len(coded.last)
        groups.append(coded)
    form = Form(exponent_bits, len(words), n_second, n_third, n_last)
    return _joined(compressed, groups, form), form


def tile_groups(n_words: int) -> Iterator[tuple[int, int, int]]:
    """Split a page into groups of whole tiles, and a last tile that may be short.

    Yields:
        The first word of a group, the word after its last one, and its number of tiles.
    """
    n_whole = n_words // TILE_WORDS
    for tile in range(0, n_whole, _GROUP_TILES):
        n_tiles = min(_GROUP_TILES, n_whole - tile)
        yield tile * TILE_WORDS, (tile + n_tiles) * TILE_WORDS, n_tiles
    if n_words % TILE_WORDS:
        yield n_whole * TILE_WORDS, n_words, 1


class _Group(NamedTuple):
    """The codes of a group of tiles, one a byte, and where the codes of each block begin."""

    ranked: Bytes
    first: Bytes
    second: Bytes
    third: Bytes
    last: Bytes
    starts: NDArray[np.int64]


def _encode_tiles(symbols: Bytes) -> _Group:
    """Encode tiles of the same length, one a row."""
    ranked = most_frequent(symbols)
    first = _first_codes(symbols, ranked).ravel()
    where = np.flatnonzero(first == 3)
    escaped = symbols.ravel().take(where)
    ranks = _later_ranks(ranked).take(tile_offsets(where, symbols.shape, 256) + escaped)
    deeper = np.flatnonzero(ranks >= 3)
    third = np.minimum(ranks.take(deeper) - 3, 3)
    deepest = deeper[third == 3]
    blocks = np.arange(0, symbols.size, BLOCK_WORDS)
    levels = (where, where.take(deeper), where.take(deepest))
    starts = np.stack([np.searchsorted(level, blocks) for level in levels], axis=1)
    return _Group(ranked, first, np.minimum(ranks, 3), third, escaped.take(deepest), starts)


def most_frequent(symbols: Bytes) -> Bytes:
    """Return the symbols of each tile that get a rank, most frequent first; by a sample."""
    n_tiles, n_words = symbols.shape
    sample = symbols[:, ::_SAMPLED] if n_words > BLOCK_WORDS else symbols
    tiles = np.arange(n_tiles, dtype=np.int64)[:, None] * 256
    counts = np.bincount((tiles + sample).ravel(), minlength=256 * n_tiles).reshape(n_tiles, 256)
    return np.argsort(-counts, axis=1, kind="stable")[:, :N_RANKED].astype(np.uint8)


def tile_offsets(where: NDArray[np.int64], shape: tuple[int, ...], size: int) -> NDArray[np.int64]:
    """Return where the table of each word's tile begins, for tables of `size` behind each other.

    Args:
        where: places of words in a group of tiles, ascending.
        shape: number of tiles, and of words in each.
        size: of a table.
    """
    n_tiles, n_words = shape
    ends = np.searchsorted(where, np.arange(1, n_tiles + 1) * n_words)
    return np.repeat(np.arange(n_tiles) * size, np.diff(ends, prepend=0))


def _first_codes(symbols: Bytes, ranked: Bytes) -> Bytes:
    """Return the codes of the first level. Comparisons are ten times faster than a lookup."""
    code = (symbols == ranked[:, 0:1]).view(np.uint8) * np.uint8(3)
    code += (symbols == ranked[:, 1:2]).view(np.uint8) * np.uint8(2)
    code += (symbols == ranked[:, 2:3]).view(np.uint8)
    return np.subtract(3, code, out=code)


def _later_ranks(ranked: Bytes) -> Bytes:
    """Return, for each tile and symbol, its rank minus 3, or one more than the last rank."""
    ranks = np.full((len(ranked), 256), N_RANKED - 3, np.uint8)
    np.put_along_axis(ranks, ranked[:, 3:].astype(np.int64), np.arange(N_RANKED - 3)[None], 1)
    return ranks


def pack_pairs(codes: NDArray[np.integer]) -> Bytes:
    """Put four 2-bit codes into each byte, the first one in the lowest bits; zeros at the end."""
    if len(codes) % 4:
        codes = np.pad(codes, (0, -len(codes) % 4))
    four = np.ascontiguousarray(codes, np.uint8).view(np.uint32)
    return (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8)


def _write(section: Bytes, begin: int, content: Bytes) -> None:
    section[begin : begin + len(content)] = content


def _joined(fixed: Bytes, groups: list[_Group], form: Form) -> Bytes:
    """Return the whole compressed page: the sections so far, then the later levels."""
    compressed, at = np.zeros(form.n_bytes, np.uint8), form.sections
    compressed[: len(fixed)] = fixed
    compressed[at.second] = pack_pairs(np.concatenate([group.second for group in groups]))
    compressed[at.third] = pack_pairs(np.concatenate([group.third for group in groups]))
    compressed[at.last] = np.concatenate([group.last for group in groups])
    return compressed
