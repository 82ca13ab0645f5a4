"""Extents of made-up units, and what a window has to hold for them, looked at page by page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from djinn_lib.engine.memory.layout import Extents


def one_after_another(sizes: Sequence[int], begin: int = 0) -> list[Extents]:
    """Units of so many bytes each, that share none."""
    return [((a, b),) for a, b in pairwise(accumulate(sizes, initial=begin))]


def merged(extents: Iterable[tuple[int, int]]) -> Extents:
    """Ascending extents, with neighbours as one."""
    whole: list[tuple[int, int]] = []
    for begin, end in extents:
        if whole and whole[-1][1] == begin:
            begin = whole.pop()[0]
        whole.append((begin, end))
    return tuple(whole)


def pages_of(unit: Extents, page_bytes: int) -> set[int]:
    """Every page that a unit needs."""
    return {p for a, b in unit for p in range(a // page_bytes, -(-b // page_bytes))}


def frames_by_prefix(units: Sequence[Extents], page_bytes: int) -> dict[int, int]:
    """How many frames each prefix takes, and the window behind it for two units in a row."""
    n_pages = max(max(pages_of(unit, page_bytes)) for unit in units) + 1
    return {n: n + _n_slots(units, n, page_bytes) for n in range(n_pages)}


def _n_slots(units: Sequence[Extents], n_prefix: int, page_bytes: int) -> int:
    rest = [{p for p in pages_of(unit, page_bytes) if p >= n_prefix} for unit in units]
    turns = sorted({(min(pages), max(pages) + 1) for pages in rest if pages})
    alone = [last - first for first, last in turns]
    in_a_row = [max(a[1], b[1]) - a[0] for a, b in pairwise(turns)]
    return max([1, *alone, *in_a_row])
