"""Compress a whole model in the memory that it was read into.

Compressed pages move to the start of that memory. A page never gets larger, so it never overwrites
a page that is not compressed yet. Compression therefore needs little extra memory, about a page
for each thread, and the rest is freed afterwards.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from djinn_lib.engine.memory.compressed.decode import decodes_to
from djinn_lib.engine.memory.compressed.encode import Bytes, encode
from djinn_lib.engine.memory.compressed.form import EXPONENT_BITS, MOST_BYTES, TILE_WORDS
from djinn_lib.engine.memory.compressed.page import Compression
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES, Layout, Report, Slot, say_nothing
from djinn_lib.errors import DjinnError
from djinn_lib.units import format_bytes

STORED_ALIGNMENT = 64  # of a page among the compressed bytes
REPORT_S = 5.0  # between two reports of progress
SAMPLED_TILES = 4  # of a page, to estimate its compressed size


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the bytes of one page lie among those of its model, and how they are compressed."""

    begin: int
    n_bytes: int
    compression: Compression | None


@dataclass(frozen=True, slots=True)
class Index:
    """Where everything lies in the compressed bytes of a model.

    Attributes:
        pages: all pages, in order.
        paged_bytes: size of all pages, decoded.
        moved_by: bytes by which lookup tables lie before their place in the layout.
        n_bytes: size of all compressed bytes.
    """

    pages: tuple[Stored, ...]
    paged_bytes: int
    moved_by: int
    n_bytes: int


def compress_model(
    buffer: torch.Tensor, layout: Layout, page_bytes: int, report: Report = say_nothing
) -> Index:
    """Compress a model in place, with one thread for each core.

    Every compressed page is decoded again and compared before its plain bytes are overwritten.

    Args:
        buffer: its bytes (1-d uint8, host); compressed ones replace them, from the start on.
        layout: of these bytes.
        page_bytes: size of a page; a multiple of `ALIGNMENT_BYTES`.
        report: called with the progress.
    """
    content, pages = buffer.numpy(), []
    report("compressing; the first time, numba takes some seconds to compile")
    watch, end = _Watch(layout.paged_bytes, report), 0
    with closing(_compress_pages(content, layout, page_bytes)) as compressed_pages:
        for begin, compressed in compressed_pages:
            stop = min(begin + page_bytes, layout.paged_bytes)
            kept, compression = compressed if compressed else (content[begin:stop], None)
            content[end : end + len(kept)] = kept  # numpy handles overlaps
            pages.append(Stored(end, len(kept), compression))
            end = -(-(end + len(kept)) // STORED_ALIGNMENT) * STORED_ALIGNMENT
            watch.note(stop, pages[-1].begin + len(kept))
    end = pages[-1].begin + pages[-1].n_bytes if pages else 0
    moved_by = (layout.paged_bytes - end) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    tables = content[layout.paged_bytes : layout.n_bytes]
    if moved_by and len(tables):
        content[layout.paged_bytes - moved_by : layout.n_bytes - moved_by] = tables
    watch.end(end)
    n_bytes = layout.n_bytes - moved_by if len(tables) else end
    return Index(tuple(pages), layout.paged_bytes, moved_by, n_bytes)


Compressed = tuple[Bytes, Compression]


def _compress_pages(
    content: Bytes, layout: Layout, page_bytes: int
) -> Generator[tuple[int, Compressed | None]]:
    """Yield where each page begins, and its compressed bytes or None for a plain page."""
    exponents = _exponents(layout, page_bytes)
    waiting: deque[tuple[int, Future[Compressed | None]]] = deque()
    n_threads = min(len(os.sched_getaffinity(0)), len(exponents)) or 1
    with ThreadPoolExecutor(n_threads, "djinn-compressor") as threads:
        try:
            for page, bits in enumerate(exponents):
                begin = page * page_bytes
                plain = content[begin : min(begin + page_bytes, layout.paged_bytes)]
                waiting.append((begin, threads.submit(compress_page, plain, bits)))
                if len(waiting) > n_threads + 1:  # waiting compressed pages take memory
                    begin, future = waiting.popleft()
                    yield begin, future.result()
            while waiting:
                begin, future = waiting.popleft()
                yield begin, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def compress_page(plain: Bytes, exponent_bits: int | None) -> Compressed | None:
    """Compress one page; None if it does not get smaller.

    Raises:
        DjinnError: the compressed bytes do not decode to the same bytes.
    """
    if exponent_bits is None:
        return None
    compressed, form = encode(plain.view(np.uint16), exponent_bits)
    if len(compressed) >= len(plain):
        return None
    if not decodes_to(compressed, form, plain.view(np.uint16)):
        raise DjinnError(
            "compressed weights do not decode to the same bytes: use masters='plain', test the "
            "host's memory, and report it"
        )
    return compressed, Compression(form, zlib.crc32(compressed.data))


def estimated_bytes(buffer: torch.Tensor, layout: Layout, page_bytes: int) -> int:
    """Estimate the compressed size of a model from some tiles of each page."""
    content, total = buffer.numpy(), layout.n_bytes - layout.paged_bytes
    for page, bits in enumerate(_exponents(layout, page_bytes)):
        begin = page * page_bytes
        plain = content[begin : min(begin + page_bytes, layout.paged_bytes)]
        total += len(plain) if bits is None else _estimated_page(plain.view(np.uint16), bits)
    return total


def _estimated_page(words: np.ndarray, exponent_bits: int) -> int:
    n_tiles = -(-len(words) // TILE_WORDS)
    chosen = range(0, n_tiles, max(1, n_tiles // SAMPLED_TILES))
    sample = np.concatenate([words[i * TILE_WORDS : (i + 1) * TILE_WORDS] for i in chosen])
    share = len(encode(sample, exponent_bits)[0]) / sample.nbytes
    return int(min(1.0, share) * words.nbytes)


def _exponents(layout: Layout, page_bytes: int) -> list[int | None]:
    """Return the exponent bits of most bytes of each page; None for pages that stay plain."""
    n_pages, slots = -(-layout.paged_bytes // page_bytes), layout.paged
    found: list[int | None] = []
    first = 0
    for begin in range(0, n_pages * page_bytes, page_bytes):
        end = min(begin + page_bytes, layout.paged_bytes)
        while slots[first].end <= begin:
            first += 1
        found.append(_exponent(islice(slots, first, None), begin, end))
    return found


def _exponent(slots: Iterable[Slot], begin: int, end: int) -> int | None:
    n_bytes: Counter[torch.dtype] = Counter()
    for slot in slots:
        if slot.offset >= end:
            break
        n_bytes[slot.dtype] += min(end, slot.end) - max(begin, slot.offset)
    if (end - begin) % 2 or end - begin > MOST_BYTES:
        return None
    return EXPONENT_BITS.get(max(n_bytes, key=lambda dtype: n_bytes[dtype]))


class _Watch:
    """Reports the progress, at most every few seconds, and the result."""

    def __init__(self, n_bytes: int, report: Report) -> None:
        self._n_bytes, self._report = n_bytes, report
        self._begin_s = self._last_s = time.perf_counter()

    def note(self, n_done: int, n_compressed: int) -> None:
        if time.perf_counter() - self._last_s >= REPORT_S:
            self._last_s = time.perf_counter()
            self._say("compressing", n_done, n_compressed)

    def end(self, n_compressed: int) -> None:
        self._say("compressed", self._n_bytes, n_compressed)

    def _say(self, what: str, n_done: int, n_compressed: int) -> None:
        seconds = time.perf_counter() - self._begin_s
        self._report(
            f"{what} {format_bytes(n_done)} of {format_bytes(self._n_bytes)} into "
            f"{format_bytes(n_compressed)} in {seconds:.1f} s"
        )
