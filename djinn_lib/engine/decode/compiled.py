"""Compile the decode step of a model, one unit at a time.

A step of batch size 1 reads every weight once, so memory bandwidth bounds it. cuBLAS multiplies a
matrix with one vector at about 2.4 of the 3.0 TB/s of an H100. The same product as a tuned Triton
reduction is faster. The code here lets `torch.compile` treat each product as a reduction and fuse
the operations after it.

The layers of a model differ only in their weights. So one layer is compiled, with weights, keys and
values as arguments, and its code serves all layers. This takes seconds; compiling the whole model
takes minutes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config as inductor
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from djinn_lib.engine.decode.kv_cache import KvCache
from djinn_lib.engine.models.packing import Unit
from djinn_lib.errors import ConfigError

StepContext = Callable[[], AbstractContextManager[None]]  # the context in which a step runs
FUSED = "fused layers"


class _Products(TorchFunctionMode):
    """Rewrite x @ W + b into the form that inductor compiles to fast reductions.

    A product with a bias would go to cuBLAS, so the bias is added separately. Inductor would also
    fuse the computation of x into the product and repeat it for every block of rows. `as_strided`
    needs the address of x and so forces it to be stored first.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not linear:
            return func(*args, **kwargs)
        x, weight, *rest = args
        bias = rest[0] if rest else kwargs.get("bias")
        x = x.contiguous()
        product = linear(x.as_strided(x.shape, x.stride()), weight)
        return product if bias is None else product + bias


def options() -> dict[str, Any]:
    """Return the inductor options for this machine."""
    chosen: dict[str, Any] = {"coordinate_descent_tuning": True}
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    if hopper and hasattr(inductor.triton, "enable_pdl"):
        chosen["triton.enable_pdl"] = True  # a kernel starts while the one before it drains
    return chosen


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a device."""
    return device.type == "cuda" and find_spec("triton") is not None


def attentions(device: torch.device) -> list[str]:
    """List the attention implementations to try in a compiled step, fastest first."""
    if not has_triton(device):
        return ["sdpa"]
    from djinn_lib.engine.decode.kernels.attention import NAME  # needs triton

    return [NAME, "sdpa"]


class CompiledUnits:
    """Compiled replacements for the units of a model, for steps of one token.

    Args:
        model: the model of the units.
        units: all are compiled; units that differ only in their weights share the code.
        cache: the model's `past_key_values`.
        attention: the implementation that the compiled code uses.
    """

    def __init__(
        self, model: PreTrainedModel, units: Sequence[Unit], cache: KvCache, attention: str
    ) -> None:
        self._model, self._cache, self._attention = model, cache, attention
        shared: dict[Any, _SharedCode] = {}
        self._replacements: list[tuple[nn.Module, Callable[..., Any]]] = []
        for unit in units:
            module = model.get_submodule(unit.module)
            if module is not model:
                structure = _structure(module)
                if structure not in shared:
                    shared[structure] = _SharedCode(module)
                self._replacements.append((module, self._replacement(module, shared[structure])))

    def _replacement(self, module: nn.Module, code: _SharedCode) -> Callable[..., Any]:
        index = next((m.layer_idx for m in module.modules() if hasattr(m, "layer_idx")), None)
        tensors = _tensors(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            # The cache is passed as plain tensors, so that all layers share one compiled variant.
            given = {**dict(enumerate(args)), **kwargs}
            where = next((key for key, value in given.items() if value is self._cache), None)
            if where is None:
                return code.run(tensors, None, None, None, None, args, kwargs)
            kept = self._cache.kv_layers[index]  # type: ignore[index]
            position = self._cache.position
            args = tuple(None if value is self._cache else value for value in args)
            kwargs = {key: value for key, value in kwargs.items() if key != where}
            return code.run(tensors, kept.keys, kept.values, position, where, args, kwargs)

        return forward

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the units in the model during a block."""
        # Each kind of unit, of each model, is another variant of the same function.
        limits = torch._dynamo.config.patch(
            recompile_limit=1 << 20, fail_on_recompile_limit_hit=True
        )
        with replaced_forwards(self._model, self._replacements, self._attention), limits:
            yield


@contextmanager
def replaced_forwards(
    model: PreTrainedModel,
    replacements: Sequence[tuple[nn.Module, Callable[..., Any]]],
    attention: str,
) -> Iterator[None]:
    """Replace modules' forward functions and the attention during a block."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(attention)
    for module, forward in replacements:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in replacements:
            del module.forward  # uncovers the method of its class
        model.set_attn_implementation(before)


class _SharedCode:
    """The compiled forward pass of a kind of module, with its tensors as arguments."""

    def __init__(self, module: nn.Module) -> None:
        # Only the structure is kept: weights are on the meta device, and hooks are dropped.
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                for p in module.parameters()}  # fmt: skip
        self._shape = copy.deepcopy(module, memo)
        for part in self._shape.modules():
            part._forward_pre_hooks.clear()
        self.run = torch.compile(self._run, fullgraph=True, dynamic=False, options=options())

    def _run(
        self,
        tensors: dict[str, torch.Tensor],
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        position: torch.Tensor | None,
        where: int | str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if isinstance(where, int):
            args = (*args[:where], _LayerCache(keys, values, position), *args[where + 1 :])
        elif where is not None:
            kwargs = {**kwargs, where: _LayerCache(keys, values, position)}
        with _Products():
            return functional_call(self._shape, tensors, args, kwargs)


class _LayerCache:
    """The part of the cache interface that one layer uses while one token is added."""

    def __init__(self, keys: Any, values: Any, position: Any) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token's states at the position, and return the layer's whole tensors."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """Return the position."""
        return self.position[0]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Collect parameters and buffers as plain tensors; dynamo does not guard these."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _structure(module: nn.Module) -> Any:
    """Return a key; equal keys mean equal functions of tensors and arguments."""
    plain = (bool, int, float, str, type(None))
    parts = [
        (
            name,
            type(part),
            tuple(
                (key, value)
                for key, value in sorted(vars(part).items())
                if key != "layer_idx" and isinstance(value, plain)
            ),
        )
        for name, part in module.named_modules()
    ]
    shapes = [(name, tuple(t.shape), t.dtype) for name, t in _tensors(module).items()]
    return tuple(parts), tuple(shapes)


def faster_ways(
    model: PreTrainedModel, units: Sequence[Unit], cache: KvCache
) -> Iterator[tuple[str, Callable[[], StepContext]]]:
    """Yield the name and constructor of each fast step, fastest first."""
    if has_triton(model.device):
        from djinn_lib.engine.decode.fused_layers import FusedUnits  # needs triton

        yield FUSED, lambda: FusedUnits(model, units, cache).in_place
    for attention in attentions(model.device):
        yield (
            f"torch.compile, attention {attention}",
            lambda attention=attention: CompiledUnits(model, units, cache, attention).in_place,
        )


def note_refusal(model: PreTrainedModel, way: str, error: Exception) -> None:
    """Log why a step cannot be made; that layers cannot be fused is expected."""
    refused = way == FUSED and isinstance(error, ConfigError)
    logging.getLogger(__name__).log(
        logging.INFO if refused else logging.WARNING,
        "the decode step of a %s cannot be made with %s (%s: %s)",
        model.config.model_type,
        way,
        type(error).__name__,
        str(error).strip().split("\n")[0],
    )
