"""Measure how fast masters are read from disk: `python benchmarks/disk_tier.py`.

The result is compared with plain direct reads of the same file. Their size and number at a time are
those of the disk tier, but they have no checksums and no page tables. The two alternate, so
disturbances affect both. Results are medians of several repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.disk_tier import N_READERS, READ_BYTES, DiskTier
from djinn_lib.engine.memory.layout import Layout
from djinn_lib.engine.memory.opening import default_folder
from djinn_lib.engine.memory.swap_file import read_all
from djinn_lib.experiment.setup import machine
from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path
from djinn_lib.units import parse_bytes


def main() -> int:
    """Measure, print and write the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2GiB", help="of the master")
    parser.add_argument("--page", default="64MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=user_path, default=default_folder())
    parser.add_argument("--out", type=user_path, default=REPO / "data" / "runs" / "disk_tier.json")
    options = parser.parse_args()
    result = measure(options)
    write_json(options.out, result)
    for name in ("disk_bytes_per_s", "tier_bytes_per_s"):
        rates = result[name]
        print(f"{name}: {statistics.median(rates) / 1e9:.2f}e9, {min(rates) / 1e9:.2f} to "
              f"{max(rates) / 1e9:.2f}")  # fmt: skip
    print(f"share_of_the_disk: {result['share_of_the_disk']:.2f}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both rates, and return them as plain data."""
    n_bytes, page_bytes = parse_bytes(options.size), parse_bytes(options.page)
    tier = DiskTier(n_bytes + page_bytes, page_bytes, options.folder)
    buffer = host.allocate(n_bytes)
    buffer.fill_(1)  # touch the memory: the tier's frames are touched after the first repeat
    layout = Layout.pack([("w", (n_bytes,), torch.uint8)])
    tier.add("m", layout, lambda views: views["w"].random_(0, 256))
    rates: dict[str, list[float]] = {"disk_bytes_per_s": [], "tier_bytes_per_s": []}
    for repeat in tqdm(range(options.repeats + 1), unit="repeat"):
        plain_s = timed(lambda: read_plainly(tier._files["m"]._fd, buffer))
        tier.ring.evict("m", tier.ring.n_resident("m"))
        tier_s = timed(lambda: tier.hold("m"))
        tier.let_go("m")
        if repeat:  # the first repeat also touches the tier's memory
            rates["disk_bytes_per_s"].append(n_bytes / plain_s)
            rates["tier_bytes_per_s"].append(n_bytes / tier_s)
    tier.close()
    shares = [t / d for t, d in zip(*reversed(rates.values()), strict=True)]
    return {
        "machine": machine.describe_machine("cpu"),
        "size_bytes": n_bytes,
        "page_bytes": page_bytes,
        **rates,
        "share_of_the_disk": statistics.median(shares),
    }


def read_plainly(fd: int, buffer: torch.Tensor) -> None:
    """Read a whole file into a buffer, several pieces at a time."""
    view = memoryview(buffer.numpy().data)

    def read(begin: int) -> None:
        read_all(fd, [view[begin : begin + READ_BYTES]], begin)

    with ThreadPoolExecutor(N_READERS) as readers:
        list(readers.map(read, range(0, len(view), READ_BYTES)))


def timed(function: Any) -> float:
    """Return the seconds that a call takes."""
    begin_s = time.perf_counter()
    function()
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    sys.exit(main())
