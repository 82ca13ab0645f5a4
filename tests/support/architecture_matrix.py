"""Which architectures are served, and how: measured, one tiny random model each.

Every model is saved, loaded by transformers and by `Djinn`, and asked for greedy tokens. Each is
tried in a process of its own, since the faults looked for include those that end a process.

    python tests/support/architecture_matrix.py            # all of them
    python tests/support/architecture_matrix.py llama gpt2 # some

Results are kept one by one in architecture_matrix.json, from which docs/architectures.md is made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import architectures
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn_lib as dj
from djinn_lib.engine.models.packing import pack
from djinn_lib.engine.models.sources import open_source
from djinn_lib.paths import REPO

MODES: dict[str, dict[str, Any]] = {
    "eager": {"decode": "eager", "embeddings": "ring"},
    "graph": {"decode": "graph", "embeddings": "ring"},
    "tables in the host": {"decode": "eager", "embeddings": "host"},
    "larger than the ring": {"decode": "eager", "embeddings": "ring", "share": 0.8},
    "eager, bf16": {"decode": "eager", "embeddings": "ring", "dtype": torch.bfloat16},
}
IDENTICAL = "identical"
SLOWER = "identical (eager, with a warning)"
NOT_MADE = "not made: "
REFUSED = "refused: "
N_TOKENS = 8
TURNS = (("a", 0), ("b", 0), ("a", 1), ("b", 1))  # which copy of a model gets which prompt
PAGE_BYTES = 16 << 10
PROMPTS = (
    [5, 9, 17, 200, 31, 7],
    [3 + 7 * i * i % 300 for i in range(70)],  # longer than windows, chunks and short factors
)
LIMIT_BYTES, LIMIT_CPU_S = 24 << 30, 240  # address space: torch alone maps gigabytes
RESULTS = Path(__file__).with_name("architecture_matrix.json")
PAGE = REPO / "docs" / "architectures.md"


def judge(name: str) -> dict[str, str]:
    """Return what became of an architecture in each mode; runs in this process."""
    try:
        folder = Path(tempfile.mkdtemp())
        _save(name, folder)
        expected = {dtype: _expected(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    except Exception as error:
        return dict.fromkeys(MODES, NOT_MADE + _words(error))
    return {mode: _judge(folder, expected, **options) for mode, options in MODES.items()}


def _save(name: str, folder: Path) -> None:
    """Save a model whose greedy tokens vary."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures.tiny(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)


def _expected(folder: Path, dtype: torch.dtype) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return [_greedy(model, prompt) for prompt in PROMPTS]


def _greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([prompt])
    generate: Any = model.generate
    made = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


def _judge(
    folder: Path,
    expected: dict[torch.dtype, list[list[int]]],
    decode: Any,
    embeddings: Any,
    share: float = 1.5,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Serve two copies of a model in a ring of `share` of one, by turns."""
    said: list[str] = []
    try:
        n_bytes = _bytes(folder, dtype, embeddings)
        capacity = max(1, round(share * n_bytes / PAGE_BYTES)) * PAGE_BYTES
        with (
            _warnings(said),
            dj.Djinn(
                capacity,
                "cpu",
                PAGE_BYTES,
                decode=decode,
                embeddings=embeddings,
                max_model_len=128,
                progress=lambda step: None,
            ) as djinn,
        ):
            for copy in ("a", "b"):
                djinn.add(copy, folder, dtype=dtype)
            for copy, i in TURNS:
                got = djinn.generate(copy, PROMPTS[i], N_TOKENS, ignore_eos=True).token_ids
                if list(got) != expected[dtype][i]:
                    return f"WRONG: {list(got)} instead of {expected[dtype][i]}"
            djinn.check()
    except dj.DjinnError as error:
        return REFUSED + _words(error)
    except Exception as error:
        traceback.print_exc()
        return f"BARE {_words(error)}"
    if decode != "eager" and any("eager" in line or "own generate" in line for line in said):
        return SLOWER
    return IDENTICAL


def _bytes(folder: Path, dtype: torch.dtype, embeddings: Any) -> int:
    return pack(open_source(folder, dtype).module, embeddings)[0].paged_bytes


@contextlib.contextmanager
def _warnings(said: list[str]) -> Iterator[None]:
    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("djinn_lib")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _words(error: BaseException) -> str:
    said = str(error).strip()
    first = said.splitlines()[0] if said else ""
    return f"{type(error).__name__}: {first}"[:240]


def judge_apart(name: str) -> dict[str, str]:
    """`judge` in a process of its own, with limits; what ends it is a verdict too.

    It is forked off a server that has imported everything, and has computed nothing: the threads of
    a process that has computed do not survive a fork.
    """
    receiving, sending = _SERVER.Pipe(duplex=False)
    child = _SERVER.Process(target=_judge_for, args=(name, sending))
    child.start()
    sending.close()
    verdicts = {}
    with receiving, contextlib.suppress(EOFError):
        verdicts = receiving.recv()
    child.join()
    return verdicts or dict.fromkeys(MODES, f"DIED: status {child.exitcode}")


def _judge_for(name: str, sending: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S))
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sending.send(judge(name))


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["architecture_matrix"])


def is_good(verdict: str) -> bool:
    """Whether a verdict is one that a user can live with."""
    return verdict in (IDENTICAL, SLOWER) or verdict.startswith((REFUSED, NOT_MADE))


def keep(name: str, verdicts: dict[str, str]) -> None:
    """Keep what became of an architecture, and write the page of the documentation again."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[name] = {"transformers": transformers.__version__, "verdicts": verdicts}
    RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(kept))


def page(kept: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    results: dict[str, dict[str, str]] = {n: kept[n]["verdicts"] for n in sorted(kept)}
    versions = sorted({entry["transformers"] for entry in kept.values()})
    untried = [name for name in architectures.NAMES if name not in kept]
    same = [n for n, by in results.items() if set(by.values()) == {IDENTICAL}]
    slower = [n for n, by in results.items() if SLOWER in by.values()]
    refused = {
        n: by for n, by in results.items() if any(v.startswith(REFUSED) for v in by.values())
    }
    absent = {n: by for n, by in results.items() if by["eager"].startswith(NOT_MADE)}
    lines = [
        "# Supported architectures",
        "",
        "Any decoder-only transformers model in safetensors can be added. This page is generated:",
        "each architecture was saved as a tiny random model, and its greedy tokens were compared",
        f"with those of `from_pretrained(...).generate` (transformers {', '.join(versions)}).",
        f"The modes are {', '.join(MODES)}. To measure again: `make architectures`.",
        "",
        f"**Identical in every mode ({len(same)})**: {', '.join(same)}.",
        "",
        f"**Identical, but decoded eagerly where recording was asked for ({len(slower)})**; `add`",
        f"logs why: {', '.join(slower)}.",
        "",
        f"**Refused with an error ({len(refused)})**",
        "",
        "| architecture | mode | error |",
        "|---|---|---|",
        *(
            f"| {name} | {mode} | {verdict.removeprefix(REFUSED).replace('|', '/')} |"
            for name, by in refused.items()
            for mode, verdict in by.items()
            if verdict.startswith(REFUSED)
        ),
        "",
        f"**Not made ({len(absent)})**: transformers itself could not make, save or run a tiny "
        "model",
        "with this project's configuration of it.",
        "",
        "| architecture | transformers' error |",
        "|---|---|",
        *(
            f"| {name} | {by['eager'].removeprefix(NOT_MADE).replace('|', '/')} |"
            for name, by in absent.items()
        ),
        "",
        f"**Not measured yet ({len(untried)})**: {', '.join(untried) or 'none'}.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Judge some architectures, or all, and keep the results; returns how many are bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or architectures.NAMES
    results: dict[str, dict[str, str]] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for name, verdicts in zip(names, threads.map(judge_apart, names), strict=True):
            results[name] = verdicts
            keep(name, verdicts)
            for mode, verdict in verdicts.items():
                print(f"{name:22} {mode:22} {verdict}", flush=True)
    n_bad = sum(not is_good(v) for verdicts in results.values() for v in verdicts.values())
    print(f"{len(results)} architectures, {n_bad} verdicts of them bad")
    return n_bad


if __name__ == "__main__":
    sys.exit(bool(main()))
