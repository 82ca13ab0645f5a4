"""Serve several models on one ring under vLLM at once, and compare them with plain vLLM.

This is a demonstration for every machine with vLLM, and a check that the tokens are those of vLLM
without a ring. Cells measure the times, as for any other system.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.engine.models.checkpoint import folder_config
from djinn_lib.errors import ConfigError
from djinn_lib.experiment.bench import Bench
from djinn_lib.files import write_json
from djinn_lib.fleet import environment
from djinn_lib.fleet.engines import EngineClient
from djinn_lib.fleet.fleet import Fleet
from djinn_lib.fleet.options import KV_CACHE_BYTES
from djinn_lib.rows import token_sha
from djinn_lib.units import parse_bytes

FILE = "fleet.json"
REQUESTS = ("model", "request", "begin_s", "first_s", "end_s", "loaded_bytes", "switch_ms", "ids")
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class FleetRun:
    """Requests and states of the ring over time; times count from the first request.

    Attributes:
        reason: why nothing can run here, or None.
        capacity_bytes: capacity of the ring.
        requests: a row each: model, request, begin_s, first_s, end_s, loaded_bytes, switch_ms, ids.
        residency: a row for each time and model: at_s, model, resident_bytes.
        stats: a row for each model: costs of its leases.
        plain: token ids of plain vLLM, by (model, request).
    """

    reason: str | None = None
    capacity_bytes: int = 0
    requests: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(REQUESTS)))
    residency: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["at_s", "model", "resident_bytes"])
    )
    stats: pd.DataFrame = field(default_factory=pd.DataFrame)
    plain: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)

    def tokens(self) -> pd.DataFrame:
        """One row a model: requests, how many gave plain vLLM's tokens, and a hash of all ids."""
        rows = [
            {
                "model": model,
                "requests": len(part),
                "equal_to_plain_vllm": sum(
                    self.plain.get((model, one.request)) == one.ids for one in part.itertuples()
                ),
                "token_sha": token_sha([i for ids in part.sort_values("request").ids for i in ids]),
            }
            for model, part in self.requests.groupby("model", sort=False)
        ]
        return pd.DataFrame(rows, columns=["model", "requests", "equal_to_plain_vllm", "token_sha"])


def measure(bench: Bench, share: float, n_requests: int, n_tokens: int) -> FleetRun:
    """Send requests to all models of a bench at once, on a ring of a share of their weights.

    `n_requests` and `n_tokens` are for each model and each request. The ring is drawn in the
    notebook meanwhile.

    Raises:
        ConfigError: the largest model does not fit into the ring, or there are no requests.
    """
    if n_requests < 1 or n_tokens < 1:
        raise ConfigError(f"{n_requests} requests of {n_tokens} tokens: ask for one at least")
    largest = max(files.n_bytes for files in bench.models.values())
    least_bytes = largest + 2 * parse_bytes(bench.profile.page)
    capacity_bytes = max(int(share * bench.total_bytes), least_bytes)
    reason = environment.unavailable()
    run = FleetRun(reason) if reason else _measured(bench, capacity_bytes, n_requests, n_tokens)
    found = {
        "state": "unavailable" if reason else "ok",
        "reason": reason,
        "capacity_bytes": capacity_bytes,
        "tokens": run.tokens().to_dict("records"),
        "stats": run.stats.to_dict("records"),
    }
    write_json(bench.run_dir / FILE, found)
    return run


def _measured(bench: Bench, capacity_bytes: int, n_requests: int, n_tokens: int) -> FleetRun:
    prompts = _prompts(bench, n_requests)
    plain = _plain(bench, prompts, n_tokens)
    device, page = bench.profile.device, bench.profile.page
    with Fleet(capacity_bytes, device, page, quantum_s=0.05, max_wait_s=0.5) as fleet:
        with ThreadPoolExecutor(_n_starts(bench)) as threads:
            list(threads.map(
                lambda name: fleet.add(
                    name, bench.models[name].folder, **_options(bench, name, n_tokens)
                ),
                bench.models,
            ))  # fmt: skip
        with fleet.live(), _sampled(fleet) as samples:
            rows, begin_s = _ask_all(fleet, prompts, n_tokens)
        residency = pd.DataFrame(samples, columns=["at_s", "model", "resident_bytes"])
        residency["at_s"] -= begin_s
        return FleetRun(None, capacity_bytes, rows, residency, fleet.stats(), plain)


def _ask_all(
    fleet: Fleet, prompts: dict[tuple[str, int], list[int]], n_tokens: int
) -> tuple[pd.DataFrame, float]:
    """Submit all requests at once; return their rows, and the time of the first submission."""
    begin_s = time.perf_counter()
    asked: dict[tuple[str, int], Future[Any]] = {
        key: fleet.submit(key[0], ids, n_tokens, ignore_eos=True) for key, ids in prompts.items()
    }
    rows = []
    for (model, request), pending in asked.items():
        g = pending.result()
        at_s: float = pending.submitted_s - begin_s  # type: ignore[attr-defined]
        rows.append(
            (model, request, at_s, at_s + g.ttft_ms / 1e3, at_s + g.total_ms / 1e3,
             g.loaded_bytes, g.switch_ms, g.token_ids)
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(REQUESTS)), begin_s


@contextmanager
def _sampled(fleet: Fleet) -> Iterator[list[tuple[float, str, int]]]:
    """Record the state of the ring repeatedly while the block runs."""
    samples: list[tuple[float, str, int]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_SAMPLE_S):
            resident, now_s = fleet.status().resident_bytes(), time.perf_counter()
            samples.extend((now_s, model, n_bytes) for model, n_bytes in resident.items())

    with ThreadPoolExecutor(1) as thread:
        looking = thread.submit(look)
        try:
            yield samples
        finally:
            ended.set()
            looking.result()


def _plain(
    bench: Bench, prompts: dict[tuple[str, int], list[int]], n_tokens: int
) -> dict[tuple[str, int], tuple[int, ...]]:
    """Return the tokens of vLLM without a ring."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    parameters = {"max_tokens": n_tokens, "temperature": 0.0, "ignore_eos": True}

    def said_by(name: str) -> dict[tuple[str, int], tuple[int, ...]]:
        print(f"starting plain vLLM with {name}", flush=True)
        options = {
            "model": str(bench.models[name].folder),
            "kv_cache_memory_bytes": KV_CACHE_BYTES[bench.profile.device],
            "enforce_eager": bench.profile.device == "cpu",
            **_options(bench, name, n_tokens),
        }
        log = Path(logs) / f"{name}.log"
        engine = EngineClient(name, environment.vllm_python(), options, log, variables)
        try:
            asked = {
                key: engine.submit(ids, parameters)
                for key, ids in prompts.items()
                if key[0] == name
            }
            return {key: tuple(one.result()["token_ids"]) for key, one in asked.items()}
        finally:
            engine.close()

    with (
        tempfile.TemporaryDirectory(prefix="djinn-plain-") as logs,
        ThreadPoolExecutor(_n_starts(bench)) as threads,
    ):
        return {
            key: ids for part in threads.map(said_by, bench.models) for key, ids in part.items()
        }


def _n_starts(bench: Bench) -> int:
    """How many engines start at the same time: on a GPU one, for a model that loads is there twice.

    On a CPU starting is importing vLLM, which takes one core for many seconds.
    """
    return 2 if bench.profile.device == "cpu" else 1


def _options(bench: Bench, name: str, n_tokens: int) -> dict[str, Any]:
    return {
        "dtype": bench.models[name].dtype,
        "skip_tokenizer_init": True,
        "max_model_len": bench.profile.prompt_tokens + n_tokens + 16,
    }


def _prompts(bench: Bench, n_requests: int) -> dict[tuple[str, int], list[int]]:
    """Seeded random ids, the models by turns."""
    draw = random.Random(0)
    sizes = {
        name: folder_config(files.folder).get_text_config().vocab_size
        for name, files in bench.models.items()
    }
    return {
        (name, request): [draw.randrange(3, size) for _ in range(bench.profile.prompt_tokens)]
        for request in range(n_requests)
        for name, size in sizes.items()
    }
