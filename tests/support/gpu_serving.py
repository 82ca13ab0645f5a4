"""Serving on a GPU, one scenario a process: `python tests/support/gpu_serving.py NAME [DEVICE]`.

With "cpu" as the device the same code runs without a GPU.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import tempfile
import threading
from pathlib import Path

import torch
from gpu_scenarios import CONFIGS, PROMPT, held_bytes
from transformers import ZambaConfig

import djinn_lib as dj
from djinn_lib.engine.decode.eager import generate_eager
from djinn_lib.experiment.setup.weights import describe
from djinn_lib.systems.pytorch import PyTorchLRU, PyTorchPinned, PyTorchPinnedReadonly

N_NEW = 8
SHARING = ZambaConfig(
    vocab_size=4000, hidden_size=512, intermediate_size=3072, num_attention_heads=4,
    num_key_value_heads=4, attention_hidden_size=1024, attention_head_dim=256, mamba_d_state=16,
    n_mamba_heads=2, num_hidden_layers=9, layers_block_type=["mamba", "mamba", "hybrid"] * 3,
    initializer_range=0.1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def page_of(device: str) -> int:
    return 2 << 20 if device == "cuda" else 64 << 10


def specs_of(device: str, n: int) -> dict[str, dj.ModelSpec]:
    dtype = "float16" if device == "cuda" else "float32"
    return {f"m{i}": dj.ModelSpec(CONFIGS[i % 3], dtype, seed=i) for i in range(n)}


def alone(spec: dj.ModelSpec, device: str, decode: str = "graph") -> tuple[int, ...]:
    """Tokens of a model by itself: loaded the ordinary way, or in a ring where all of it fits."""
    if decode == "graph":
        capacity = 2 * size_of(spec)
        with dj.Djinn(capacity, device, page_of(device), decode="graph", max_model_len=64,
                      progress=lambda step: None) as djinn:  # fmt: skip
            djinn.add("m", spec)
            return djinn.generate("m", PROMPT, N_NEW, ignore_eos=True).token_ids
    model = spec.build().to(device)
    tokens = generate_eager(model, PROMPT, N_NEW, ignore_eos=True).token_ids
    del model
    gc.collect()
    return tokens


def size_of(spec: dj.ModelSpec) -> int:
    return sum(p.numel() * p.element_size() for p in spec.build().parameters())


def many_at_once(device: str = "cuda") -> None:
    """Threads and tasks on five models of which two fit, looking ahead, with tasks given up."""
    specs = specs_of(device, 5)
    expected = {name: alone(spec, device) for name, spec in specs.items()}
    capacity, failures = 2 * max(map(size_of, specs.values())), []
    with dj.Djinn(capacity, device, page_of(device), decode="graph", max_model_len=64,
                  order="affinity", progress=lambda step: None) as djinn:  # fmt: skip
        for name, spec in specs.items():
            djinn.add(name, spec)

        def client(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(25):
                name = rng.choice(sorted(specs))
                g = djinn.generate(name, PROMPT, N_NEW, ignore_eos=True)
                if g.token_ids != expected[name]:
                    failures.append((name, g.token_ids))

        async def task(seed: int) -> None:
            rng = random.Random(seed)
            for i in range(25):
                name = rng.choice(sorted(specs))
                asked = djinn.agenerate(name, PROMPT, N_NEW, ignore_eos=True)
                try:
                    g = await asyncio.wait_for(asked, 0.01 if i % 5 == 0 else None)
                except TimeoutError:
                    continue
                if g.token_ids != expected[name]:
                    failures.append((name, g.token_ids))

        async def tasks() -> None:
            await asyncio.gather(*(task(100 + i) for i in range(4)))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join()
        djinn.check()
        assert not djinn.stats().leased
    assert not failures, failures[:3]


def larger_than_the_ring(device: str = "cuda") -> None:
    """A model whose layers take turns, beside one that fits; tokens and device memory."""
    large = specs_of(device, 1)["m0"]
    small = dj.ModelSpec(CONFIGS[2], large.dtype, seed=9)
    expected = {"large": alone(large, device, "eager"), "small": alone(small, device)}
    n_bytes, before = size_of(large), held_bytes() if device == "cuda" else 0
    capacity = int(n_bytes * 0.75)
    with dj.Djinn(capacity, device, page_of(device), decode="graph", max_model_len=64,
                  progress=lambda step: None) as djinn:  # fmt: skip
        djinn.add("large", large)
        djinn.add("small", small)
        assert "large" in djinn.stats().streamed
        for name in ("large", "large", "small", "large", "small", "small", "large") * 3:
            g = djinn.generate(name, PROMPT, N_NEW, ignore_eos=True)
            assert g.token_ids == expected[name], (name, g.token_ids, expected[name])
            djinn.check()
        assert g.loaded_bytes > N_NEW * (n_bytes - capacity)
        assert g.switch_ms + g.decode_ms <= g.total_ms + 0.5, g  # later waits are of decoding
    lost = held_bytes() - before if device == "cuda" else 0
    assert lost < 64 << 20, f"{lost} bytes of device memory are still held"


def blocks_that_layers_share(device: str = "cuda") -> None:
    """Attention blocks that several layers use, in a model larger than the ring."""
    large = dj.ModelSpec(SHARING, "float16" if device == "cuda" else "float32", seed=3)
    expected = alone(large, device, "eager")
    with dj.Djinn(int(size_of(large) * 0.8), device, page_of(device), decode="graph",
                  max_model_len=64, progress=lambda step: None) as djinn:  # fmt: skip
        djinn.add("large", large)
        assert "large" in djinn.stats().streamed
        assert any(len(unit.extents) > 1 for unit in djinn._models["large"].units)
        for _ in range(4):
            g = djinn.generate("large", PROMPT, N_NEW, ignore_eos=True)
            assert g.token_ids == expected, (g.token_ids, expected)
        djinn.check()


def masters_on_disk(device: str = "cuda") -> None:
    """Five models, host memory for two; requests one after another and many at once."""
    specs = specs_of(device, 5)
    expected = {name: alone(spec, device) for name, spec in specs.items()}
    largest = max(map(size_of, specs.values()))
    with tempfile.TemporaryDirectory() as folder, dj.Djinn(
        2 * largest, device, page_of(device), decode="graph", max_model_len=64,
        host_capacity=int(2.5 * largest), swap_dir=folder, progress=lambda step: None,
    ) as djinn:  # fmt: skip
        for name, spec in specs.items():
            djinn.add(name, spec)
        rng = random.Random(0)
        names = [rng.choice(sorted(specs)) for _ in range(60)]
        for name in names[:30]:
            g = djinn.generate(name, PROMPT, N_NEW, ignore_eos=True)
            assert g.token_ids == expected[name], name
        pending = [djinn.submit(name, PROMPT, N_NEW, True) for name in names]
        for name, future in zip(names, pending, strict=True):
            assert future.result(120).token_ids == expected[name], name
        djinn.check()
        assert djinn.masters.n_bytes < sum(djinn.residency().bytes)


def whole_models_at_fixed_addresses(device: str = "cuda") -> None:
    """PyTorch's baselines with Djinn's decoder: each loads what it needs, and gives one answer."""
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name, spec in specs_of(device, 3).items():
            spec.build().save_pretrained(Path(folder) / name)
            models[name] = describe(name, Path(folder) / name)
        sizes = sorted(files.n_bytes for files in models.values())
        said: dict[str, set[tuple[int, ...]]] = {name: set() for name in models}
        for kind in (PyTorchPinned, PyTorchPinnedReadonly, PyTorchLRU):
            system = kind(models, sum(sizes[-2:]), torch.device(device), decode="graph")
            system.start()
            for name in [*models, *reversed(models), *models]:
                said[name].add(system.serve(name, PROMPT, N_NEW).token_ids)
            system.close()
        assert {name: len(tokens) for name, tokens in said.items()} == dict.fromkeys(models, 1)


def main() -> None:
    """Run the scenario that the arguments name."""
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
    print(f"{name}: ok")


if __name__ == "__main__":
    main()
