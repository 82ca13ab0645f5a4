"""Compressed masters on a GPU, one scenario a process.

python tests/support/gpu_compressed.py NAME
"""

from __future__ import annotations

import statistics
import sys
import time
from unittest import mock

import numpy as np
import torch
from decoded_pages import Pages, words_of
from gpu_scenarios import CONFIGS, CUDA, PROMPT, raises
from transformers import LlamaConfig

import djinn_lib as dj
from djinn_lib.engine.memory.compressed import kernel
from djinn_lib.engine.memory.compressed.encode import encode
from djinn_lib.engine.memory.compressed.form import EXPONENT_BITS
from djinn_lib.errors import DjinnError

PAGE = 64 << 20
LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=6, num_attention_heads=32,
    vocab_size=32000,
)  # fmt: skip


def decoded_pages():
    """The kernel gives every bit back, and stays inside of the page whatever the bytes are."""
    for case, found in Pages("cuda").cases():
        torch.cuda.synchronize()
        assert all(found.values()), (case, found)
        print(case)


def decoding_keeps_up_with_the_link():
    """A page is decoded many times faster than it crosses the link."""
    for dtype, bits in EXPONENT_BITS.items():
        words = words_of(torch.empty(PAGE // 2, dtype=dtype).normal_(0, 0.02))
        compressed, form = encode(words, bits)
        source = torch.from_numpy(compressed).to(CUDA)
        target = torch.empty(PAGE, dtype=torch.uint8, device=CUDA)
        print(f"{dtype}: {len(compressed) / PAGE:.4f} of the size")
        per_s = {}
        for n in (0.25, 0.5, 1, 2, 1000):
            target.zero_()
            with mock.patch.object(kernel, "PROGRAMS_PER_PROCESSOR", n):
                kernel.decode(source, form, target)  # compiles it
                seconds = median_s(lambda: kernel.decode(source, form, target))  # noqa: B023
            assert np.array_equal(target.cpu().numpy().view(np.uint16), words)
            per_s[n] = PAGE / seconds
            print(f"{dtype}: {n} programs a processor, {PAGE / seconds / 1e9:.0f} GB/s")
        # A link of 54 GB/s brings 63 GB/s of float16 and 81 GB/s of bfloat16.
        assert per_s[kernel.PROGRAMS_PER_PROCESSOR] > (70e9 if dtype == torch.float16 else 90e9), (
            per_s
        )


def median_s(work, n=20):
    """Seconds on the device."""
    done = []
    for _ in range(n):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        done.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(done)


def loads_are_faster_than_the_link():
    """Copies and decoding overlap: a full miss takes little more than the compressed bytes do."""
    spec, load_ms = dj.ModelSpec(LARGE, "bfloat16", seed=1, init="plain"), {}  # drawn on the GPU
    for masters in ("plain", "compressed"):
        with dj.Djinn("6GiB", "cuda", page=PAGE, decode="eager", masters=masters) as djinn:
            djinn.add("m", spec)
            done = []
            for _ in range(6):
                djinn.evict("m")
                begin_s = time.perf_counter()
                with djinn.lease("m"):
                    djinn.wait("m")
                    done.append((time.perf_counter() - begin_s) * 1e3)
            load_ms[masters] = statistics.median(done[1:])
            plain, stored = djinn.stats().masters["m"]
            print(f"{masters}: {load_ms[masters]:.1f} ms, {stored / plain:.3f} of {plain} bytes")
            djinn.check()
    assert load_ms["compressed"] < 0.8 * load_ms["plain"], load_ms


def damage_is_named():
    """An audit finds changed bytes and names them; the device stays usable, and so do others."""
    spec = dj.ModelSpec(CONFIGS[0], "float16", seed=1)
    with dj.Djinn(
        "128MiB", "cuda", page=2 << 20, decode="graph", max_model_len=64, masters="compressed"
    ) as djinn:
        for name in ("good", "bad"):
            djinn.add(name, spec)
        expected = djinn.generate("good", PROMPT, 6, ignore_eos=True).token_ids
        djinn.generate("bad", PROMPT, 6, ignore_eos=True)
        stored = djinn.masters.read("bad", 2 << 20, 4 << 20).pieces[0]
        for place in (0, 100, len(stored) // 2):  # starts of blocks among them
            stored[place] ^= 0x80
            with raises(DjinnError):
                djinn.check()
            djinn.evict("bad")
            djinn.generate("bad", PROMPT, 6, ignore_eos=True)  # wrong, but no fault
            assert djinn.generate("good", PROMPT, 6, ignore_eos=True).token_ids == expected
            stored[place] ^= 0x80
            djinn.evict("bad")
            # Resident again, so that the next audit has something to compare.
            assert djinn.generate("bad", PROMPT, 6, ignore_eos=True).token_ids == expected
            djinn.check()
    torch.cuda.synchronize()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print(f"{sys.argv[1]}: ok")
