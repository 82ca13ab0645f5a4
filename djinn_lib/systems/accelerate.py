"""Offload a model with accelerate, which copies its last layers at each call.

The first layers use the same device memory as in a ring, with the same master copies and
accelerate's own hooks. It is not one of `SYSTEMS`: it serves one model, which is larger than the
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from djinn_lib.engine.models.packing import Unit


def offload(
    model: PreTrainedModel,
    units: Sequence[Unit],
    weights: Mapping[str, torch.Tensor],
    capacity_bytes: int,
    device: str,
) -> tuple[PreTrainedModel, int]:
    """Add accelerate's hooks; return the model and the bytes copied per pass.

    The first units, in the order of execution, stay on the device, as many as leave room for the
    largest of the others.

    Args:
        model: from `open_source`, before or after `fill`.
        units: of the model.
        weights: its master copies on the host, by name.
        capacity_bytes: device memory for weights.
        device: where it runs.
    """
    ends = sorted({unit.end_byte for unit in units})
    sizes = {end: end - begin for begin, end in pairwise([0, *ends])}
    # One unit at a time is copied, into room that the resident ones must leave free.
    stays_up_to = max((e for e in ends if e + max(sizes.values()) <= capacity_bytes), default=0)
    offloaded = {unit.module for unit in units if unit.end_byte > stays_up_to}
    moved = {name: w for name, w in weights.items() if _owner(name, offloaded) is None}
    for name, parameter in model.named_parameters():
        if name in moved:
            parameter.data = _on_device(moved[name], device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for unit in offloaded:
        own = {n.removeprefix(f"{unit}."): w for n, w in weights.items() if _owner(n, {unit})}
        cpu_offload(model.get_submodule(unit), torch.device(device), state_dict=_Masters(own))
    return model.requires_grad_(False), sum(
        size for end, size in sizes.items() if end > stays_up_to
    )


def _owner(name: str, units: set[str]) -> str | None:
    return next((unit for unit in units if name.startswith(f"{unit}.")), None)


def _on_device(weight: torch.Tensor, device: str) -> torch.Tensor:
    return weight.clone() if device == "cpu" else weight.to(device)


class _Masters(dict[str, torch.Tensor]):
    """Master copies for the lookups of accelerate's hooks.

    On the CPU, a lookup copies the weight, as the transfer to another device would. The hooks
    themselves would use the master.
    """

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = super().__getitem__(name)
        return weight if weight.is_pinned() else weight.clone()
