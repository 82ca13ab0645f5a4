"""Counting open files of one kind, whatever other threads of the process open and close."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

FRAMES = "memfd:djinn"  # of the address spaces on the CPU


def n_open(where: str | Path = FRAMES) -> int:
    """How many descriptors of this process lead to files whose path holds `where`."""
    gc.collect()  # what an earlier test left may close its files at any time
    n = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            n += str(where) in os.readlink(f"/proc/self/fd/{fd}")
    return n
