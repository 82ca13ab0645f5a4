"""Compute the packing order of a model, and bind its parameters to views.

Nothing here is specific to an architecture. `tracing` observes the order of execution by running
the model once on weights without memory. So packing follows what the model does, not how its
classes are written. A *unit* is a module that waits for its bytes as a whole: each decoder layer,
and each module outside the layers that owns parameters.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn_lib.engine.memory.layout import Extents, Layout
from djinn_lib.engine.models.tracing import Event, needs_of, observe
from djinn_lib.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """A module that may run once its bytes of the packed model are loaded.

    Attributes:
        module: its name.
        extents: of the weights that it owns, and of other modules' weights that it reads; at least
            one extent.
        parameters: names of these weights; a shared weight has its first name.
    """

    module: str
    extents: Extents
    parameters: frozenset[str]

    @property
    def end_byte(self) -> int:
        """End of its last extent, exclusive, in bytes."""
        return self.extents[-1][1]


Wait = Callable[[Extents], None]  # blocks the caller's computation until these bytes are loaded
Embeddings = Literal["host", "ring"]


def choose_embeddings(embeddings: str | None, host_keeps_all: bool) -> Embeddings:
    """Choose where lookup tables are stored; by default what fits the host's memory.

    Raises:
        ConfigError: the place is unknown, or is "host" without all master copies in host memory.
    """
    default = "host" if host_keeps_all else "ring"
    chosen = default if embeddings is None else embeddings
    if chosen not in get_args(Embeddings):
        raise ConfigError(
            f"expected embeddings to be one of {get_args(Embeddings)}, got {embeddings!r}"
        )
    if chosen == "host" and not host_keeps_all:
        raise ConfigError(
            "embeddings='host' cannot be combined with host_capacity: leave one of them out"
        )
    return cast("Embeddings", chosen)


def pack(
    model: PreTrainedModel, embeddings: Embeddings = "ring"
) -> tuple[Layout, tuple[Unit, ...]]:
    """Compute how to pack a model's parameters in execution order, and its units.

    Each parameter is packed once. Parameters that several units need come first, because they stay
    on the device when layers share a window of frames (see `window`). Among these, a parameter that
    no unit needs together with another one comes last, because it need not stay. With `embeddings`
    "host", lookup tables come after all others and belong to no unit, so nothing waits for them.
    """
    events, layers = _events(model), _decoder_layers(model)
    needs = needs_of(model, layers, events)
    calls = dict.fromkeys(name for kind, name in events if kind == "call")
    rank = {module: i for i, module in enumerate(calls)}
    turns = [(turn, name) for turn, names in enumerate(needs.values()) for name in names]
    first_turn = {name: turn for turn, name in reversed(turns)}
    n_units = Counter(name for _, name in turns)
    not_alone = {name for names in needs.values() if len(names) > 1 for name in names}

    def order(name: str) -> tuple[bool, bool, int, int]:
        shared, called = n_units[name] > 1, rank.get(name.rpartition(".")[0], -1)
        return not shared, shared and name not in not_alone, first_turn[name], called

    tables = _lookup_tables(model, layers) if embeddings == "host" else ()
    in_host = {name for name in tables if n_units[name] == 1}  # a shared one may be read whole
    parameters = sorted(
        ((name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()),
        key=lambda shaped: order(shaped[0]),
    )
    layout = Layout.pack(
        [shaped for shaped in parameters if shaped[0] not in in_host],
        [shaped for shaped in parameters if shaped[0] in in_host],
    )
    paged = {slot.name for slot in layout.paged}
    units = [
        Unit(unit, layout.extents(names), frozenset(names & paged))
        for unit, names in needs.items()
        if names & paged
    ]
    return layout, tuple(units)


def _lookup_tables(model: PreTrainedModel, layers: Sequence[str]) -> set[str]:
    """Find parameters of which a forward pass reads only single rows.

    Only embeddings may own such a parameter. A table that is tied to the head is read whole.
    """
    readers: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), []).append((name, module))

    def looks_up(name: str, module: nn.Module) -> bool:
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        # With max_norm a lookup writes: it rescales rows in place.
        return isinstance(module, nn.Embedding) and module.max_norm is None and not inside

    return {
        name
        for name, parameter in model.named_parameters()
        if all(looks_up(*reader) for reader in readers[id(parameter)])
    }


def _events(model: PreTrainedModel) -> list[Event]:
    """Trace what a forward pass calls and reads; [] if it cannot be traced."""
    try:
        return observe(model)
    except Exception as error:  # custom code may raise anything; only the overlap is lost
        logging.getLogger(__name__).warning(
            "%s cannot be traced (%s): it runs only after all its weights are loaded, and must fit "
            "into the ring",
            model.config.model_type,
            error,
        )
        return []


def _decoder_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Name the decoder layers: children of the ModuleList with the most parameters."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        return ()
    stack = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return tuple(f"{stack}.{name}" for name, _ in lists[stack].named_children())


def bind(model: PreTrainedModel, views: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Make every parameter of a model a permanent view of the packed model.

    Parameters remain the same objects, so tied and other references see the views too. Buffers are
    copied, because the buffers of a checkpoint would keep its file mapped.

    Raises:
        ConfigError: a parameter has no view, so it would not see the model's pages.
    """
    parameters = dict(model.named_parameters())
    if unbound := sorted(parameters.keys() - views.keys()):
        raise ConfigError(
            f"the parameters {unbound[:5]} of {model.config.model_type} are not bound to the ring: "
            "this architecture creates parameters after packing and cannot be served"
        )
    for name, parameter in parameters.items():
        parameter.data = views[name]
    model.requires_grad_(False)
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in moved:
                moved[id(buffer)] = buffer.detach().to(device, copy=True)
            setattr(module, name, moved[id(buffer)])
