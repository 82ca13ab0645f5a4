"""Test large models on one ring under vLLM: `python benchmarks/fleet_switches.py`.

The models are a dense model in bf16, the same with FP8 weights, and a mixture of experts. They have
random weights, and the ring holds 60% of all weights. Requests are sent one at a time to each model
in turn, so every request needs a switch. Their tokens are compared with those of plain vLLM, which
serves the same requests one at a time before. `--shapes tiny` does this in a minute on a CPU, where
vLLM has no FP8.

The exit status is 1 if a token differs, or if there were fewer switches than requested.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.experiment import machine
from djinn_lib.files import write_json
from djinn_lib.fleet.engines import EngineClient
from djinn_lib.fleet.environment import vllm_python
from djinn_lib.fleet.fleet import Fleet
from djinn_lib.fleet.options import defaults_on
from djinn_lib.paths import REPO, user_path
from djinn_lib.units import format_bytes, parse_bytes

SHARE = 0.6  # of all weights, which the ring holds
N_PROMPTS = 4  # for each model
Tokens = tuple[int, ...]

_TODAY = {
    "num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_theta": 1e6,
}  # fmt: skip
_TINY = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its configuration, and vLLM options in addition to those of all engines."""

    name: str
    config: Mapping[str, Any]
    dtype: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bytes_a_weight: float = 2.0  # on the ring; the checkpoint may have more

    @property
    def own(self) -> dict[str, Any]:
        """The options of its engine that others do not have."""
        return {"dtype": self.dtype, **self.options}


_DENSE = {
    **_TODAY, "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "today": [
        Case("dense-bf16", _DENSE, "bfloat16"),
        Case("dense-fp8", _DENSE, "bfloat16", {"quantization": "fp8"}, bytes_a_weight=1.2),
        Case(
            "moe-bf16",
            {**_TODAY, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
             "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8,
             "num_hidden_layers": 14, "num_key_value_heads": 4},
            "bfloat16",
        ),
    ],
    "tiny": [
        Case("dense", {**_TINY, "model_type": "qwen3", "intermediate_size": 512}, "float32"),
        Case("llama", {**_TINY, "model_type": "llama", "intermediate_size": 512}, "float32"),
        Case(
            "moe",
            {**_TINY, "model_type": "qwen3_moe", "intermediate_size": 512, "num_experts": 4,
             "moe_intermediate_size": 256, "num_experts_per_tok": 2},
            "float32",
        ),
    ],
}  # fmt: skip


def main() -> int:
    """Measure, print and write the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="today" if gpu else "tiny")
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=50 if gpu else 12, help="of each request")
    parser.add_argument("--prompt-tokens", type=int, default=110 if gpu else 12)
    parser.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=not gpu,
        help="without compiled code",
    )
    parser.add_argument("--page", default="64MiB" if gpu else "256KiB")
    parser.add_argument("--folder", type=user_path, help="of the models; default: a temporary one")
    parser.add_argument(
        "--out", type=user_path, default=REPO / "data" / "runs" / "fleet_switches.json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="djinn-shapes-") as scratch:
        result = measure(options, options.folder or Path(scratch), "cuda" if gpu else "cpu")
    write_json(options.out, result)
    for row in result["models"]:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))
    n_switches = sum(row["switches"] for row in result["models"])
    same = all(row["equal_to_plain_vllm"] == row["requests"] for row in result["models"])
    print(f"{n_switches} switches, tokens {'equal' if same else 'DIFFERENT'}")
    return 0 if same and n_switches >= options.switches else 1


def measure(options: argparse.Namespace, folder: Path, device: str) -> dict[str, Any]:
    """Serve all requests with plain vLLM, then from a ring; return plain data."""
    cases = SHAPES[options.shapes]
    folders = dict(_checkpoints(cases, folder, device))
    prompts = _prompts(cases, options.prompt_tokens)
    engine_options = _engine_options(options, device)
    with ThreadPoolExecutor() as threads:  # engines take minutes to start, mostly to compile
        plain = dict(
            threads.map(
                lambda one: (
                    one.name,
                    _plain(one, folders[one.name], prompts[one.name], engine_options, options),
                ),
                cases,
            )
        )
    sizes = {one.name: _ring_bytes(one, folders[one.name]) for one in cases}
    capacity = max(int(SHARE * sum(sizes.values())), max(sizes.values()))
    capacity += 2 * parse_bytes(options.page)
    served: dict[str, list[dict[str, Any]]] = {one.name: [] for one in cases}
    with Fleet(capacity, device, options.page) as fleet:
        with ThreadPoolExecutor() as threads:
            adding = [
                threads.submit(fleet.add, one.name, folders[one.name], **engine_options, **one.own)
                for one in cases
            ]
            for one in adding:
                one.result()
        for one in cases:
            print(f"{one.name}: {format_bytes(fleet.engine(one.name).call('ring_bytes'))}")
        for i in range(options.switches + len(cases)):  # those that are resident at first
            name, prompt = cases[i % len(cases)].name, i // len(cases) % N_PROMPTS
            g = fleet.generate(name, prompts[name][prompt], options.tokens, ignore_eos=True)
            served[name].append(
                {"prompt": prompt, "tokens": g.token_ids, "loaded_bytes": g.loaded_bytes,
                 "ttft_ms": g.ttft_ms, "total_ms": g.total_ms}
            )  # fmt: skip
        stats = fleet.stats().set_index("model")
    rows = [_row(name, requests, plain[name], stats) for name, requests in served.items()]
    return {
        "machine": machine.describe_machine(device),
        "versions": machine.versions(),
        "shapes": options.shapes,
        "capacity_bytes": capacity,
        "models": rows,
    }


def _row(name: str, requests: list[dict[str, Any]], plain: list[Tokens], stats: Any) -> Any:
    first = {one["prompt"]: one["tokens"] for one in reversed(requests)}
    return {
        "model": name,
        "requests": len(requests),
        "equal_to_plain_vllm": sum(one["tokens"] == plain[one["prompt"]] for one in requests),
        "equal_to_the_first_time": sum(one["tokens"] == first[one["prompt"]] for one in requests),
        "first_differing_token": min(
            (_differs(first[i], plain[i]) for i in first), default=len(plain[0])
        ),
        "distinct_tokens": len({token for ids in plain for token in ids}),
        "switches": int(stats.switches[name]),
        "loaded_bytes": int(stats.loaded_bytes[name]),
        "median_ttft_ms": round(statistics.median(one["ttft_ms"] for one in requests), 1),
        "median_total_ms": round(statistics.median(one["total_ms"] for one in requests), 1),
    }


def _differs(a: Tokens, b: Tokens) -> int:
    """Return the place of the first token that differs; their number without one."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _checkpoints(cases: list[Case], folder: Path, device: str) -> Iterator[tuple[str, Path]]:
    """Write each configuration once, with random weights."""
    written: dict[str, Path] = {}
    for one in cases:
        key = repr(one.config)
        if key not in written:
            written[key] = folder / one.name
            if not (written[key] / "config.json").exists():
                print(f"making {one.name}", flush=True)
                spec = ModelSpec(dict(one.config), one.dtype, seed=len(written))
                spec.build(device).save_pretrained(written[key])
                if device == "cuda":
                    torch.cuda.empty_cache()
        yield one.name, written[key]


def _prompts(cases: list[Case], n_tokens: int) -> dict[str, list[list[int]]]:
    draw = random.Random(0)
    return {
        one.name: [
            [draw.randrange(3, one.config["vocab_size"]) for _ in range(n_tokens)]
            for _ in range(N_PROMPTS)
        ]
        for one in cases
    }


def _engine_options(options: argparse.Namespace, device: str) -> dict[str, Any]:
    return {
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": options.prompt_tokens + options.tokens + 16,
        **defaults_on(device),
        "enforce_eager": options.enforce_eager,
    }


def _ring_bytes(case: Case, folder: Path) -> int:
    """Estimate the bytes of the ring that a model needs."""
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return int(n_bytes * case.bytes_a_weight / 2)


def _plain(
    case: Case,
    folder: Path,
    prompts: list[list[int]],
    engine_options: dict[str, Any],
    options: argparse.Namespace,
) -> list[Tokens]:
    """Return the tokens of vLLM without a ring, one request at a time."""
    print(f"plain vLLM with {case.name}", flush=True)
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    wanted = {"model": str(folder), "disable_log_stats": True, **engine_options, **case.own}
    with tempfile.TemporaryDirectory(prefix="djinn-plain-") as logs:
        engine = EngineClient(case.name, vllm_python(), wanted, Path(logs) / "log", variables)
        try:
            parameters = {"max_tokens": options.tokens, "temperature": 0.0, "ignore_eos": True}
            return [tuple(engine.submit(one, parameters).result()["token_ids"]) for one in prompts]
        finally:
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
