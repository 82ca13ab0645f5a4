"""Wait for weights layer by layer, through vLLM's interface for offloaders.

vLLM's `make_layers` lets the offloader of the process wrap the layers that it creates. This
offloader moves no weights. Before each layer it inserts an operator that waits until the layer's
pages are loaded. The operator is vLLM's own (`vllm::wait_prefetch`), so compiled code keeps it in
place.

A recorded CUDA graph cannot wait between its layers, but vLLM calls `sync_prev_onload` before it.
A decoding step is one graph, which waits for the whole model. A prefill is many, with attention
between them, one after another: each waits for the layers that begin in it. Which these are is
noted while vLLM captures it, as the operators run then.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any
from weakref import ref

import torch
import vllm.model_executor.offloader.prefetch_ops  # noqa: F401  # registers the operator
from torch import nn
from vllm import forward_context
from vllm.config import CUDAGraphMode
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
        self._graphs = Graphs()

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
        if _capturing():
            self._graphs.note_layer(layer_idx)
        elif self.ring is not None:
            self.ring.wait(self.ends[layer_idx])

    def sync_prev_onload(self) -> None:
        """Wait for the bytes of the next graph; called before it is captured or replayed."""
        if _capturing():
            return
        n_layers = self._graphs.begin_next()
        if self.ring is not None and n_layers != 0:
            self.ring.wait(None if n_layers is None else self.ends[n_layers - 1])

    def join_after_forward(self) -> None:
        """Note that the capture of a graph ends; called within it."""
        self._graphs.end_capture()


class Graphs:
    """The layers that each graph of a pass needs, by its place among the graphs of that pass.

    Batches of different sizes have different graphs, but of the same pieces of the model. If the
    layers at one place differ, as with a second model in the process, the last of them counts.
    """

    def __init__(self) -> None:
        self._n_layers: dict[int, int] = {}  # by place; the layers that begin there or before
        self._pass: ref[Any] | None = None  # vLLM makes a new context for each
        self._n_begun = 0
        self._noted = 0  # layers in the graph that is being captured

    def begin_next(self) -> int | None:
        """Go on to the next graph of a pass; return how many layers must be loaded for it.

        The answer is 0 if no layer begins in it, so that earlier waits were enough. It is None if
        all layers must be loaded: for one graph of the whole pass, or an unknown graph.
        """
        self._noted = 0
        context = _piecewise_pass()
        if context is None:
            self._pass = None
            return None
        if self._pass is None or self._pass() is not context:
            self._pass, self._n_begun = ref(context), 0
        self._n_begun += 1
        return self._n_layers.get(self._n_begun - 1)

    def note_layer(self, index: int) -> None:
        """Note a layer that begins in the graph that is being captured."""
        self._noted = max(self._noted, index + 1)

    def end_capture(self) -> None:
        """Keep what was noted for a graph of a piecewise pass."""
        if self._pass is not None:
            place = self._n_begun - 1
            self._n_layers[place] = max(self._n_layers.get(place, 0), self._noted)


def _piecewise_pass() -> Any | None:
    """Return vLLM's context of the pass at hand if its graphs are pieces of it, else None."""
    if not forward_context.is_forward_context_available():
        return None
    context = forward_context.get_forward_context()
    return context if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE else None


def _wait_before(module: nn.Module, index: int) -> None:
    compute = module.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        # What the layer computes from must depend on the wait, or compiled code may reorder them.
        # Positions, which come first in many models, are not read by a layer's first operator.
        tensors = [one for one in (*arguments, *options.values()) if isinstance(one, torch.Tensor)]
        hidden = next((one for one in tensors if one.is_floating_point()), tensors[0])
        torch.ops.vllm.wait_prefetch(hidden, index)
        return compute(*arguments, **options)

    module.forward = forward


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
