"""Which device computes, as callers name it."""

from __future__ import annotations

import torch

from djinn_lib.errors import ConfigError, shown

DEFAULT_PAGE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return a device by name; None is a GPU where there is one, else the CPU.

    Raises:
        ConfigError: it is neither the CPU nor an NVIDIA GPU, or there is no GPU of that number.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:  # torch lists a score of backends
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        shown_device = str(device) if isinstance(device, torch.device) else device
        raise ConfigError(
            f"expected device 'cpu', 'cuda' or one GPU such as 'cuda:0', got {shown(shown_device)}"
        )
    if found.type == "cpu":
        return torch.device("cpu")  # there is one, whatever its number
    n_gpus = torch.cuda.device_count()
    if found.index is not None and n_gpus and found.index >= n_gpus:
        raise ConfigError(
            f"expected a GPU from 'cuda:0' to 'cuda:{n_gpus - 1}', got {str(found)!r}: choose one "
            "of those, or check CUDA_VISIBLE_DEVICES"
        )
    return found
