"""Look for recorded steps that do not repeat their results: `python benchmarks/repeatability.py`.

The same prompt is decoded again and again by transformers' own steps, and each logit is compared
with the first time. Every variant changes one thing that could make results differ: whether and how
the step is recorded, which library multiplies and how it splits its sums, which attention is used.
A variant that *watches* also keeps the output of each module, so that the first module that differs
is known. But the copies stand between the kernels, and can hide what happens where one kernel
begins before the last one ends.

Variants with the same environment share a process and a model. On the CPU, where nothing is
recorded and nothing differs, the script only shows that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

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


@contextmanager
def _no_split_k() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    names = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, (False, False))
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


@contextmanager
def _blas(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@dataclass(frozen=True)
class Variant:
    """One way to decode.

    Attributes:
        environment: variables, which count before CUDA starts.
        around: a context around all work.
        step: "graph" is one recording, as in the product; "pieces" is one for each layer, between
            which nothing overlaps; "calls" records nothing.
        watched: keep the output of each module.
    """

    environment: dict[str, str] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: Literal["graph", "pieces", "calls"] = "graph"
    watched: bool = False


VARIANTS = {
    "as it is": Variant(),
    "not recorded": Variant(step="calls"),
    "as it is, watched": Variant(watched=True),
    "a recording for each layer": Variant(step="pieces"),
    "no split-K": Variant(around=_no_split_k),
    "cuBLASLt": Variant(around=lambda: _blas("cublaslt")),
    "attention: math": Variant(around=lambda: sdpa_kernel(SDPBackend.MATH)),
    "attention: efficient": Variant(around=lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)),
    "attention: cuDNN": Variant(around=lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    "cuBLAS workspace of 8 x 4 MiB": Variant({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    "no cuBLAS workspace": Variant({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}),
}
ON_A_CPU = ["as it is", "not recorded", "as it is, watched"]


def main() -> int:
    """Run all variants, print and write what they gave; return the exit status."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b" if gpu else "tiny")
    parser.add_argument("--layers", type=int, default=32 if gpu else 2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=50 if gpu else 4, help="of each decode")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 3)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS),
                        default=list(VARIANTS) if gpu else ON_A_CPU)  # fmt: skip
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    parser.add_argument("--out", type=user_path,
                        default=REPO / "data" / "runs" / "repeatability.json")  # fmt: skip
    options = parser.parse_args()
    if options.here:
        for row in measured(options):
            print(json.dumps(row), flush=True)
        return 0
    commit, dirty = git_state(REPO)
    rows = []
    for row in in_processes(options):
        rows.append(row)
        print(row, flush=True)
        write_json(options.out, {
            "command": "python benchmarks/repeatability.py", "git_commit": commit,
            "git_dirty": dirty, "machine": machine.describe_machine("cuda" if gpu else "cpu"),
            "shape": SHAPES[options.shape], "layers": options.layers, "dtype": options.dtype,
            "tokens": options.tokens, "repeats": options.repeats, "rows": rows,
        })  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False, na_rep="-"))
    print(f"written: {options.out}")
    return 1 if any(row.get("error") for row in rows) else 0


def in_processes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of each variant, or why it could not run; a process for each environment."""
    given = ("shape", "layers", "dtype", "tokens", "repeats")
    arguments = [text for key in given for text in (f"--{key}", str(getattr(options, key)))]
    for environment, group in groupby(options.variants, lambda name: VARIANTS[name].environment):
        left = list(group)
        child = subprocess.Popen(
            [sys.executable, __file__, "--here", *arguments, "--variants", *left],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            for line in child.stdout or ():
                if line.startswith("{"):
                    row = json.loads(line)
                    left.remove(row["variant"])
                    yield row
        for name in left:
            yield {"variant": name, "error": f"its process ended with status {child.returncode}"}


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decode one prompt again and again, and compare each step with that of the first time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {**SHAPES[options.shape], "num_hidden_layers": options.layers}
    model = ModelSpec(shape, options.dtype, seed=2, init="plain").build(device)
    for name in options.variants:
        try:
            with VARIANTS[name].around():
                row = repeated(model, VARIANTS[name], options.tokens, options.repeats)
        except Exception as error:  # such as an attention that has no kernel for this mask
            row = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        yield {"variant": name, **row}


def repeated(
    model: PreTrainedModel, variant: Variant, n_tokens: int, repeats: int
) -> dict[str, Any]:
    """Return how many repeats differ from the first, and where the first difference is."""
    recorder = Recorder(model.device)
    recorder._on_gpu &= variant.step != "calls"
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, model.config.vocab_size, (N_PROMPT,), generator=generator).tolist()
    watching = kept_outputs(model) if variant.watched else nullcontext({})
    with torch.no_grad(), watching as kept:
        units = pack(model)[1]
        decoder = RecordedDecoder(model, units, MAX_MODEL_LEN, recorder)
        if variant.step == "pieces":
            decoder._step = recorder.record(decoder._decode, model, units)
        first = list(steps(decoder, prompt, n_tokens, kept))
        prefills, different, where = 0, 0, ""
        for _ in range(repeats - 1):
            again = steps(decoder, prompt, n_tokens, kept)
            for step, (was, now) in enumerate(zip(first, again, strict=True)):
                # The logits come last: a module before them may differ without changing them.
                if apart := [name for name in was if not torch.equal(was[name], now[name])]:
                    different += 1
                    prefills += step == 0
                    where = where or f"step {step}: {apart[0]}"
                    break
        decoder.close()
    return {"repeats that differ": different, "of": repeats - 1,
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
