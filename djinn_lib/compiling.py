"""Compiling the decode step of a model.

A step of batch 1 reads every weight once, so it is bound by device memory. cuBLAS multiplies a
matrix with one vector at about 2.4 of the 3.0 TB/s of an H100; the same product as a reduction in
Triton, its shape searched for, comes closer. Everything here serves to let `torch.compile` see each
product as a reduction, and to fuse what surrounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config as inductor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class _ApartBias(TorchFunctionMode):
    """Computes x @ W + b as a product and a sum.

    Inductor makes a reduction of a product with one row (under coordinate descent tuning), but
    gives a product with a bias to cuBLAS.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            x, weight, *rest = args
            bias = rest[0] if rest else kwargs.get("bias")
            if bias is not None:
                return linear(x, weight) + bias
        return func(*args, **kwargs)


def options() -> dict[str, Any]:
    """What inductor is asked for on this machine."""
    chosen: dict[str, Any] = {"coordinate_descent_tuning": True}
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    if hopper and hasattr(inductor.triton, "enable_pdl"):
        chosen["triton.enable_pdl"] = True  # a kernel starts while the one before it drains
    return chosen


def attentions(device: torch.device) -> list[str]:
    """Implementations of attention to try, the fastest first.

    The last one is each architecture's own, written out: over one query it is two more products
    with a vector, which the compiler turns into reductions like the others.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return ["eager"]
    from djinn_lib.decode_attention import NAME  # needs triton

    return [NAME, "eager"]


@contextmanager
def step_compiler(
    model: PreTrainedModel,
    step: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    attention: str,
) -> Iterator[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Give `step`, which runs `model` on one token, compiled; it is compiled when first called."""

    def whole() -> tuple[torch.Tensor, torch.Tensor]:
        with _ApartBias():
            return step()

    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(attention)
    # Every model is one more variant of the same function to the compiler.
    limits = torch._dynamo.config.patch(recompile_limit=1 << 20, fail_on_recompile_limit_hit=True)
    try:
        with limits:
            yield torch.compile(whole, fullgraph=True, dynamic=False, options=options())
    finally:
        model.set_attn_implementation(before)
