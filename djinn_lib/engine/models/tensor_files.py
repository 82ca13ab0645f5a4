"""Fill a packed model from a model whose tensors may still be in their files.

Page faults read a mapped file one page at a time. One thread then reaches a fraction of the speed
of memory and disk, and a file that is truncated meanwhile kills the process. So tensors that are
views of mapped files are read from these files directly, in blocks, on all cores.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from djinn_lib.engine.memory.layout import Advance
from djinn_lib.errors import CheckpointError

_BLOCK_BYTES = 16 << 20  # what one thread reads per call
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+\s*(.*)")


class CountedFill(Protocol):
    """Writes all tensors of a model, given by name, and reports its progress."""

    def __call__(self, views: Mapping[str, torch.Tensor], advance: Advance = ...) -> None:
        """Fill `views`; call `advance` with the bytes of each written part."""
        ...


def ignore(n_bytes: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True, slots=True)
class Region:
    """A mapped part of a file: addresses `begin` to `end`, from `offset` bytes on."""

    begin: int
    end: int
    offset: int
    file: Path

    @classmethod
    def of_this_process(cls, files: Collection[Path]) -> list[Region]:
        """List the mappings of some files, by address, whose bytes equal the file's.

        The source is /proc/self/smaps. Private pages that were written to are anonymous there. A
        mapping with such pages is left out, because its tensors may differ from the file.
        """
        known = {os.path.realpath(file): file for file in files}
        regions: list[Region] = []
        current: Region | None = None
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if header := _MAPPING.match(line):
                begin, end, offset = (int(number, 16) for number in header.groups()[:3])
                file = known.get(header[4])
                current = cls(begin, end, offset, file) if file else None
            elif current and line.startswith("Anonymous:") and line.split()[1] == "0":
                regions.append(current)
        return sorted(regions, key=lambda region: region.begin)


def fill_from(model: nn.Module, files: Collection[Path]) -> CountedFill:
    """Return a function that fills views of a model's parameters, by name.

    It frees each converted tensor after copying it, so memory holds the tensor only once.

    Args:
        model: its parameters hold the values.
        files: some of its tensors may be mapped from these.
    """

    def fill(views: Mapping[str, torch.Tensor], advance: Advance = ignore) -> None:
        regions = Region.of_this_process(files)
        parameters = dict(model.named_parameters())
        stored: list[tuple[torch.Tensor, Path, int]] = []
        for name, view in views.items():
            place = _place(parameters[name], view, regions)
            if place:
                stored.append((view, *place))
            else:
                view.copy_(parameters[name].detach())
                parameters[name].data = parameters[name].new_empty(0)
                advance(view.nbytes)
        read_tensors(stored, advance)

    return fill


def _place(
    tensor: torch.Tensor, view: torch.Tensor, regions: list[Region]
) -> tuple[Path, int] | None:
    """Locate a tensor in its file if the bytes can be read unchanged; else None."""
    alike = tensor.dtype == view.dtype and tensor.is_contiguous() and view.is_contiguous()
    if not alike or view.device.type != "cpu":
        return None
    address = tensor.data_ptr()
    i = bisect_right(regions, address, key=lambda region: region.begin) - 1
    if i < 0 or address + tensor.nbytes > regions[i].end:
        return None
    return regions[i].file, regions[i].offset + address - regions[i].begin


def read_tensors(
    stored: Collection[tuple[torch.Tensor, Path, int]], advance: Advance = ignore
) -> None:
    """Read tensors from files in blocks, on all cores.

    Args:
        stored: contiguous tensors in host memory, each with its file and offset in bytes.
        advance: called with the number of bytes of each block that was read.

    Raises:
        CheckpointError: a file has become shorter.
    """
    opened = {file: os.open(file, os.O_RDONLY) for file in {file for _, file, _ in stored}}
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "djinn-checkpoint") as threads:
            blocks = list(_blocks(stored))
            read = threads.map(lambda b: _read_block(opened[b[1]], b[0], b[2]), blocks)
            for (target, file, _), whole in zip(blocks, read, strict=True):
                if not whole:
                    raise CheckpointError(
                        f"{file} ({file.stat().st_size} bytes) ends before its tensors do: "
                        "download it again"
                    )
                advance(len(target))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _blocks(
    stored: Collection[tuple[torch.Tensor, Path, int]],
) -> Iterator[tuple[memoryview, Path, int]]:
    for tensor, file, offset in stored:
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(target), _BLOCK_BYTES):
            yield target[begin : begin + _BLOCK_BYTES], file, offset + begin


def _read_block(descriptor: int, target: memoryview, offset: int) -> bool:
    """Fill `target` from a file; False if the file ends before."""
    done = 0
    while done < len(target):
        if not (n_bytes := os.preadv(descriptor, [target[done:]], offset + done)):
            return False
        done += n_bytes
    return True
