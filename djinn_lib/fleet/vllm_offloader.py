"""Wait for weights layer by layer, through vLLM's interface for offloaders.

vLLM's `make_layers` lets the offloader of the process wrap the layers that it creates. This
offloader moves no weights. Before each layer it inserts an operator that waits until the layer's
pages are loaded. The operator is vLLM's own (`vllm::wait_prefetch`), so compiled code keeps it in
place. A recorded CUDA graph cannot wait between its layers: vLLM calls `sync_prev_onload` before
it, which waits for the whole model.
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
    """Delay each layer until its bytes are on the device.

    Attributes:
        ring: the model's pages; None while vLLM loads.
        layers: the modules that were wrapped, in the order in which they run.
        ends: for each layer, how many bytes of the model must be loaded before it.
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
        """Insert the wait before every module; nothing else changes."""
        modules = list(modules_generator)
        for module in modules:
            _wait_before(module, len(self.layers))
            self.layers.append(module)
        return modules

    def _wait_for_layer(self, layer_idx: int) -> None:
        """Wait for the bytes of a layer; called by the operator before it."""
        if self.ring is not None and not _capturing():
            self.ring.wait(self.ends[layer_idx])

    def sync_prev_onload(self) -> None:
        """Wait for the whole model; called before a graph is recorded or replayed."""
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
