"""accelerate's offloading: a model whose last layers are brought in whenever they are called.

The same device memory for the same first layers as a ring has, the same master copies, and
accelerate's own hooks. Not one of `SYSTEMS`: it serves one model, which is larger than the device.
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
    """Give a model accelerate's hooks; returns it, and the bytes that each forward pass copies.

    The first units stay on the device, as many as leave room for the largest of the others.

    Args:
        model: as `open_source` gives it, before `fill` or after.
        units: of the model, in the order of execution.
        weights: its master copies on the host, by name.
        capacity_bytes: device memory for weights.
        device: where it runs.
    """
    ends = sorted({unit.end_byte for unit in units})
    sizes = {end: end - begin for begin, end in pairwise([0, *ends])}
    stays_up_to = max((e for e in ends if e + max(sizes.values()) <= capacity_bytes), default=0)
    going = {unit.module for unit in units if unit.end_byte > stays_up_to}
    moved = {name: w for name, w in weights.items() if _owner(name, going) is None}
    for name, parameter in model.named_parameters():
        if name in moved:
            parameter.data = _on_device(moved[name], device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for unit in going:
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
    """Master copies as accelerate's hooks look them up.

    On the CPU a weight that is looked up is copied, as on its way to any other device; the hooks
    would use the master itself.
    """

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = super().__getitem__(name)
        return weight if weight.is_pinned() else weight.clone()
