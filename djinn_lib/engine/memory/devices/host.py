"""Query, allocate and pin host memory."""

from __future__ import annotations

import ctypes
import mmap
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from djinn_lib.engine.memory.devices import control_groups
from djinn_lib.errors import CapacityError, PlatformError
from djinn_lib.units import format_bytes

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, see madvise(2); `mmap` has no name for it


def pin(master: torch.Tensor) -> None:
    """Register memory with the CUDA driver (`cudaHostRegister`), so that copies run at full rate.

    Raises:
        CapacityError: the host cannot pin as much memory.
    """
    status = _cudart().cudaHostRegister(master.data_ptr(), master.numel(), 0)
    if int(status) != 0:
        raise CapacityError(
            f"expected {format_bytes(master.numel())} of host memory that can be pinned, got CUDA "
            f"error {int(status)}: free host memory, raise `ulimit -l`, or add fewer models"
        )


def seen_from(master: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return pinned memory as a tensor of `device`; a GPU reads it over the link.

    Pinned memory has the same address on the device (unified virtual addressing).

    Raises:
        PlatformError: the device has another address for it.
    """
    if device.type == "cpu":
        return master
    seen = tensor_at(master.data_ptr(), master.numel(), device, owner=master)
    if seen.data_ptr() != master.data_ptr():
        raise PlatformError(
            f"expected {device} to read host memory at the host's addresses, got a copy: "
            "use embeddings='ring'"
        )
    return seen


def tensor_at(address: int, n_bytes: int, gpu: torch.device, owner: Any = None) -> torch.Tensor:
    """Return addresses as a tensor of a GPU (1-d uint8), which keeps `owner` alive.

    torch looks the address up now, so its first bytes must be mapped.
    """
    return torch.as_tensor(_Bytes(address, n_bytes, owner), device=gpu)


class _Bytes:
    """Addresses as the CUDA array interface describes them; kept by the tensors over it."""

    def __init__(self, address: int, n_bytes: int, owner: Any) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (n_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def unpin(master: torch.Tensor) -> None:
    """Undo `pin`, after all copies have ended."""
    torch.cuda.synchronize()
    _cudart().cudaHostUnregister(master.data_ptr())


def _cudart() -> Any:
    """The CUDA runtime, which torch has loaded."""
    return torch.cuda.cudart()


def allocate(
    n_bytes: int, use: str = "a master copy", instead: str = "add fewer models", now: bool = False
) -> torch.Tensor:
    """Return exactly `n_bytes` of zeroed host memory (1-d uint8), aligned to the system's pages.

    It is freed with the last tensor that views it. Huge pages make the first access to gigabytes
    much faster.

    Args:
        n_bytes: how many.
        use, instead: for errors: what the memory is for, and what the user can do instead.
        now: commit the memory now, so that later writes cannot run out of it.

    Raises:
        CapacityError: the host has less memory.
    """
    require(n_bytes, use, instead)
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of host memory for {use}, got {error.strerror}: "
            f"free memory or {instead}"
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    _wipe_in_children(memory)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return tensor.zero_() if now else tensor


def _wipe_in_children(memory: mmap.mmap) -> None:
    """Give forked children zeros: a child's copy would move pages that are pinned here.

    The child must have something at these addresses, since it unmaps them when it collects
    `memory`. If they were free, that could be memory that it has allocated itself.
    """
    try:
        memory.madvise(_WIPE_ON_FORK)
    except OSError:  # a kernel without it
        memory.madvise(mmap.MADV_DONTFORK)


def keep(memory: torch.Tensor, n_bytes: int) -> torch.Tensor:
    """Return the first `n_bytes` of memory that was allocated here, and free the others."""
    begin = memory.data_ptr() + n_bytes
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if (n_left := memory.data_ptr() + memory.numel() - begin) > 0:
        _libc().madvise(begin, n_left, mmap.MADV_DONTNEED)  # at worst they stay
    return memory[:n_bytes]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def require(n_bytes: int, use: str, instead: str) -> None:
    """Check that the host has as much memory: Linux overcommits, and kills processes later.

    Args:
        n_bytes: how many.
        use, instead: for errors: what the memory is for, and what the user can do instead.

    Raises:
        CapacityError: the host has less memory.
    """
    if n_bytes > (available_bytes := host_bytes_available()):
        raise CapacityError(
            f"expected {format_bytes(n_bytes)} of host memory for {use}, got "
            f"{format_bytes(available_bytes)} available: free memory or {instead}"
        )


def host_bytes_available(group: Path | None = None) -> int:
    """Return how many bytes of host memory this process can still use, under all its limits.

    Args:
        group: folder of a control group to use instead of the process's own groups.
    """
    limits = [psutil.virtual_memory().available, *_left_of_addresses()]
    if group is None:
        limits += control_groups.limits_of()
    elif (left := control_groups.bytes_left(group)) is not None:
        limits.append(left)
    return max(0, min(limits))


def _left_of_addresses() -> list[int]:
    """Return what `ulimit -v` leaves, if there is a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    return [limit - psutil.Process().memory_info().vms]
