"""Measure a model larger than the ring, and compare it with accelerate's offloading.

Every forward pass must load the bytes that do not stay on the device. So a token takes at least the
time to copy these bytes, and at least the time to compute. accelerate gets the same device memory
for the same first layers, and the same masters. Its hooks load each other layer when it is called
and drop it afterwards.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from djinn_lib.engine.decode.eager import Tokens, generate_eager
from djinn_lib.engine.djinn import Djinn
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.sources import open_source
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import ConfigError
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.large_results import COLUMNS, read_large, write_large
from djinn_lib.experiment.profile import REPO
from djinn_lib.experiment.setup import machine
from djinn_lib.experiment.setup.integrity import weights_digest
from djinn_lib.provenance import git_state
from djinn_lib.rows import token_sha
from djinn_lib.systems.accelerate import offload
from djinn_lib.units import format_bytes, parse_bytes, parse_capacity

Outcome = tuple[Tokens, int, float]  # tokens, bytes loaded, seconds of stalls
Run = Callable[[Sequence[int], int, int], Iterator[Outcome]]


@dataclass(frozen=True)
class LargeCase:
    """A model and a ring of `capacity_bytes` that is smaller.

    The source is a checkpoint's folder or a `ModelSpec`. With `resident`, the model is also
    measured in a ring that holds it, to get the time of computing alone.
    """

    name: str
    source: Path | ModelSpec
    dtype: str
    capacity_bytes: int
    resident: bool


def cases_of(bench: Bench) -> list[LargeCase]:
    """Return the cases that a profile lists."""
    cases, dtype = [], bench.profile.dtype
    for name, entry in bench.profile.large.items():
        if entry.model:
            source, n_bytes = bench.models[entry.model].folder, bench.models[entry.model].n_bytes
        else:
            source = ModelSpec(entry.config or {}, dtype, entry.seed, init="plain")
            n_bytes = pack(open_source(source).module)[0].n_bytes
        capacity_bytes = parse_capacity(entry.capacity, n_bytes)
        cases.append(LargeCase(name, source, dtype, capacity_bytes, resident=bool(entry.model)))
    return cases


def rows_of(bench: Bench, n_tokens: int, repeats: int, measure_again: bool = True) -> pd.DataFrame:
    """Measure every case of a profile and write the rows, or read the existing ones; return them.

    Raises:
        ConfigError: the profile has no such case, or the number of tokens is too small.
        RecordError: the run has no rows to read.
    """
    if not measure_again:
        return read_large(bench.run_dir)
    if n_tokens < 2:
        raise ConfigError(f"expected at least 2 tokens, to time one, got {n_tokens}")
    if not (cases := cases_of(bench)):
        raise ConfigError(
            f"expected cases under 'large' in the profile {bench.profile.name!r}, got none"
        )
    for case in cases:  # before minutes are spent on the first of them
        bytes_of(case)
    profile, manifest = bench.profile, _manifest(bench, n_tokens, repeats)
    measured = []
    for case in cases:
        prompt = _prompt(case, profile.prompt_tokens)
        measured.append(measure(case, profile.device, profile.page, prompt, n_tokens, repeats))
    rows = pd.concat(measured, ignore_index=True)
    write_large(rows, manifest, bench.run_dir)
    return rows


def _manifest(bench: Bench, n_tokens: int, repeats: int) -> dict[str, Any]:
    """Where the rows come from."""
    commit, dirty = git_state(REPO)
    given = bench.profile.model_dump(include={"large", "dtype", "page", "prompt_tokens"})
    return {
        "profile": bench.profile.name,
        "git_commit": commit,
        "git_dirty": dirty,
        "other_gpu_processes": machine.other_gpu_processes(),
        "versions": machine.versions(),
        "machine": bench.machine,
        "weights_sha256": {name: weights_digest(f.digests) for name, f in bench.models.items()},
        "parameters": {**given, "n_tokens": n_tokens, "repeats": repeats},
        "started_at_utc": datetime.now(UTC).isoformat(),
    }


def _prompt(case: LargeCase, n_tokens: int) -> list[int]:
    """Seeded random ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    config = open_source(case.source, case.dtype).module.config.get_text_config()
    return torch.randint(0, config.vocab_size, (n_tokens,), generator=generator).tolist()


def measure(
    case: LargeCase, device: str, page: str, prompt_ids: Sequence[int], n_tokens: int, repeats: int
) -> pd.DataFrame:
    """Generate with each system in turn and return a row for each repeat; see `COLUMNS`.

    Raises:
        ConfigError: the model fits into the ring.
        CapacityError: two consecutive layers do not fit.
    """
    rows: list[dict[str, Any]] = []
    facts = {
        "model": case.name,
        "model_bytes": bytes_of(case),
        "capacity_bytes": case.capacity_bytes,
        "link_bytes_per_s": machine.measure_rates(device)["link_rate_bytes_per_s"],
    }
    for system, run in _systems(case, device, page):
        print(f"{case.name}: {system}", flush=True)
        try:
            outcomes = list(run(prompt_ids, n_tokens, repeats))
            rows += [{**facts, "system": system, "repeat": i, **_row(outcome, n_tokens)}
                     for i, outcome in enumerate(outcomes)]  # fmt: skip
        except Exception as error:  # of one system: the others go on
            failed = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            rows.append({**facts, "system": system, "repeat": 0, **failed})
        gc.collect()
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def bytes_of(case: LargeCase) -> int:
    """Return the bytes of a case's model.

    Raises:
        ConfigError: the model fits into the ring.
    """
    layout = pack(open_source(case.source, case.dtype).module, "host")[0]
    if layout.paged_bytes <= case.capacity_bytes:
        raise ConfigError(
            f"expected a ring smaller than {case.name!r} ({format_bytes(layout.paged_bytes)}), got "
            f"{format_bytes(case.capacity_bytes)}: lower the capacity"
        )
    return layout.n_bytes


def _row(outcome: Outcome, n_tokens: int) -> dict[str, Any]:
    tokens, loaded_bytes, stall_s = outcome
    return {
        "n_tokens": len(tokens.token_ids),
        "ms_per_token": (tokens.last_s - tokens.first_s) / (n_tokens - 1) * 1e3,
        "ttft_ms": tokens.first_s * 1e3,
        "loaded_bytes_per_token": loaded_bytes / n_tokens,
        "stall_ms_per_token": stall_s / n_tokens * 1e3,
        "token_sha": token_sha(tokens.token_ids),
        "ok": True,
        "error": "",
    }


def _systems(case: LargeCase, device: str, page: str) -> Iterator[tuple[str, Run]]:
    if case.resident:
        n_bytes = pack(open_source(case.source, case.dtype).module)[0].n_bytes
        yield "resident", partial(_djinn, case, device, page, n_bytes + parse_bytes(page))
    yield "djinn", partial(_djinn, case, device, page, case.capacity_bytes)
    yield "accelerate", partial(_accelerate, case, device)


def _djinn(
    case: LargeCase,
    device: str,
    page: str,
    capacity_bytes: int,
    prompt_ids: Sequence[int],
    n_tokens: int,
    repeats: int,
) -> Iterator[Outcome]:
    with Djinn(capacity_bytes, device, page, decode="eager", progress=False) as djinn:
        djinn.add(case.name, case.source, dtype=case.dtype)
        djinn.generate(case.name, prompt_ids, 2, ignore_eos=True)  # warm-up
        for _ in range(repeats):
            g = djinn.generate(case.name, prompt_ids, n_tokens, ignore_eos=True)
            tokens = Tokens(g.token_ids, g.ttft_ms / 1e3, g.total_ms / 1e3)
            yield tokens, g.loaded_bytes, g.stall_ms / 1e3


def _accelerate(
    case: LargeCase, device: str, prompt_ids: Sequence[int], n_tokens: int, repeats: int
) -> Iterator[Outcome]:
    pool = HostMasters(pin=device == "cuda")
    try:
        opened = open_source(case.source, case.dtype)
        layout, units = pack(opened.module)
        pool.add(case.name, layout, opened.fill)
        weights = layout.views(pool.master(case.name))
        model, bytes_per_pass = offload(opened.module, units, weights, case.capacity_bytes, device)
        # Where it computes cannot be read off a model of which nothing stays.
        generate_eager(model, prompt_ids, 2, ignore_eos=True, device=device)  # warm-up
        for _ in range(repeats):
            tokens = generate_eager(model, prompt_ids, n_tokens, ignore_eos=True, device=device)
            yield tokens, bytes_per_pass * n_tokens, math.nan
    finally:
        pool.close()
