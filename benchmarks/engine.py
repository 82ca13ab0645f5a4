"""What a switch costs, beside what physics allows: `python benchmarks/engine.py --profile gpu`.

A model of b bytes cannot be loaded in less than b / link rate, and a token of batch 1 cannot be
decoded in less than b / HBM rate, because every weight is read once for it. Both rates are measured
in the same run, and every figure is printed with the share of them that it reaches.

For each model: a hit, a full miss with the prefill overlapping the copy and after it, and the bare
load. For each ordered pair of models: the partial miss when the second is asked for after the
first. Medians of several repeats; the least and the greatest are kept beside them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from djinn_lib import machine
from djinn_lib.bench import MODELS_DIR
from djinn_lib.djinn import Djinn, Generation
from djinn_lib.errors import DjinnError
from djinn_lib.files import write_json
from djinn_lib.profile import REPO, Profile, load_profile, parse_capacity
from djinn_lib.systems import ModelFiles
from djinn_lib.weights import prepare_models, prompt_ids

COLUMNS = ["case", "model", "loaded_bytes", "load_ms", "switch_ms", "stall_ms", "ttft_ms"]


def main() -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cpu", help="a file of params/, without .yml")
    parser.add_argument("--capacity", default="25", help="a label of the profile's capacities")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models-dir", type=Path, default=MODELS_DIR)
    parser.add_argument("--out", type=Path, default=REPO / "data" / "runs" / "engine.json")
    options = parser.parse_args()
    try:
        result = measure(load_profile(options.profile), options)
    except DjinnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(options.out, result)
    print_tables(result)
    return 0


def measure(profile: Profile, options: argparse.Namespace) -> dict[str, Any]:
    """Return ceilings, set-up and cases as plain data."""
    facts = machine.describe_machine(profile.device)
    files = prepare_models(profile, options.models_dir)
    total_bytes = sum(f.n_bytes for f in files.values())
    capacity_bytes = parse_capacity(profile.capacities[options.capacity], total_bytes)
    commit, dirty = machine.git_state(REPO)
    before_bytes = device_bytes_used(profile.device)
    with Djinn(capacity_bytes, profile.device, page=profile.page) as djinn:
        setup_s = {
            name: timed(lambda f=f: djinn.add(f.name, f.folder)) for name, f in files.items()
        }
        cases = list(run_cases(djinn, profile, files, options.repeats))
        beyond_bytes = device_bytes_used(profile.device) - before_bytes - djinn.capacity_bytes
    return {
        "machine": facts,
        "git_commit": commit,
        "git_dirty": dirty,
        "profile": profile.name,
        "capacity_bytes": capacity_bytes,
        "sizes": {name: f.n_bytes for name, f in files.items()},
        "repeats": options.repeats,
        "setup_s": setup_s,
        "device_bytes_beyond_ring": beyond_bytes if profile.device == "cuda" else None,
        "cases": cases,
    }


def device_bytes_used(device: str) -> int:
    """Bytes of the GPU in use by anybody; 0 on the CPU."""
    if device != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def run_cases(
    djinn: Djinn, profile: Profile, files: dict[str, ModelFiles], repeats: int
) -> Iterable[dict[str, Any]]:
    """Yield one summary a case."""
    prompts = {name: prompt_ids(f, profile.prompt_tokens, 0) for name, f in files.items()}

    def request(name: str) -> Generation:
        return djinn.generate(name, prompts[name], profile.new_tokens, ignore_eos=True)

    def empty() -> None:
        for name in files:
            djinn.evict(name)

    for name in files:
        print(f"{name} ...", flush=True)
        request(name)  # warms up
        yield summary("hit", name, [request(name) for _ in range(repeats)])
        for overlap in (True, False):
            djinn.overlap = overlap
            misses = [(empty(), request(name))[1] for _ in range(repeats)]
            yield summary(f"full miss, overlap {'on' if overlap else 'off'}", name, misses)
        djinn.overlap = True
        loads_ms = [(empty(), load_ms(djinn, name))[1] for _ in range(repeats)]
        yield {"case": "load", "model": name, "loaded_bytes": files[name].n_bytes,
               **spread("load_ms", loads_ms)}  # fmt: skip
    for before, after in permutations(files, 2):
        switches = []
        for _ in range(repeats):
            request(after), request(before)
            switches.append(request(after))
        yield summary(f"after {before}", after, switches)


def load_ms(djinn: Djinn, name: str) -> float:
    """Milliseconds until all weights of a model that is not resident are there."""
    begin_s = time.perf_counter()
    with djinn.lease(name):
        djinn.wait(name)
        return (time.perf_counter() - begin_s) * 1e3


def summary(case: str, model: str, generations: list[Generation]) -> dict[str, Any]:
    """Medians, least and greatest of what the requests of a case cost."""
    columns = ("switch_ms", "stall_ms", "ttft_ms", "decode_ms", "total_ms")
    n_steps = max(1, len(generations[0].token_ids) - 1)
    result: dict[str, Any] = {
        "case": case,
        "model": model,
        "loaded_bytes": generations[-1].loaded_bytes,
        "evicted_bytes": generations[-1].evicted_bytes,
    }
    for column in columns:
        result |= spread(column, [getattr(g, column) for g in generations])
    result |= spread("ms_per_token", [g.decode_ms / n_steps for g in generations])
    return result


def spread(name: str, values: list[float]) -> dict[str, float]:
    """The median under `name`, with the least and the greatest beside it."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def print_tables(result: dict[str, Any]) -> None:
    """Print the ceilings, and every case with its share of them."""
    facts, sizes = result["machine"], result["sizes"]
    link, hbm = facts["link_rate_bytes_per_s"], facts["hbm_rate_bytes_per_s"]
    print(f"\n{facts['device_name']}: link {link / 1e9:.1f} GB/s", end="")
    print(f", device memory {hbm / 1e9:.0f} GB/s" if hbm else "")
    table = pd.DataFrame(result["cases"])
    table["share_of_link"] = table["loaded_bytes"] / link * 1e3 / table["load_ms"]
    if hbm:  # a copy counts bytes read and written; decoding only reads
        floor_ms = table["model"].map(sizes) / hbm * 1e3
        table["share_of_hbm"] = floor_ms / table["ms_per_token"]
    shown = [c for c in [*COLUMNS, "ms_per_token", "share_of_link", "share_of_hbm"] if c in table]
    print(table[shown].round(3).to_string(index=False))
    if result["device_bytes_beyond_ring"] is not None:
        print(
            f"device memory beyond the ring: {result['device_bytes_beyond_ring'] / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    sys.exit(main())
