"""Lent models on a GPU, one scenario a process: `python tests/support/gpu_leases.py NAME [DEVICE]`.

With "cpu" as the device the same code runs without a GPU.
"""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from gpu_scenarios import CONFIGS, PROMPT, held_bytes
from gpu_serving import N_NEW, alone, page_of, size_of, specs_of
from torch import nn

import djinn_lib as dj
from djinn_lib.errors import LeaseError


def refused(read: Callable[[], Any], kind: type[Exception] = LeaseError) -> str:
    try:
        read()
    except kind as error:
        return str(error)
    raise AssertionError("expected a refusal")


def lent_weights(device: str = "cuda") -> None:
    """What is kept of a lent model is refused after an eviction, and the device stays usable."""
    spec = specs_of(device, 3)["m2"]
    expected, plain = alone(spec, device), spec.build()
    ids = torch.tensor([PROMPT], device=device)
    with dj.Djinn(2 * size_of(spec), device, page_of(device), decode="graph", max_model_len=64,
                  progress=lambda step: None) as djinn:  # fmt: skip
        djinn.add("m", spec)
        mine = nn.Linear(1, 1)
        mine.weight = nn.Parameter(torch.empty(1, dtype=plain.dtype, device=device), False)

        def lend_and_look() -> None:
            djinn.evict("m")
            with djinn.lease("m") as model:
                weight, table = model.lm_head.weight, model.get_input_embeddings().weight
                for name, value in model.state_dict().items():
                    assert torch.equal(value.cpu(), plain.state_dict()[name]), name
                alias, storage = weight.detach()[1:], weight.untyped_storage()
                mine.weight.data = weight
                own, rows = copy.deepcopy(model), table.data
                inputs = model.get_input_embeddings()(ids).requires_grad_()
                loss = model(inputs_embeds=inputs, labels=ids).loss
            djinn.evict("m")
            for read in (
                lambda: repr(weight),
                lambda: weight.sum(),
                lambda: alias.cpu(),
                lambda: rows[3].tolist(),
                lambda: model(ids),
                lambda: model.state_dict(),
            ):
                refused(read)
            assert "inplace" in refused(loss.backward, RuntimeError)
            if device == "cuda":  # builds without CUDA give what is kept a copy of the bytes
                assert "outlived the lease" in refused(lambda: mine.weight.sum(), RuntimeError)
                assert "outlived the lease" in refused(lambda: storage[0], RuntimeError)
            assert own(ids).logits.isfinite().all()
            assert djinn.generate("m", PROMPT, N_NEW, ignore_eos=True).token_ids == expected

        for _ in range(3):
            lend_and_look()
        djinn.check()


def written_weights(device: str = "cuda") -> None:
    """Writes are refused, or undone and said; requests compute what they did before."""
    spec = specs_of(device, 1)["m0"]
    expected = alone(spec, device)
    ids = torch.tensor([PROMPT], device=device)

    def optimise(model: Any) -> None:
        model.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        torch.optim.AdamW(model.parameters()).step()

    def below_python(model: Any) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            model.lm_head.weight.zero_()

    with dj.Djinn(2 * size_of(spec), device, page_of(device), decode="graph", max_model_len=64,
                  progress=lambda step: None) as djinn:  # fmt: skip
        djinn.add("m", spec)
        for write in (
            optimise,
            below_python,
            lambda model: model.lm_head.weight.data.mul_(2),
            lambda model: model.get_input_embeddings().weight.zero_(),
            lambda model: model.lm_head.weight.untyped_storage().fill_(0),
            lambda model: model.half() if device == "cpu" else model.float(),
            lambda model: model.cpu() if device == "cuda" else model.double(),
        ):

            def use(write: Callable[[Any], Any] = write) -> None:
                with djinn.lease("m") as model:
                    write(model)

            refused(use)
            djinn.check()
            assert djinn.generate("m", PROMPT, N_NEW, ignore_eos=True).token_ids == expected
        with warnings.catch_warnings(record=True) as said, djinn.lease("m") as model:
            warnings.simplefilter("always")
            model.lm_head = nn.Linear(1, 1)
        assert any("were undone (lm_head)" in str(warning.message) for warning in said)
        assert djinn.generate("m", PROMPT, N_NEW, ignore_eos=True).token_ids == expected


def lent_layers(device: str = "cuda") -> None:
    """Of a model larger than the ring layers can run and not be read; so while one still loads."""
    spec = specs_of(device, 1)["m0"]
    ids = torch.tensor([PROMPT], device=device)
    plain = spec.build().to(device)
    for share in (0.75, 2.0):
        with dj.Djinn(int(share * size_of(spec)), device, page_of(device),
                      progress=lambda step: None) as djinn:  # fmt: skip
            djinn.add("m", spec)
            assert ("m" in djinn.stats().streamed) == (share < 1)
            with djinn.lease("m", wait=False) as model, torch.no_grad():
                refused(model.state_dict)
                assert torch.equal(model(ids).logits, plain(ids).logits)
                djinn.wait("m")
                if share < 1:
                    refused(model.state_dict)
                else:
                    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def collected_objects(device: str = "cuda") -> None:
    """An object that nobody refers to gives its frames, its host memory and its graphs back."""
    spec = dj.ModelSpec(CONFIGS[0], specs_of(device, 1)["m0"].dtype, seed=1)

    def use() -> None:
        djinn = dj.Djinn(8 * size_of(spec), device, page_of(device), max_model_len=64,
                         progress=lambda step: None)  # fmt: skip
        djinn.add("m", spec)
        djinn.generate("m", PROMPT, N_NEW)
        with djinn.lease("m") as model:
            weight = model.lm_head.weight
        djinn.submit("m", PROMPT, N_NEW).result(60)
        alive = weakref.ref(djinn)
        del djinn
        assert alive() is None
        assert "its Djinn was closed" in refused(lambda: weight.sum())
        gc.collect()

    use()
    before = held_bytes() if device == "cuda" else 0
    for _ in range(3):
        use()
    lost = held_bytes() - before if device == "cuda" else 0
    assert lost < 4 * size_of(spec), f"{lost} bytes of device memory are still held"


def main() -> None:
    """Run the scenario that the arguments name."""
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
    print(f"{name}: ok")


if __name__ == "__main__":
    main()
