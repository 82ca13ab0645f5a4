"""Backends of the CPU and of NVIDIA GPUs: address spaces, copies, host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from djinn_lib.engine.memory.devices.base import AddressSpace, Copier
from djinn_lib.engine.memory.devices.cpu import CpuAddressSpace, ThreadCopier
from djinn_lib.engine.memory.devices.cuda import CudaAddressSpace
from djinn_lib.engine.memory.devices.cuda_copies import StreamCopier
from djinn_lib.errors import ConfigError


def open_address_space(
    device: torch.device,
    n_frames: int,
    page_bytes: int,
    shared: bool = False,
    frames: Sequence[int] | None = None,
) -> AddressSpace:
    """Return the address space of a device.

    Args:
        device: the CPU or a GPU.
        n_frames, page_bytes: number and size of the frames.
        shared: make frames that can be exported to other processes.
        frames: descriptors of another process's frames; default is to make new ones.

    Raises:
        ConfigError: there is no backend for the device.
        CapacityError: the device has less memory than the frames need.
        PlatformError: the platform lacks what the backend needs.
    """
    if device.type == "cpu":
        return CpuAddressSpace(n_frames, page_bytes, frames)
    if device.type == "cuda":
        return CudaAddressSpace(n_frames, page_bytes, device, shared, frames)
    raise ConfigError(f"expected device 'cpu' or 'cuda', got {str(device)!r}")


def open_copier(device: torch.device) -> Copier:
    """Return the copier of a device."""
    return StreamCopier(device) if device.type == "cuda" else ThreadCopier()
