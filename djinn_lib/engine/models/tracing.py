"""Trace what a forward pass calls and reads, on weights without memory.

Nothing here is specific to an architecture. A twin of the model runs a prompt and one more token.
Each module call and each parameter that an operator reads is recorded in order. So packing follows
what the model does, including a module that reads another module's weight.

The twin's weights are shapes without data: on the meta device, where most models run, or else fake
tensors, which pretend to be on the CPU and take twice as long. A forward pass that depends on
values, such as the routing of tokens to experts, runs on random numbers instead. These all share
the same memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from djinn_lib.engine.memory.devices.base import Range
from djinn_lib.engine.memory.devices.cpu import CpuAddressSpace

Event = tuple[Literal["call", "return", "read"], str]  # of a module, or of a parameter
PROMPT_LENGTH = 4
_FRAME_BYTES, _DEVIATION = 2 << 20, 0.02  # of the random numbers
_CACHES = ("past_key_values", "cache_params", "state")  # their names in different architectures


def observe(model: PreTrainedModel) -> list[Event]:
    """Trace the module calls and parameter reads of a prompt and one more token.

    A module or parameter with several names is recorded under the first one.

    Args:
        model: its parameters may be on the meta device; it is not modified.

    Raises:
        Exception: what the architecture's own code raises, both on fake tensors and on numbers.
    """
    try:
        return _observe(model, lambda p: torch.empty_like(p, device="meta"), "meta")
    except Exception:  # the pass depends on values, makes tensors on the CPU, or is for it alone
        pass
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _observe(model, lambda p: torch.empty(p.shape, dtype=p.dtype))
    except Exception:  # the pass depends on values, or has an operator without a fake version
        with _numbers(model) as weight:
            return _observe(model, weight)


def _observe(
    model: PreTrainedModel,
    weight: Callable[[torch.Tensor], torch.Tensor],
    device: Literal["cpu", "meta"] = "cpu",
) -> list[Event]:
    twins = {id(p): nn.Parameter(weight(p), requires_grad=False) for p in model.parameters()}
    names = {_storage(twins[id(p)]): name for name, p in model.named_parameters()}
    buffers = {id(b): _copied(b, device) for b in model.buffers()}
    twin = copy.deepcopy(model, {**twins, **buffers})
    twin.config.return_dict = True  # as in `generate`
    events: list[Event] = []
    for name, module in twin.named_modules():
        _note_calls(module, name, events)
    ids = torch.zeros((1, PROMPT_LENGTH), dtype=torch.long, device=device)
    with torch.no_grad(), _NoteReads(names, events):
        output: Any = twin(input_ids=ids, use_cache=True)
        found = {key: getattr(output, key, None) for key in _CACHES}
        caches = {key: cache for key, cache in found.items() if cache is not None}
        # If a cache alone is not enough, use the prompt's trace only. On the meta device the cause
        # may be the device, so that the whole trace is to be tried again.
        with suppress(*([] if device == "meta" else [Exception])):
            twin(input_ids=ids[:, :1], use_cache=True, **caches)
    return events


def _note_calls(module: nn.Module, name: str, events: list[Event]) -> None:
    module.register_forward_pre_hook(lambda *_: events.append(("call", name)))
    module.register_forward_hook(lambda *_: events.append(("return", name)), always_call=True)


class _NoteReads(TorchDispatchMode):
    """Record which parameters the operators read, also through views.

    Args:
        names: of parameters, by their storage.
        events: list to append to.
    """

    def __init__(self, names: Mapping[int, str], events: list[Event]) -> None:
        super().__init__()
        self._names, self._events = names, events

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _reads_values(func):
            self._note(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def _note(self, arguments: Iterable[Any]) -> None:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and (name := self._names.get(_storage(tensor))):
                self._events.append(("read", name))


def _reads_values(func: Any) -> bool:
    """Whether an operator does more than make a view or query a property."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    makes_views = bool(aliases) and all(alias and not alias.is_write for alias in aliases)
    return func.namespace != "prim" and not makes_views


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _copied(buffer: torch.Tensor, device: str) -> torch.Tensor:
    if buffer.is_meta or device == "meta":
        return torch.zeros_like(buffer, device=device)
    return buffer.cpu().clone()


@contextmanager
def _numbers(model: nn.Module) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Make weights of small random numbers; those of one dtype share the same memory.

    One frame per dtype is mapped repeatedly over the range of its largest weight. The weights must
    not be used after the block.
    """
    n_bytes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        n_bytes[p.dtype] = max(p.numel() * p.itemsize, n_bytes.get(p.dtype, 0))
    space = CpuAddressSpace(max(len(n_bytes), 1), _FRAME_BYTES)
    areas: dict[torch.dtype, Range] = {}

    def weight(parameter: torch.Tensor) -> torch.Tensor:
        packed = space.bytes_view(areas[parameter.dtype])  # each weight needs its own storage
        n_bytes = parameter.numel() * parameter.itemsize
        return packed[:n_bytes].view(parameter.dtype).view(parameter.shape)

    try:
        for frame, dtype in enumerate(n_bytes):
            areas[dtype] = space.reserve(max(-(-n_bytes[dtype] // _FRAME_BYTES), 1))
            space.map(areas[dtype], 0, [frame] * areas[dtype].n_pages)
            if dtype.is_floating_point:
                numbers = torch.empty(_FRAME_BYTES // dtype.itemsize).normal_(
                    std=_DEVIATION, generator=torch.Generator().manual_seed(0)
                )
                space.bytes_view(areas[dtype])[:_FRAME_BYTES].view(dtype).copy_(numbers)
        yield weight
    finally:
        space.close()


# -- which weights a unit needs ------------------------------------------------------------------


def needs_of(
    model: nn.Module, layers: Collection[str], events: Collection[Event]
) -> dict[str, set[str]]:
    """Map each unit to the parameters that it needs, in order of execution.

    A unit is a module that waits for its weights before it runs: a layer, or a module outside the
    layers that owns parameters. It needs what it owns and what was read while it ran. All other
    parameters belong to the whole model, "", and so to each unit: code between the units reads
    them, or their reader is unknown.

    Args:
        model: the traced model.
        layers: names of its decoder layers.
        events: see `observe`.
    """
    called = {name for kind, name in events if kind == "call"}
    places = list(_places(model, [layer for layer in layers if layer in called]))
    units = _waiting(events, {unit for unit, _ in places}, layers)
    needs: dict[str, set[str]] = {unit: set() for unit in ("", *units)}
    for unit, parameter in places:
        needs[unit if unit in needs else ""].add(parameter)
    for unit, parameters in _reads(events, units).items():
        needs[unit] |= parameters
    return {unit: found for unit, own in needs.items() if (found := own | needs[""])}


def _places(model: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (unit, parameter) pairs; the unit is a layer, else the owning module."""
    parameters = {id(p): name for name, p in model.named_parameters()}
    modules = {id(m): name for name, m in model.named_modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        around = (layer for layer in layers if path == layer or path.startswith(f"{layer}."))
        unit = next(around, modules[id(module)])
        for parameter in module.parameters(recurse=False):
            yield unit, parameters[id(parameter)]


def _waiting(
    events: Iterable[Event], candidates: Collection[str], layers: Collection[str]
) -> list[str]:
    """Return the candidates that can wait for their weights, by their first calls.

    No unit may run within another one, so that when one waits, the weights of all others are no
    longer in use. A module called within a layer is part of that layer. A module outside the layers
    that calls other units still needs its own weights when they wait, so it is excluded.
    """
    calls: dict[str, None] = {}
    within: set[tuple[str, str]] = set()
    running: list[str] = []
    for kind, name in events:
        if name in candidates and kind == "call":
            within |= {(outer, name) for outer in running if outer != name}
            calls[name] = None
            running.append(name)
        elif name in candidates and kind == "return":
            running.pop()
    parts = {inner for outer, inner in within if outer in layers}
    wholes = {outer for outer, inner in within if outer not in layers and inner not in parts}
    return [name for name in calls if name not in parts | wholes]


def _reads(events: Iterable[Event], units: Collection[str]) -> dict[str, set[str]]:
    """Map each unit to the parameters read while it ran; "" is outside all units."""
    found: dict[str, set[str]] = {}
    running: list[str] = []
    for kind, name in events:
        if kind == "read":
            found.setdefault(running[0] if running else "", set()).add(name)
        elif name in units and kind == "call":
            running.append(name)
        elif name in units:
            running.pop()
    return found
