"""Host memory for master copies: looked up, allocated to the byte, pinned for the copy engine."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from djinn_lib.errors import CapacityError, PlatformError
from djinn_lib.units import format_bytes


def pin(master: torch.Tensor) -> None:
    """Register memory with the CUDA driver (`cudaHostRegister`), so that copies run at full rate.

    Raises:
        CapacityError: the host has too little memory that can be pinned.
    """
    status = _cudart().cudaHostRegister(master.data_ptr(), master.numel(), 0)
    if int(status) != 0:
        raise CapacityError(
            f"expected {format_bytes(master.numel())} of host memory that can be pinned, got CUDA "
            f"error {int(status)}: free host memory, raise `ulimit -l`, or add fewer models"
        )


def seen_from(master: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return pinned memory as a tensor of a GPU, which reads it over the link; on the CPU itself.

    Pinned memory has the same address on the device (unified virtual addressing).

    Raises:
        PlatformError: the device has another address for it.
    """
    if device.type == "cpu":
        return master
    seen = torch.as_tensor(_Pinned(master), device=device)
    if seen.data_ptr() != master.data_ptr():
        raise PlatformError(
            f"expected {device} to read host memory at the host's addresses, got a copy: "
            "use embeddings='ring'"
        )
    return seen


class _Pinned:
    """Host memory as the CUDA array interface describes it; kept by the tensors over it."""

    def __init__(self, master: torch.Tensor) -> None:
        self._master = master
        self.__cuda_array_interface__ = {
            "shape": (master.numel(),),
            "typestr": "|u1",
            "data": (master.data_ptr(), False),
            "version": 3,
        }


def unpin(master: torch.Tensor) -> None:
    """Undo `pin`, when no copy reads the memory any more."""
    torch.cuda.synchronize()
    _cudart().cudaHostUnregister(master.data_ptr())


def _cudart() -> Any:
    """The CUDA runtime, which torch has loaded."""
    return torch.cuda.cudart()


def allocate(n_bytes: int) -> torch.Tensor:
    """Return exactly `n_bytes` of zeroed host memory (1-d uint8), aligned to the system's pages.

    It is freed with the last tensor that views it. Linux promises memory that it does not have, and
    ends the process that then uses it; so what is available is looked up first. Huge pages, where
    the system has them, save most of the time that the first touch of gigabytes takes.

    Raises:
        CapacityError: there is not as much.
    """
    if n_bytes > (available_bytes := host_bytes_available()):
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of host memory for a master copy, got "
            f"{format_bytes(available_bytes)} available: free memory or add fewer models"
        )
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of host memory for a master copy, got "
            f"{error.strerror}: free memory or add fewer models"
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTFORK)  # a child's copy would move pages that are pinned here
    return torch.frombuffer(memory, dtype=torch.uint8)


def host_bytes_available(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that can be had, also by the rules of a container.

    Args:
        group: folder of the control group; the file cache that counts there can be given back.
    """
    available = psutil.virtual_memory().available
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["file"]) - int(stat["shmem"])  # shared memory counts there, and stays
        return min(available, int(limit) - int(used) + cached)
    except (OSError, ValueError, KeyError):  # no such group, or one without a limit ("max")
        return available
