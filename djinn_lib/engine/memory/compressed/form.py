"""The compressed form of a page of 16-bit weights: what lies where. Lossless for any bits.

Weights of a layer have nearly the same magnitude, so their exponents carry about 2.6 bits of
information, in 8 bits of bfloat16 or in 5 of float16. Signs and mantissas cannot be compressed.
That is the observation behind DFloat11 (Zhang et al., arXiv:2504.11651) and ZipNN (Hershcovitch et
al., arXiv:2411.05239), which use Huffman codes. A Huffman code must be read from its start. This
form can be decoded by one thread a weight.

**Words.** A page is read as little-endian 16-bit words. Each is rotated left by one bit, so the
exponent comes first, then the mantissa, then the sign. The exponent is the *symbol* of the word.
The bits below it are stored as they are: 8 with bfloat16, 11 with float16.

**Codes.** Symbols are ranked by how often they occur. Ranks are coded in levels of 2-bit codes::

    first level, a code a word        0, 1, 2: that rank         3: see the second level
    second level, a code an escape    0, 1, 2: rank 3, 4, 5      3: see the third level
    third level, a code an escape     0, 1, 2: rank 6, 7, 8      3: see the last level
    last level, a byte an escape      the symbol itself

Codes of a level lie back to back in the order of their words. To find the code of a word in the
next level, count the escapes before it. For that, words come in *blocks* of 4,096, each with the
positions at which its codes begin in the three later levels. Ranks are those of a *tile* of 16
blocks, because a page holds tensors of several magnitudes.

**Sections**, each at a multiple of 16 bytes. Numbers are little-endian::

    starts    blocks x 3 int32  where the codes of a block begin in the second, third, last level
    ranks     tiles x 16 bytes  the symbols of rank 0 to 8; the other 7 bytes are 0
    low       words bytes       the low 8 bits of the rotated word
    pairs     words / 4 bytes   float16 only: bits 8 and 9 of the rotated word
    singles   words / 8 bytes   float16 only: bit 10
    first     words / 4 bytes   codes, four a byte, the first one in the lowest bits
    second    escapes / 4 bytes
    third     escapes / 4 bytes
    last      escapes bytes

A page may hold other tensors too, such as norms in single precision. Their bytes are words like
all others, so they come back exactly; they only take more room. Which exponent is taken depends on
the dtype that most bytes of the page have.

**Size.** Normally distributed weights take 0.669 of their bytes as bfloat16 and 0.857 as float16;
entropy would allow 0.66 and 0.85. In the worst case, all symbols equally frequent, the form is
larger than the page, by 0.71 or 0.78 bytes a word. Such a page is kept as it is.

**Checks.** The CRC-32 of the compressed bytes, and the numbers of `Form`, are kept apart from them.
They are compared whenever a page is decoded on the CPU, and by audits on a GPU. A decoder never
reads outside of the sections, whatever the compressed bytes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK_WORDS = 4096
TILE_BLOCKS = 16
TILE_WORDS = TILE_BLOCKS * BLOCK_WORDS
RANKED_BYTES = 16  # of a tile, for the symbols that have a rank
N_RANKED = 9
SECTION_BYTES = 16  # sections begin at multiples: what vector loads of a GPU ask for
MOST_BYTES = 1 << 31  # of a page; its words are counted in 32 bits

# Bits of the exponent, which comes after the sign and before the mantissa.
EXPONENT_BITS = {torch.bfloat16: 8, torch.float16: 5}


class Sections(NamedTuple):
    """Where the sections of a compressed page lie, in bytes."""

    starts: slice
    ranks: slice
    low: slice
    pairs: slice
    singles: slice
    first: slice
    second: slice
    third: slice
    last: slice


@dataclass(frozen=True, slots=True)
class Form:
    """How one page is compressed: all that a decoder needs beside the compressed bytes.

    Attributes:
        exponent_bits: 8 for bfloat16, 5 for float16.
        n_words: 16-bit words of the page.
        n_second, n_third, n_last: codes of the later levels.
    """

    exponent_bits: int
    n_words: int
    n_second: int = 0
    n_third: int = 0
    n_last: int = 0

    @property
    def n_blocks(self) -> int:
        """Blocks of words; the last one may be short."""
        return -(-self.n_words // BLOCK_WORDS)

    @property
    def sections(self) -> Sections:
        """Where the sections lie."""
        n, n_tiles = self.n_words, -(-self.n_words // TILE_WORDS)
        has_more = self.exponent_bits < 8  # bits than fit into `low`
        sizes = (
            12 * self.n_blocks,
            RANKED_BYTES * n_tiles,
            n,
            -(-n // 4) * has_more,
            -(-n // 8) * has_more,
            -(-n // 4),
            -(-self.n_second // 4),
            -(-self.n_third // 4),
            self.n_last,
        )
        begin, sections = 0, []
        for n_bytes in sizes:
            sections.append(slice(begin, begin + n_bytes))
            begin = -(-(begin + n_bytes) // SECTION_BYTES) * SECTION_BYTES
        return Sections(*sections)

    @property
    def n_bytes(self) -> int:
        """Size of the compressed page in bytes."""
        return self.sections.last.stop

    @property
    def plain_bytes(self) -> int:
        """Size of the page in bytes."""
        return 2 * self.n_words
