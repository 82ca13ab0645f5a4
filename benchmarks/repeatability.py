"""Look for recorded steps that do not repeat their results: `python benchmarks/repeatability.py`.

The same prompt is decoded again and again by transformers' own steps, recorded as CUDA graphs, and
each logit is compared with the first time. Every variant changes one thing that could make results
differ, in a process of its own: how cuBLAS splits its sums and where it keeps partial ones, which
attention is used, whether graphs are used at all. Outputs of all modules are kept too, so that the
first module that differs is known.

On the CPU, where nothing is recorded and nothing differs, it only shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from djinn_lib.engine.decode.cuda_graphs import Recorder
from djinn_lib.engine.decode.recorded import RecordedDecoder
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.experiment.setup import machine
from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path
from djinn_lib.provenance import git_state

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "sliding_window": None,
    },
    "tiny": {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
        "sliding_window": None,
    },
}  # fmt: skip
N_PROMPT, MAX_MODEL_LEN = 110, 256


def _no_split_k() -> AbstractContextManager[Any]:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]
    matmul.allow_fp16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]
    return nullcontext()


# Environment variables, which count before CUDA starts, and a context around all work.
Variant = tuple[dict[str, str], Callable[[], AbstractContextManager[Any]]]
VARIANTS: dict[str, Variant] = {
    "as it is": ({}, nullcontext),
    "without graphs": ({}, nullcontext),
    "no split-K": ({}, _no_split_k),
    "cuBLAS workspace of 8 x 4 MiB": ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, nullcontext),
    "no cuBLAS workspace": ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, nullcontext),
    "attention: math": ({}, lambda: sdpa_kernel(SDPBackend.MATH)),
    "attention: efficient": ({}, lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)),
}


def main() -> int:
    """Run all variants, print and write what they gave; return the exit status."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b" if gpu else "tiny")
    parser.add_argument("--layers", type=int, default=8 if gpu else 2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=50 if gpu else 4, help="of each decode")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 3)
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=list(VARIANTS),
        default=list(VARIANTS)[: None if gpu else 2],
    )
    parser.add_argument("--one", choices=list(VARIANTS), help="run one variant in this process")
    parser.add_argument("--out", type=user_path,
                        default=REPO / "data" / "runs" / "repeatability.json")  # fmt: skip
    options = parser.parse_args()
    if options.one:
        with VARIANTS[options.one][1]():
            print(json.dumps(measured(options)))
        return 0
    commit, dirty = git_state(REPO)
    rows = []
    for name in options.variants:
        rows.append({"variant": name, **in_a_process(name, options)})
        print(rows[-1], flush=True)
        write_json(options.out, {
            "command": "python benchmarks/repeatability.py", "git_commit": commit,
            "git_dirty": dirty, "machine": machine.describe_machine("cuda" if gpu else "cpu"),
            "shape": SHAPES[options.shape], "layers": options.layers, "dtype": options.dtype,
            "tokens": options.tokens, "repeats": options.repeats, "rows": rows,
        })  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False, na_rep="-"))
    print(f"written: {options.out}")
    return 1 if any(row.get("error") for row in rows) else 0


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a variant gives, or why it could not run."""
    given = ("shape", "layers", "dtype", "tokens", "repeats")
    arguments = [text for key in given for text in (f"--{key}", str(getattr(options, key)))]
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, *arguments],
        env={**os.environ, **VARIANTS[name][0]},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Decode one prompt again and again, and compare each step with that of the first time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {**SHAPES[options.shape], "num_hidden_layers": options.layers}
    model = ModelSpec(shape, options.dtype, seed=2).build(device)
    recorder = Recorder(device)
    if options.one == "without graphs":
        recorder._on_gpu = False  # functions are called again instead, as on the CPU
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, shape["vocab_size"], (N_PROMPT,), generator=generator).tolist()
    with torch.no_grad(), kept_outputs(model) as kept:
        decoder = RecordedDecoder(model, pack(model)[1], MAX_MODEL_LEN, recorder)
        first = list(steps(decoder, prompt, options.tokens, kept))
        prefills, different, where = 0, 0, ""
        for _ in range(options.repeats - 1):
            again = steps(decoder, prompt, options.tokens, kept)
            for step, (was, now) in enumerate(zip(first, again, strict=True)):
                # The logits come last: a module before them may differ without changing them.
                if apart := [name for name in was if not torch.equal(was[name], now[name])]:
                    different += 1
                    prefills += step == 0
                    where = where or f"step {step}: {apart[0]}"
                    break
    return {"repeats that differ": different, "of": options.repeats - 1,
            "in the prefill": prefills, "first difference": where}  # fmt: skip


@contextmanager
def kept_outputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the output of each module that returns a tensor for one token, in the order of calls.

    Recorded hooks copy to tensors that keep their addresses.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, torch.Tensor) or output.is_meta:
            return  # whether a model can be recorded is tried without memory
        if output.shape[:2] == (1, 1):
            own = kept.pop(name) if name in kept else torch.empty_like(output)
            kept[name] = own.copy_(output)  # last, as it was called last

    hooks = [
        module.register_forward_hook(lambda _m, _a, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def steps(
    decoder: RecordedDecoder, prompt: list[int], n_tokens: int, kept: dict[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Decode greedily; yield the logits after the prefill, then all outputs of each step."""
    decoder._load_prompt(prompt)
    decoder._prefills[decoder._prefill_length(len(prompt))].replay()
    yield {"logits": decoder._logits.clone()}
    for _ in range(n_tokens - 1):
        decoder._step.replay()
        yield {**{name: tensor.clone() for name, tensor in kept.items()},
               "logits": decoder._logits.clone()}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
