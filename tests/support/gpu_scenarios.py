"""What is tested on a GPU, one scenario a process.

[DJINN_TEST_MASTERS=compressed] python tests/support/gpu_scenarios.py NAME [ARG]
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from unittest import mock

import pynvml
import torch
from device_contract import CONTRACT
from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, PhiConfig

import djinn_lib as dj
from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.engine.memory.devices.cuda import CudaAddressSpace
from djinn_lib.errors import CapacityError, DjinnError

# Every scenario, here and in the scripts that import this one, has its masters in this form.
dj.Djinn = partial(dj.Djinn, masters=os.environ.get("DJINN_TEST_MASTERS", "plain"))

PAGE = 2 << 20
CUDA = torch.device("cuda")
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46]
_SHAPE = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 4000,
    "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 1536,
}  # fmt: skip
CONFIGS = [
    LlamaConfig(**_SHAPE),
    MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=None),
    PhiConfig(**_SHAPE),
]


def held_bytes():
    """Device memory of this process, or of all where the driver does not tell them apart."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return process.usedGpuMemory
    free, total = torch.cuda.mem_get_info()
    return total - free


def address_space():
    """Bytes follow frames, addresses stay, and closing gives all memory back."""
    int(torch.zeros(4, dtype=torch.uint8, device=CUDA)[2].add(1))  # loads the kernels used below
    before = held_bytes()
    space = CudaAddressSpace(8, PAGE, CUDA)
    assert held_bytes() - before >= 8 * PAGE
    a, b = space.reserve(4), space.reserve(4)
    view_a, view_b = space.bytes_view(a), space.bytes_view(b)
    assert (view_a.data_ptr(), view_b.data_ptr()) == (a.address, b.address)
    space.map(a, 0, [5, 2, 3, 7])
    for page, value in enumerate([50, 20, 30, 70]):
        view_a[page * PAGE : (page + 1) * PAGE] = value
    torch.cuda.synchronize()
    space.unmap(a, 0, 4)
    space.map(b, 0, [7, 5])
    space.map(b, 2, [3, 2])
    assert [int(view_b[page * PAGE + 17]) for page in range(4)] == [70, 50, 30, 20]
    space.close()
    space.close()
    lost = held_bytes() - before
    assert lost < 4 << 20, f"{lost} bytes of device memory are still held"


def time_to_first_token_counts_the_wait():
    """Without overlap the copy comes before the prefill, and the clock sees both."""
    # Large pages: mapping many small ones takes as long as copying them, and nobody would wait.
    # How long one waits depends on the host, which submits a compressed page more slowly.
    with dj.Djinn(2 << 30, "cuda", page=16 * PAGE, decode="eager", overlap=False) as djinn:
        big = {**_SHAPE, "vocab_size": 200_000, "hidden_size": 1024}
        djinn.add("a", dj.ModelSpec(LlamaConfig(**big), "float16", seed=1, init="plain"))
        djinn.generate("a", PROMPT, 2)
        djinn.evict("a")
        g = djinn.generate("a", PROMPT, 2)
        assert g.stall_ms > 0, g
        assert g.ttft_ms > g.stall_ms, g


def map_does_not_stall():
    """Mapping while a kernel runs returns long before the kernel ends."""
    space = CudaAddressSpace(64, PAGE, CUDA)
    area = space.reserve(64)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    begin.record()
    torch.cuda._sleep(1_500_000_000)
    end.record()
    space.map(area, 0, range(64))
    space.unmap(area, 0, 64)
    assert not end.query(), "mapping waited for the kernel"
    torch.cuda.synchronize()
    space.close()


def map_from_a_new_thread():
    """A thread that has never used CUDA may be the first to load a model."""
    with dj.Djinn(64 << 20, "cuda", page=PAGE, decode="eager") as djinn:
        djinn.add("a", dj.ModelSpec(CONFIGS[0], "float16", seed=1))
        expected = djinn.generate("a", PROMPT, 4, ignore_eos=True).token_ids
        djinn.evict("a")
        got = []
        ask = threading.Thread(
            target=lambda: got.append(djinn.generate("a", PROMPT, 4, ignore_eos=True).token_ids)
        )
        ask.start()
        ask.join()
        djinn.check()
    assert got == [expected]


def switches(n_models="3", n_switches="200", decode="eager"):
    """Random switches: tokens as without any eviction, bytes equal masters, pointers stay."""
    n, rng = int(n_models), random.Random(0)
    specs = {f"m{i}": dj.ModelSpec(CONFIGS[i % 3], "float16", seed=i) for i in range(n)}
    expected = {name: undisturbed_tokens(spec, decode) for name, spec in specs.items()}
    assert len({t for t in expected.values()}) == n
    loaded_once(specs, decode)
    before = held_bytes()
    reserved_before = torch.cuda.memory_reserved()
    djinn = dj.Djinn(40 << 20, "cuda", page=PAGE, decode=decode, max_model_len=64)
    pointers = {}
    for name, spec in specs.items():
        djinn.add(name, spec)
        with djinn.lease(name) as model:
            pointers[name] = [p.data_ptr() for p in model.parameters()]
    assert set(djinn.decode_modes.values()) == {decode}
    partial = 0
    for i in range(int(n_switches)):
        name = rng.choice(sorted(specs))
        g = djinn.generate(name, PROMPT, 6, ignore_eos=True)
        assert g.token_ids == expected[name], (i, name, g.token_ids, expected[name])
        partial += g.resident_before_bytes > 0 and g.loaded_bytes > 0
        if i % 10 == 0:
            djinn.check()
    assert partial > 0
    for name in specs:
        with djinn.lease(name) as model:
            assert pointers[name] == [p.data_ptr() for p in model.parameters()]
            del model
    djinn.close()
    del djinn
    lost, reserved = held_bytes() - before, torch.cuda.memory_reserved() - reserved_before
    allowed = (4 if decode == "eager" else 16) << 20  # the driver keeps some memory of past graphs
    assert lost < allowed, (
        f"{lost} bytes of device memory are still held, {reserved} of them by torch in this process"
    )


def loaded_once(specs, decode):
    """What the first use leaves on the device for good is no leak: later ones do not add to it.

    Such as the code of kernels, what cuBLAS keeps for a thread, the driver's memory of graphs.
    """
    with dj.Djinn(200 << 20, "cuda", page=PAGE, decode=decode, max_model_len=64) as djinn:
        for name, spec in specs.items():
            djinn.add(name, spec)
            djinn.generate(name, PROMPT, 6, ignore_eos=True)
        djinn.check()


def undisturbed_tokens(spec, decode="eager"):
    """Tokens of a model alone: of a plain copy where decoding is eager, else in a large ring."""
    if decode == "eager":
        return generate_eager(spec.build("cpu").to("cuda"), PROMPT, 6, ignore_eos=True).token_ids
    with dj.Djinn(200 << 20, "cuda", page=PAGE, decode=decode, max_model_len=64) as djinn:
        djinn.add("m", spec)
        return djinn.generate("m", PROMPT, 6, ignore_eos=True).token_ids


def prefill_follows_the_copy():
    """A recorded prefill starts before its last layers are there, and gives the same tokens."""
    big = LlamaConfig(**{**_SHAPE, "vocab_size": 100_000, "hidden_size": 1024})
    spec = dj.ModelSpec(big, "float16", seed=1, init="plain")  # drawn on the GPU, in no time
    with dj.Djinn(2 << 30, "cuda", page=16 * PAGE, decode="graph", max_model_len=64) as djinn:
        djinn.add("m", spec)
        hit = djinn.generate("m", PROMPT, 6, ignore_eos=True)
        assert hit.loaded_bytes == 0 and hit.stall_ms == 0, hit
        for _ in range(20):
            djinn.evict("m")
            miss = djinn.generate("m", PROMPT, 6, ignore_eos=True)
            assert miss.loaded_bytes == miss.resident_before_bytes + int(djinn.residency().bytes[0])
            assert miss.token_ids == hit.token_ids
            assert miss.stall_ms > 0, f"the prefill ran before its bytes were there: {miss}"
            assert miss.stall_ms <= miss.switch_ms <= miss.ttft_ms + 0.5, miss
            djinn.check()


def sampled_tokens():
    """The same seed gives the same tokens, another seed others, resident or not."""
    with dj.Djinn(200 << 20, "cuda", page=PAGE, decode="graph", max_model_len=64) as djinn:
        djinn.add("m", dj.ModelSpec(CONFIGS[0], "float16", seed=1))

        def sample(seed):
            djinn.evict("m")
            g = djinn.generate(
                "m", PROMPT, 20, ignore_eos=True, temperature=1.5, top_p=0.95, seed=seed
            )
            return g.token_ids

        assert sample(1) == sample(1)
        assert len({sample(seed) for seed in range(8)}) == 8


def decode_attention():
    """The attention of one token equals torch's, for any heads, head size, fill and window."""
    from djinn_lib.engine.decode.kernels.attention import attend_to_cache

    torch.manual_seed(0)
    length = 200
    for heads, key_heads, size in [(32, 32, 128), (32, 8, 128), (32, 32, 80), (4, 1, 64)]:
        for filled, window in [(1, 200), (64, 200), (65, 200), (200, 200), (150, 70)]:
            q = torch.randn(1, heads, 1, size, device=CUDA, dtype=torch.float16)
            shape = (1, key_heads, length, size)
            k, v = (torch.randn(shape, device=CUDA, dtype=torch.float16) for _ in range(2))
            k[:, :, filled:] = v[:, :, filled:] = float("nan")  # nobody may read what is not there
            position = torch.arange(length, device=CUDA)
            mask = ((position < filled) & (position >= filled - window)).view(1, 1, 1, length)
            got = attend_to_cache(q, k, v, mask, size**-0.5).double()
            kd, vd = (t.nan_to_num(0.0).double().repeat_interleave(heads // key_heads, 1)
                      for t in (k, v))  # fmt: skip
            expected = torch.nn.functional.scaled_dot_product_attention(q.double(), kd, vd, mask)
            error = float((got - expected).norm() / expected.norm())
            assert error < 2e-3, (heads, key_heads, size, filled, window, error)


def faster_steps():
    """Neither fused nor compiled layers are given up, and the tokens are as without them."""
    from djinn_lib.engine.decode import fused_layers
    from djinn_lib.engine.decode.kernels.attention import NAME

    ways = {"fused layers": {}, f"torch.compile, attention {NAME}": {"clear": True}}
    with dj.Djinn(200 << 20, "cuda", page=PAGE, decode="graph", max_model_len=64) as djinn:
        for i, config in enumerate(CONFIGS):
            djinn.add(f"m{i}", dj.ModelSpec(config, "float16", seed=i))
            plain = djinn.generate(f"m{i}", PROMPT, 20, ignore_eos=True)
            for way, known_layers in ways.items():
                with mock.patch.dict(fused_layers._LAYERS, **known_layers):
                    assert djinn.set_decode(f"m{i}", "compiled") == "compiled"
                assert djinn._models[f"m{i}"].decoder.way == way
                for _ in range(3):
                    faster = djinn.generate(f"m{i}", PROMPT, 20, ignore_eos=True)
                    assert faster.token_ids == plain.token_ids, (i, way)


def tables_in_the_host():
    """The device looks embeddings up at the host's addresses, and they are no part of the ring."""
    spec, ids = dj.ModelSpec(CONFIGS[0], "float16", seed=1), [5, 3999, 0]
    tokens, sizes = {}, {}
    for place in ("ring", "host"):
        with dj.Djinn(64 << 20, "cuda", page=PAGE, decode="graph", max_model_len=64,
                      embeddings=place) as djinn:  # fmt: skip
            djinn.add("a", spec)
            tokens[place] = djinn.generate("a", PROMPT, 20, ignore_eos=True).token_ids
            djinn.evict("a")
            assert djinn.generate("a", PROMPT, 20, ignore_eos=True).token_ids == tokens[place]
            in_host = djinn.masters.tables("a", CUDA).values()
            with djinn.lease("a") as model:
                table = model.get_input_embeddings().weight
                rows, address = table[torch.tensor(ids, device=CUDA)].cpu(), table.data_ptr()
            expected = spec.build("cpu").get_input_embeddings().weight
            assert table.is_cuda and torch.equal(rows, expected[ids])
            assert [address] * (place == "host") == [each.data_ptr() for each in in_host]
            sizes[place] = int(djinn.residency().bytes[0])
            djinn.check()
    assert tokens["host"] == tokens["ring"]
    assert sizes["ring"] - sizes["host"] >= 4000 * 512 * 2


def failed_recordings():
    """A model that cannot be recorded is served eagerly, and harms no recording after it."""
    from djinn_lib.engine.decode.cuda_graphs import Recorder

    opt = OPTConfig(**{**_SHAPE, "ffn_dim": 1536, "word_embed_proj_dim": 512, "init_std": 0.1})
    specs = [dj.ModelSpec(config, "float16", seed=1) for config in (opt, CONFIGS[0], CONFIGS[1])]
    expected = [undisturbed_tokens(spec) for spec in specs]
    with dj.Djinn(200 << 20, "cuda", page=PAGE, decode="graph", max_model_len=64) as djinn:
        for i, spec in enumerate(specs):
            djinn.add(f"m{i}", spec)
        assert list(djinn.decode_modes.values()) == ["eager", "graph", "graph"]
        for i, tokens in enumerate(expected):
            assert djinn.generate(f"m{i}", PROMPT, 6, ignore_eos=True).token_ids == tokens
        module = djinn._models["m1"].module
        recorder, x = Recorder(CUDA), torch.zeros(4, device=CUDA)

        def add() -> None:
            x.add_(1)

        def add_and_wait() -> None:  # what only the capture itself finds out
            add()
            torch.cuda.synchronize()

        for _ in range(3):
            try:
                recorder.record(add_and_wait, module, ())
                raise AssertionError("expected the recording to fail")
            except RuntimeError as error:
                assert "captur" in str(error), error
            x.zero_()
            recording = recorder.record(add, module, ())
            x.zero_()
            for _ in range(5):
                recording.replay()
            assert x.tolist() == [5.0] * 4


def nothing_leaks():
    """Opening, recording and closing again and again leaves device memory where it was."""
    held = []
    for seed in range(6):
        with dj.Djinn(100 << 20, "cuda", page=PAGE, decode="graph", max_model_len=64) as djinn:
            djinn.add("m", dj.ModelSpec(CONFIGS[seed % 3], "float16", seed=seed))
            djinn.generate("m", PROMPT, 4, ignore_eos=True)
        del djinn
        held.append(held_bytes())
    print("held MiB:", [h >> 20 for h in held])
    assert held[-1] - held[2] < 2 << 20, f"{held[-1] - held[2]} bytes lost in 3 rounds"


def graph_after_remapping():
    """A captured graph gives the same result after every page moved to another frame."""
    with dj.Djinn(100 << 20, "cuda", page=PAGE, decode="eager") as djinn:
        djinn.add("a", dj.ModelSpec(CONFIGS[0], "float16", seed=1))
        djinn.add("b", dj.ModelSpec(CONFIGS[1], "float16", seed=2))
        ids = torch.tensor([PROMPT], device="cuda")
        with djinn.lease("a") as model, torch.no_grad():
            for _ in range(3):
                model(ids, use_cache=False)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(ids, use_cache=False).logits
            graph.replay()
            torch.cuda.synchronize()
            first, frames = logits.clone(), djinn.stats().frames["a"]
        djinn.evict("a")
        djinn.generate("b", PROMPT, 1)
        with djinn.lease("a"):
            djinn.wait("a")
            logits.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(first, logits)
            now = djinn.stats().frames["a"]
            assert all(x != y for x, y in zip(frames, now, strict=True)), "frames did not move"


def device_contract():
    """What the CPU promises, in the same words."""
    for name, promise in CONTRACT.items():
        promise(CUDA)
        torch.cuda.synchronize()
        print(name)


def too_much():
    """A capacity above the free memory is refused with what is free; nothing stays allocated."""
    torch.empty(1, device=CUDA)
    before = held_bytes()
    try:
        dj.Djinn(torch.cuda.mem_get_info()[0] + (8 << 30), "cuda")
        raise AssertionError("expected a CapacityError")
    except CapacityError as error:
        assert "of free device memory" in str(error)
    assert held_bytes() - before < 64 << 20


def positions():
    """A table of 16,384 positions, below and above max_model_len: served to the end, not beyond."""
    n = 16_384
    table = GPT2Config(
        n_embd=256, n_layer=2, n_head=4, vocab_size=4000, n_positions=n, bos_token_id=0,
        eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    rotary = LlamaConfig(**_SHAPE | {"max_position_embeddings": n})
    for max_model_len in (n // 2, 2 * n):
        with dj.Djinn(512 << 20, "cuda", page=PAGE, max_model_len=max_model_len) as djinn:
            for name, config in (("table", table), ("rotary", rotary)):
                djinn.add(name, dj.ModelSpec(config, "float32", seed=1))
                limit = max_model_len if name == "rotary" else min(n, max_model_len)
                ids = [3 + 7 * i * i % 3990 for i in range(limit - 8)]
                g = djinn.generate(name, ids, 8, ignore_eos=True)
                with djinn.lease(name) as model:
                    eager = generate_eager(model, ids, 8, ignore_eos=True).token_ids
                print(f"{name}, max_model_len {max_model_len}: {g.token_ids} {eager}")
                assert g.token_ids == eager
                with raises(DjinnError):
                    djinn.generate(name, [*ids, 5], 8, ignore_eos=True)
    torch.cuda.synchronize()


@contextmanager
def raises(kind):
    try:
        yield
    except kind:
        return
    raise AssertionError(f"expected a {kind.__name__}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print(f"{sys.argv[1]}: ok")
