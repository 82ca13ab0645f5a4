"""Measure the cost of switches against hardware limits: `python benchmarks/engine.py`.

To load a model of b bytes takes at least b / link rate. To decode a token of batch 1 takes at least
b / HBM rate, because every weight is read once. Both rates are measured in the same run, and every
result is printed with the share of its limit that it reaches.

The cases for each model are a hit in every way of decoding, a full miss with and without overlap of
prefill and copy, and the load alone. The case for each ordered pair of models is a partial miss: a
request for the second model after one for the first. Then page sizes are compared, and the bytes
that the copy engines moved are counted. Results are medians of several repeats, with minimum and
maximum.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, get_args

import pandas as pd
import psutil
import torch
from engine_cases import Cases, page_curve, timed
from engine_targets import read_floor_ms, targets

from djinn_lib.engine.decode.modes import Decode
from djinn_lib.engine.djinn import Djinn
from djinn_lib.engine.memory.opening import MastersForm
from djinn_lib.engine.models.packing import Embeddings
from djinn_lib.errors import DjinnError
from djinn_lib.experiment.bench import MODELS_DIR
from djinn_lib.experiment.locks import gpu_lock
from djinn_lib.experiment.profile import Profile, load_profile
from djinn_lib.experiment.setup import machine
from djinn_lib.experiment.setup.weights import files_sha256, prepare_models, prompt_ids
from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path
from djinn_lib.provenance import git_state
from djinn_lib.units import parse_bytes, parse_capacity

WAYS: dict[str, tuple[Decode, ...]] = {
    "cuda": ("eager", "graph", "compiled"),
    "cpu": ("eager", "graph"),
}
COLUMNS = ["case", "model", "decode", "loaded_bytes", "load_ms", "switch_ms", "stall_ms", "ttft_ms"]
PAGE_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of the profile's page


def main() -> int:
    """Measure, print and write the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="cpu", help="a file of params/, without .yml")
    parser.add_argument("--capacity", default="25", help="a label of the profile's capacities")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--embeddings", choices=get_args(Embeddings), default="host")
    parser.add_argument("--masters", choices=get_args(MastersForm), default="plain")
    parser.add_argument("--models-dir", type=user_path, default=MODELS_DIR)
    parser.add_argument("--out", type=user_path, default=REPO / "data" / "runs" / "engine.json")
    options = parser.parse_args()
    begun_at = datetime.now(UTC)
    try:
        profile = load_profile(options.profile)
        alone = gpu_lock(options.out.parent) if profile.device == "cuda" else nullcontext()
        with alone:
            result, manifest = measure(profile, options)
    except DjinnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if profile.name == "gpu":
        result["targets"] = targets(result)
    write_json(options.out, result)
    places = ("models_dir", "out")  # paths on this machine, of no use to a reader
    parameters = {key: str(value) for key, value in vars(options).items() if key not in places}
    ended = {"started_at_utc": begun_at.isoformat(timespec="seconds"), "parameters": parameters}
    write_json(options.out.with_suffix(".manifest.json"), manifest | ended)
    print_tables(result)
    return 0


def measure(profile: Profile, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure, and return the results and their origin as plain data."""
    say("measuring this machine")
    facts = machine.describe_machine(profile.device)
    files = prepare_models(profile, options.models_dir)
    model_bytes = {name: f.n_bytes for name, f in files.items()}
    capacity_bytes = parse_capacity(profile.capacities[options.capacity], sum(model_bytes.values()))
    prompts = {name: prompt_ids(f, profile.prompt_tokens, 0) for name, f in files.items()}
    ways = WAYS[profile.device]
    device_before_bytes, host_before_bytes = device_bytes_used(profile.device), host_bytes_used()
    with Djinn(capacity_bytes, profile.device, page=profile.page, decode="eager",
               max_model_len=options.max_model_len, embeddings=options.embeddings,
               masters=options.masters, progress=say) as djinn:  # fmt: skip
        setup: list[dict[str, Any]] = []
        for name, f in files.items():
            say(f"{name}: reading and pinning {f.n_bytes / 2**30:.2f} GiB")
            seconds = timed(lambda f=f: djinn.add(f.name, f.folder))
            setup.append({"step": "read and pin", "model": name, "seconds": seconds})
        host_growth_bytes = host_bytes_used() - host_before_bytes
        residency = djinn.residency()
        sizes = dict(zip(residency.model, residency.bytes.tolist(), strict=True))
        cases = Cases(djinn, prompts, profile.new_tokens, options.repeats)
        rows, decode = [], {}
        for way in ways:
            for name in files:
                begin_s = time.perf_counter()
                decode[name] = djinn.set_decode(name, way)
                seconds = time.perf_counter() - begin_s
                setup.append({"step": f"prepare {way}", "model": name, "seconds": seconds})
                say(f"{name}: hits, {decode[name]}")
                rows.append(cases.hit(name, decode[name]))
        for name in files:
            say(f"{name}: misses")
            rows += cases.misses(name, decode[name])
        say("every model after every other one")
        rows += cases.pairs(decode)
        kv_bytes = djinn.kv_cache_bytes
        beyond_bytes = device_bytes_used(profile.device) - device_before_bytes
        copied = cases.copied_bytes() if profile.device == "cuda" else None
        per_token = {name: bytes_per_token(djinn, name) for name in files}
        pages = [int(parse_bytes(profile.page) * factor) for factor in PAGE_FACTORS]
        pages = [page for page in pages if page >= smallest_page(profile.device)]
        if options.masters != "plain":  # compressed pages have one size
            pages = []
        say("the size of a page")
        largest = sorted(sizes, key=lambda name: -sizes[name])[:2]
        curve = page_curve(
            djinn.masters, largest, capacity_bytes, pages, djinn.device, options.repeats
        )
        masters_bytes = djinn.masters.n_bytes
    commit, dirty = git_state(REPO)
    manifest = {
        "git_commit": commit,
        "git_dirty": dirty,
        "command": "python benchmarks/engine.py",
        "versions": facts["versions"],
        "weights_sha256": {name: files_sha256(f) for name, f in files.items()},
    }
    return {
        "machine": {key: value for key, value in facts.items() if key != "versions"},
        "profile": profile.name,
        "decode": decode,
        "max_model_len": options.max_model_len,
        "prompt_tokens": profile.prompt_tokens,
        "repeats": options.repeats,
        "capacity_bytes": capacity_bytes,
        "page_bytes": parse_bytes(profile.page),
        "embeddings": options.embeddings,
        "masters": options.masters,
        "model_bytes": model_bytes,
        "sizes": sizes,
        "bytes_per_token": per_token,
        "setup": setup,
        "host_master_bytes": masters_bytes,
        "host_growth_bytes": host_growth_bytes,
        "kv_cache_bytes": kv_bytes,
        "device_bytes_beyond": beyond_bytes - capacity_bytes - kv_bytes
        if profile.device == "cuda"
        else None,
        "copied_bytes": copied,
        "cases": rows,
        "page_curve": curve,
    }, manifest


def say(step: str) -> None:
    """Print the step that begins."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {step}", flush=True)


def device_bytes_used(device: str) -> int:
    """Return the bytes of the GPU in use by all processes; 0 on the CPU."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


def host_bytes_used() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process(os.getpid()).memory_info().rss


def bytes_per_token(djinn: Djinn, name: str) -> int:
    """Return the bytes that a step of batch 1 reads.

    It reads all weights, but only one row of an embedding table that is not also the head.
    """
    with djinn.lease(name) as model:
        lent: Any = model
        embedding, head = lent.get_input_embeddings().weight, lent.get_output_embeddings().weight
        layout = djinn.masters.layout(name)
        whole = layout.n_tables or embedding.data_ptr() == head.data_ptr()
        n_bytes = layout.paged_bytes
        return n_bytes if whole else n_bytes - embedding.numel() * embedding.itemsize


def smallest_page(device: str) -> int:
    """Return the smallest page that the device's backend can map, in bytes."""
    return 2 << 20 if device == "cuda" else 4096


def print_tables(result: dict[str, Any]) -> None:
    """Print the hardware limits, and every case with its share of them."""
    facts = result["machine"]
    link, hbm = facts["link_rate_bytes_per_s"], facts["hbm_read_rate_bytes_per_s"]
    print(f"\n{facts['device_name']}: link {link / 1e9:.1f} GB/s", end="")
    print(f", device memory reads {hbm / 1e9:.0f} GB/s" if hbm else "")
    table = pd.DataFrame(result["cases"])
    table["share_of_link"] = table["loaded_bytes"] / link * 1e3 / table["load_ms"]
    shown = [*COLUMNS, "ms_per_token", "total_ms", "share_of_link"]
    if hbm:
        floor_ms = table["model"].map({m: read_floor_ms(result, m) for m in result["sizes"]})
        table["share_of_hbm"] = (floor_ms / table["ms_per_token"]).where(table["case"] == "hit")
        shown.append("share_of_hbm")
    print(table[shown].round(3).to_string(index=False, na_rep="-"))
    print(pd.DataFrame(result["page_curve"]).round(3).to_string(index=False))
    print(pd.DataFrame(result["setup"]).round(1).to_string(index=False))
    if result["device_bytes_beyond"] is not None:
        beyond, kv = result["device_bytes_beyond"], result["kv_cache_bytes"]
        print(f"KV caches {kv / 2**30:.2f} GiB; device memory beyond: {beyond / 2**30:.2f} GiB")
    if "targets" in result:
        print(pd.DataFrame(result["targets"]).round(3).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
