"""The kernel that decodes compressed pages, in Triton's interpreter, without a GPU.

    TRITON_INTERPRET=1 python tests/support/interpreted_pages.py

A process of its own, since the interpreter must be chosen before a kernel is defined. Prints what
was found as JSON, a line a case.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from djinn_lib.engine.memory.compressed import kernel
from djinn_lib.engine.memory.compressed.encode import encode
from djinn_lib.engine.memory.compressed.form import BLOCK_WORDS, EXPONENT_BITS, TILE_WORDS

LENGTHS = (1, 7, BLOCK_WORDS, BLOCK_WORDS + 1, TILE_WORDS + 3 * BLOCK_WORDS + 5)
MARK = 0x5A


def words_of(weights: torch.Tensor) -> np.ndarray:
    return weights.view(torch.int16).numpy().view(np.uint16)


def decoded(compressed: np.ndarray, form, n_beyond: int = 64) -> tuple[np.ndarray, bool]:
    """What the kernel writes, and whether it leaves alone what lies behind."""
    target = torch.full((form.plain_bytes + n_beyond,), MARK, dtype=torch.uint8)
    kernel.decode(torch.from_numpy(compressed), form, target[: form.plain_bytes])
    untouched = bool((target[form.plain_bytes :] == MARK).all())
    return target[: form.plain_bytes].numpy().view(np.uint16), untouched


def comes_back(words: np.ndarray, bits: int) -> dict[str, bool]:
    got, untouched = decoded(*encode(words, bits))
    return {"same": bool(np.array_equal(got, words)), "untouched": untouched}


def damaged(bits: int) -> dict[str, bool]:
    """Any bytes at all in the place of the compressed ones: wrong words, but inside the page."""
    rng, found = np.random.default_rng(0), []
    words = words_of(torch.empty(2 * BLOCK_WORDS, dtype=torch.bfloat16).normal_(0, 0.02))
    compressed, form = encode(words, bits)
    for value in (0, 0x7F, 0x80, 0xFF, None):
        changed = rng.integers(0, 256, len(compressed), dtype=np.uint8)
        if value is not None:
            changed[form.sections.starts] = value  # places far away, before and behind
        changed[form.sections.first] = 0xFF  # all of them escapes
        found.append(decoded(changed, form)[1])
    return {"untouched": all(found)}


def main() -> None:
    """Run everything."""
    torch.manual_seed(0)
    for dtype, bits in EXPONENT_BITS.items():
        for n_words in LENGTHS:
            weights = torch.empty(n_words, dtype=dtype).normal_(0, 0.02)
            show(f"{dtype} {n_words}", comes_back(words_of(weights), bits))
        show(f"{dtype} patterns", comes_back(np.arange(1 << 16, dtype=np.uint16), bits))
        show(f"{dtype} damaged", damaged(bits))


def show(case: str, found: dict[str, bool]) -> None:
    print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main()
