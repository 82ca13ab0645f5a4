"""Waiting for weights layer by layer: an offloader for vLLM that moves nothing itself.

vLLM's `make_layers` lets the offloader of the process wrap the layers that it makes. Ours puts an
operator before each one that waits until its pages are there; the operator is vLLM's own
(`vllm::wait_prefetch`), which compiled code keeps in place. Recorded CUDA graphs cannot wait in
the middle: before one of them vLLM calls `sync_prev_onload`, which waits for the whole model.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import vllm.model_executor.offloader.prefetch_ops  # noqa: F401  # registers the operator
from torch import nn
from vllm.model_executor.offloader import base

from djinn_lib.fleet.client import RingModel


class RingOffloader(base.BaseOffloader):
    """Holds back each layer until its bytes are on the device.

    Attributes:
        ring: the model's pages; None while vLLM loads.
        layers: the modules that were wrapped, in the order in which they run.
        ends: for each, how many bytes of the model have to be there.
    """

    def __init__(self) -> None:
        self.ring: RingModel | None = None
        self.layers: list[nn.Module] = []
        self.ends: Sequence[int] = ()

    def install(self) -> None:
        """Become the offloader of this process."""
        base.set_offloader(self)

    def wrap_modules(
        self, modules_generator: Generator[nn.Module, None, None], prefix: str = ""
    ) -> list[nn.Module]:
        """Put the wait before every module; nothing else changes."""
        modules = list(modules_generator)
        for module in modules:
            _wait_before(module, len(self.layers))
            self.layers.append(module)
        return modules

    def _wait_for_layer(self, layer_idx: int) -> None:
        """Called by the operator, before a layer."""
        if self.ring is not None and not _capturing():
            self.ring.wait(self.ends[layer_idx])

    def sync_prev_onload(self) -> None:
        """Called before a graph is recorded or replayed."""
        if self.ring is not None and not _capturing():
            self.ring.wait()


def _wait_before(module: nn.Module, index: int) -> None:
    compute = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        first = arguments[0] if arguments else options.get("hidden_states")
        torch.ops.vllm.wait_prefetch(first, index)
        return compute(*arguments, **options)

    module.forward = forward


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
