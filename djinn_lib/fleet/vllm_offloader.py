"""Wait for weights layer by layer, without a trace in what vLLM compiles.

An operator within a layer would change the code that vLLM compiles, and so the rounding, and so the
tokens. But every layer has one point that no compiled code and no CUDA graph of a prefill contains:
its attention (or what a model has in its place). There vLLM looks the layer up by name, in a
dictionary of its own. `UsedLayers` replaces this dictionary. As a layer is looked up, the offloader
waits for all that runs until the next one: the rest of this layer, and the next one up to its
attention. A step begins with a wait for all that runs before the first attention.

A decoding step is one CUDA graph, which waits for the whole model. So does every step of a model
whose layers have not been seen to run in order, one attention in each, as vLLM warmed up.

The layers themselves come from vLLM's `make_layers`, which lets the offloader of the process wrap
them. This one moves no weights and changes no layer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn
from vllm import forward_context
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.offloader import base

from djinn_lib.fleet.client import RingModel


class UsedLayers(dict[str, Any]):
    """vLLM's layers by name, which reports each that is looked up during a pass of the model."""

    offloader: RingOffloader | None = None

    def __getitem__(self, name: str) -> Any:
        if self.offloader is not None:
            self.offloader.note_use(name)
        return super().__getitem__(name)


class RingOffloader(base.BaseOffloader):
    """Delay the parts of a model until their bytes are on the device.

    Attributes:
        layers: the layers of the model, in the order in which they run.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self._last_stack = 0  # the first layer of the last stack; earlier ones are waited for first
        self._ring: RingModel | None = None  # none while vLLM loads
        self._ends: Sequence[int] = ()  # bytes needed up to each attention, and up to the end
        self._places: dict[str, int] = {}  # of the layers with attention, by name
        self._order = Order(0)

    def install(self) -> None:
        """Become the offloader of this process."""
        base.set_offloader(self)

    def wrap_modules(
        self, modules_generator: Generator[nn.Module, None, None], prefix: str = ""
    ) -> list[nn.Module]:
        """Note a stack of layers, and return it as it is."""
        self._last_stack = len(self.layers)
        modules = list(modules_generator)
        self.layers += modules
        return modules

    def begin(self, ring: RingModel, ends: Sequence[int], used: UsedLayers) -> None:
        """Wait for the bytes of `ring` from now on.

        Args:
            ring: the model's pages.
            ends: for each layer, how many bytes of the model it and all layers before it need.
            used: vLLM's layers by name.
        """
        layer_of = {id(part): i for i, layer in enumerate(self.layers) for part in layer.modules()}
        with_attention = {
            name: layer_of[id(part)]
            for name, part in used.items()
            if isinstance(part, AttentionLayerBase)
            and layer_of.get(id(part), -1) >= self._last_stack
        }
        layers = sorted(set(with_attention.values()))
        self._places = {name: layers.index(layer) for name, layer in with_attention.items()}
        self._ends = (*(ends[layer] for layer in layers), ring.n_bytes)
        self._order = Order(len(layers))
        self._ring = ring
        used.offloader = self

    @property
    def n_first_bytes(self) -> int:
        """How many bytes of the model must be loaded before a step."""
        return self._ends[0 if self._order.is_known else -1]

    def note_use(self, name: str) -> None:
        """Wait for what runs between the attention of a layer and the next one."""
        place = self._places.get(name)
        if place is None or self._ring is None or (context := _context()) is None:
            return
        if not _capturing():
            self._order.note(context, place)
            self._ring.wait(self._ends[place + 1])
        elif context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            self._order.refute()  # attention is part of the graph, and will not be seen again

    def sync_prev_onload(self) -> None:
        """Wait before a CUDA graph is captured or replayed, if it is all of the model."""
        context = _context()
        is_piece = context and context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        if self._ring is not None and not is_piece and not _capturing():
            self._ring.wait()


class Order:
    """Whether the layers with attention run one after the other, the first to the last.

    Args:
        n: the number of these layers.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._pass: ref[Any] | None = None  # vLLM makes a new context for each
        self._latest = -1
        self._is_seen = self._is_refuted = False

    @property
    def is_known(self) -> bool:
        """A whole pass ran in order, and none ran otherwise."""
        return self._is_seen and not self._is_refuted

    def note(self, context: object, place: int) -> None:
        """Note the use of the layer at one place in the pass of a context."""
        if self._pass is None or self._pass() is not context:
            self._pass, self._latest = ref(context), -1
        if place not in (self._latest, self._latest + 1):
            self.refute()
        self._latest = place
        self._is_seen |= place == self._n - 1

    def refute(self) -> None:
        """Note that layers run, or may run, in another order."""
        self._is_refuted = True


def _context() -> forward_context.ForwardContext | None:
    """Return vLLM's context of the pass at hand; None outside of a pass."""
    if not forward_context.is_forward_context_available():
        return None
    return forward_context.get_forward_context()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
