"""Test the engine with many concurrent requests: `python benchmarks/soak.py`.

Twelve models together exceed the ring and the host memory that they may use. Threads and asyncio
tasks send requests at the same time, and some requests are cancelled half-way. All tokens are
compared with those of transformers' own `generate` on each model alone. The test passes if no
request failed, no token differs, and memory, files and threads did not grow.

There are 10,000 requests on a CPU and 1,000 on a GPU. The exit status is 1 if the test fails.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.engine.djinn import Djinn
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.engine.serving.generation import Generation
from djinn_lib.errors import RequestCancelled
from djinn_lib.experiment.setup import machine
from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path

N_REQUESTS = {"cpu": 10_000, "cuda": 1_000}
N_PROMPTS = 4  # for each model; few, so each is used often
PROMPT_TOKENS = (3, 40)
NEW_TOKENS = (1, 12)
SAMPLES = 50
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama", "num_key_value_heads": 4},
    {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    {"model_type": "phi"},
    {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"model_type": "opt", "max_position_embeddings": 512},
    {"model_type": "gpt_neox"},
]
SCALES: dict[str, dict[str, int]] = {
    "cpu": {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 500},
    "cuda": {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 8_000},
}
# Large enough for varied tokens, small enough for activations to stay far from overflow.
SPREAD = {"cpu": 0.4, "cuda": 0.08}
N_LAYERS = {"cpu": (2, 3, 4), "cuda": (8, 12, 16)}
PAGE = {"cpu": "16KiB", "cuda": "16MiB"}


@dataclass
class Tally:
    """Counts of all outcomes so far, shared by all clients."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    loaded_bytes: int = 0
    prefetched_bytes: int = 0
    samples: list[dict[str, float]] = field(default_factory=list)

    def count(self, outcome: str, error: str = "") -> None:
        """Count how a request ended."""
        with self.lock:
            self.outcomes[outcome] += 1
            if error:
                self.errors.append(error)

    def served(self, g: Generation, as_expected: bool) -> None:
        """Count a served request."""
        self.count("ok" if as_expected else "mismatched")
        with self.lock:
            self.total_ms.append(g.total_ms)
            self.loaded_bytes += g.loaded_bytes
            self.prefetched_bytes += g.prefetched_bytes


@dataclass(frozen=True)
class Question:
    """A request with a known answer."""

    model: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def main() -> int:
    """Run the test, print and write the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, help="default 10,000 on a CPU, 1,000 on a GPU")
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--clients", type=int, default=16, help="threads, and as many tasks")
    parser.add_argument("--cancelled", type=float, default=0.02, help="share that is given up")
    parser.add_argument("--order", default="affinity", choices=("fifo", "affinity"))
    parser.add_argument("--capacity-share", type=float, default=0.4, help="ring, of all weights")
    parser.add_argument("--host-share", type=float, default=0.6, help="host memory, of all weights")
    parser.add_argument("--out", type=user_path, default=REPO / "data" / "runs" / "soak.json")
    options = parser.parse_args()
    result = soak(options)
    write_json(options.out, result)
    for name in ("requests", "outcomes", "requests_per_s", "total_ms", "growth", "flat"):
        print(f"{name}: {result[name]}")
    return 0 if result["flat"] and set(result["outcomes"]) <= {"ok", "cancelled"} else 1


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run the test, and return the results as plain data."""
    n_requests = options.requests or N_REQUESTS[options.device]
    specs = make_specs(options.device, options.models)
    questions, sizes = ask_alone(specs, options.device)
    tally = Tally()
    with (
        tempfile.TemporaryDirectory(prefix="djinn-soak-") as folder,
        Djinn(
            max(int(sum(sizes.values()) * options.capacity_share), max(sizes.values())),
            options.device,
            PAGE[options.device],
            decode="graph",
            max_model_len=PROMPT_TOKENS[1] + NEW_TOKENS[1],
            order=options.order,
            host_capacity=int(sum(sizes.values()) * options.host_share + 2 * max(sizes.values())),
            swap_dir=folder,
            progress=lambda step: None,
        ) as djinn,
    ):
        for name, spec in specs.items():
            djinn.add(name, spec)
        for question in questions:  # let allocators see every length
            djinn.generate(question.model, question.prompt, len(question.tokens), ignore_eos=True)
        begin_s = time.perf_counter()
        serve(djinn, questions, tally, n_requests, options)
        seconds = time.perf_counter() - begin_s
        djinn.check()
        residency = djinn.residency()
    growth, flat = judge(tally.samples)
    return {
        "device": options.device,
        "machine": machine.describe_machine(options.device),
        "versions": machine.versions(),
        "models": {name: n_bytes for name, n_bytes in sizes.items()},
        "capacity_share": options.capacity_share,
        "host_share": options.host_share,
        "order": options.order,
        "requests": n_requests,
        "outcomes": dict(tally.outcomes),
        "errors": tally.errors[:20],
        "seconds": seconds,
        "requests_per_s": n_requests / seconds,
        "total_ms": {f"p{q}": float(np.percentile(tally.total_ms, q)) for q in (50, 90, 99, 100)},
        "loaded_bytes": tally.loaded_bytes,
        "prefetched_bytes": tally.prefetched_bytes,
        "resident_bytes": int(residency.resident_bytes.sum()),
        "samples": tally.samples,
        "growth": growth,
        "flat": flat,
    }


def make_specs(device: str, n_models: int) -> dict[str, ModelSpec]:
    """Return models of several families and depths, with weights that give varied tokens."""
    specs = {}
    for i in range(n_models):
        family = FAMILIES[i % len(FAMILIES)]
        scale = dict(SCALES[device])
        if family["model_type"] == "opt":
            scale["ffn_dim"] = scale.pop("intermediate_size")
            scale["word_embed_proj_dim"] = scale["hidden_size"]
        config = {
            **family,
            **scale,
            "num_hidden_layers": N_LAYERS[device][i % len(N_LAYERS[device])],
            "num_attention_heads": 4 if device == "cpu" else 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            ("init_std" if family["model_type"] == "opt" else "initializer_range"): SPREAD[device],
        }
        # In half precision, two kernels may round a near tie to different tokens.
        specs[f"{family['model_type']}-{i}"] = ModelSpec(config, "float32", seed=i)
    return specs


def ask_alone(specs: dict[str, ModelSpec], device: str) -> tuple[list[Question], dict[str, int]]:
    """Return questions with the answers of each model alone, and the models' sizes."""
    rng, questions, sizes = random.Random(0), [], {}
    for name, spec in tqdm(specs.items(), desc="models by themselves", unit="model"):
        model = spec.build().to(device)
        sizes[name] = sum(p.numel() * p.element_size() for p in model.parameters())
        for _ in range(N_PROMPTS):
            vocab_size = model.config.get_text_config().vocab_size
            prompt = tuple(rng.randrange(2, vocab_size) for _ in range(rng.randint(*PROMPT_TOKENS)))
            tokens = generate_eager(model, prompt, rng.randint(*NEW_TOKENS), ignore_eos=True)
            questions.append(Question(name, prompt, tokens.token_ids))
        del model
    return questions, sizes


def serve(
    djinn: Djinn,
    questions: list[Question],
    tally: Tally,
    n_requests: int,
    options: argparse.Namespace,
) -> None:
    """Send requests from threads and tasks until there were `n_requests`."""
    numbers = iter(tqdm(range(n_requests), desc="soak", unit="req", mininterval=5))
    lock, every = threading.Lock(), max(1, n_requests // SAMPLES)

    def next_number() -> int | None:
        with lock:
            number = next(numbers, None)
            if number is not None and number % every == 0:
                tally.samples.append(sample(number, options.device))
            return number

    def ask(number: int) -> tuple[Question, bool, random.Random]:
        rng = random.Random(number)
        # Skewed, so some models stay resident and others are evicted.
        at = min(int(rng.expovariate(1.0) * len(questions) / 4), len(questions) - 1)
        return questions[at], rng.random() < options.cancelled, rng

    def thread() -> None:
        while (number := next_number()) is not None:
            question, gives_up, rng = ask(number)
            pending = None
            try:
                if gives_up:
                    pending = djinn.submit(
                        question.model, question.prompt, len(question.tokens), ignore_eos=True
                    )
                    time.sleep(rng.random() * 0.02)
                    pending.cancel()
                    g = pending.result()
                else:
                    g = djinn.generate(
                        question.model, question.prompt, len(question.tokens), ignore_eos=True
                    )
                tally.served(g, g.token_ids == question.tokens)
            except (CancelledError, RequestCancelled):
                tally.count("cancelled")
            except Exception as error:
                tally.count("failed", f"{type(error).__name__}: {error}")

    async def task() -> None:
        while (number := next_number()) is not None:
            question, gives_up, rng = ask(number)
            asked = djinn.agenerate(
                question.model, question.prompt, len(question.tokens), ignore_eos=True
            )
            try:
                g = await asyncio.wait_for(asked, rng.random() * 0.02 if gives_up else None)
                tally.served(g, g.token_ids == question.tokens)
            except TimeoutError:
                tally.count("cancelled")
            except Exception as error:
                tally.count("failed", f"{type(error).__name__}: {error}")

    async def tasks() -> None:
        await asyncio.gather(*(task() for _ in range(options.clients)))

    threads = [threading.Thread(target=thread) for _ in range(options.clients)]
    for client in threads:
        client.start()
    asyncio.run(tasks())
    for client in threads:
        client.join()


def sample(number: int, device: str) -> dict[str, float]:
    """Return the memory, files and threads that the process has now."""
    process = psutil.Process()
    held: dict[str, float] = {
        "request": number,
        "rss_bytes": process.memory_info().rss,
        "fds": process.num_fds(),
        "threads": process.num_threads(),
    }
    if device == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        held["device_bytes"] = total_bytes - free_bytes
    return held


def judge(samples: list[dict[str, float]]) -> tuple[dict[str, float], bool]:
    """Return how much the process grew during the run, and whether that is small.

    The growth is that from the second to the last fifth of the run. The first fifth is left out,
    because threads, caches and allocators still grow then. Medians are used because the number of
    requests in flight varies.
    """
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples[:1], samples[-fifth:]
    growth = {}
    for name in samples[0]:
        if name != "request":
            before, after = (float(np.median([s[name] for s in part])) for part in (early, late))
            growth[name] = after - before
    rss_bytes = float(np.median([s["rss_bytes"] for s in early]))
    flat = growth["rss_bytes"] <= 0.02 * rss_bytes and growth["fds"] <= 2 and growth["threads"] <= 2
    return growth, bool(flat and growth.get("device_bytes", 0.0) <= 0)


if __name__ == "__main__":
    sys.exit(main())
