"""The kernel that decodes compressed pages: on a GPU, or in Triton's interpreter without one.

    TRITON_INTERPRET=1 python tests/support/decoded_pages.py cpu

A process of its own, since the interpreter must be chosen before a kernel is defined. Prints what
was found as JSON, a line a case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import torch

from djinn_lib.engine.memory.compressed import kernel
from djinn_lib.engine.memory.compressed.encode import encode
from djinn_lib.engine.memory.compressed.form import BLOCK_WORDS, EXPONENT_BITS, TILE_WORDS, Form

LENGTHS = (1, 7, BLOCK_WORDS, BLOCK_WORDS + 1, TILE_WORDS + 3 * BLOCK_WORDS + 5)
MARK = 0x5A


def words_of(weights: torch.Tensor) -> np.ndarray:
    return weights.view(torch.int16).numpy().view(np.uint16)


class Pages:
    """Decodes pages on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def decoded(self, compressed: np.ndarray, form: Form) -> tuple[np.ndarray, bool]:
        """What the kernel writes, and whether it leaves alone what lies behind."""
        n_bytes = form.plain_bytes
        target = torch.full((n_bytes + 64,), MARK, dtype=torch.uint8, device=self.device)
        kernel.decode(torch.from_numpy(compressed).to(self.device), form, target[:n_bytes])
        got = target.cpu()
        return got[:n_bytes].numpy().view(np.uint16), bool((got[n_bytes:] == MARK).all())

    def come_back(self, words: np.ndarray, bits: int) -> dict[str, bool]:
        """Whether words are the same after compressing and decoding."""
        got, untouched = self.decoded(*encode(words, bits))
        return {"same": bool(np.array_equal(got, words)), "untouched": untouched}

    def damaged(self, bits: int) -> dict[str, bool]:
        """Any bytes at all in the place of compressed ones: wrong words, but inside the page."""
        rng, found = np.random.default_rng(0), []
        words = words_of(torch.empty(2 * BLOCK_WORDS, dtype=torch.bfloat16).normal_(0, 0.02))
        compressed, form = encode(words, bits)
        for value in (0, 0x7F, 0x80, 0xFF, None):
            changed = rng.integers(0, 256, len(compressed), dtype=np.uint8)
            if value is not None:
                changed[form.sections.starts] = value  # places far away, before and behind
            changed[form.sections.first] = 0xFF  # all of them escapes
            found.append(self.decoded(changed, form)[1])
        return {"untouched": all(found)}

    def cases(self) -> Iterator[tuple[str, dict[str, bool]]]:
        """Everything, by name."""
        torch.manual_seed(0)
        for dtype, bits in EXPONENT_BITS.items():
            for n_words in LENGTHS:
                weights = torch.empty(n_words, dtype=dtype).normal_(0, 0.02)
                yield f"{dtype} {n_words}", self.come_back(words_of(weights), bits)
            every = np.arange(1 << 16, dtype=np.uint16)
            yield f"{dtype} patterns", self.come_back(every, bits)
            yield f"{dtype} damaged", self.damaged(bits)


if __name__ == "__main__":
    for case, found in Pages(sys.argv[1]).cases():
        print(json.dumps({"case": case, **found}), flush=True)
