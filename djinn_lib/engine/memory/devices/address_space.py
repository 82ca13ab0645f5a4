"""Virtual addresses for weights: reserve a range once, then map and unmap frames under it.

A tensor over a range keeps its address for life, whichever frames lie under it, so parameters are
bound once and never again. Only `address_space_cpu` and `address_space_cuda` know how it is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from djinn_lib.errors import ConfigError, PlatformError
from djinn_lib.units import format_bytes


@dataclass(frozen=True, slots=True)
class Range:
    """A reserved range of virtual addresses: `n_pages` pages from `address` on."""

    address: int
    n_pages: int


class AddressSpace(ABC):
    """`n_frames` physical frames of `page_bytes` each, and ranges to map them into."""

    device: torch.device

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        granularity = self.granularity_bytes()
        if page_bytes < granularity or page_bytes % granularity:
            raise ConfigError(
                f"expected pages of a multiple of {granularity} bytes on this device, "
                f"got {page_bytes}"
            )
        self.n_frames = n_frames
        self.page_bytes = page_bytes

    @abstractmethod
    def granularity_bytes(self) -> int:
        """The smallest page size; every page size is a multiple of it."""

    @abstractmethod
    def reserve(self, n_pages: int) -> Range:
        """Reserve addresses for `n_pages` pages; nothing is mapped.

        Raises:
            PlatformError: there are not as many.
        """

    @abstractmethod
    def release(self, area: Range) -> None:
        """Give a range back, mapped or not. Tensors over it must not be used any more."""

    @abstractmethod
    def map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map `frames[i]` at page `first_page + i`.

        Raises:
            PlatformError: the system refuses; none of those pages is mapped.
        """

    @abstractmethod
    def unmap(self, area: Range, first_page: int, n_pages: int) -> None:
        """Unmap pages, where they are mapped.

        The caller has made sure that nothing on the device still reads them.
        """

    @abstractmethod
    def bytes_view(self, area: Range) -> torch.Tensor:
        """The whole range as a 1-d uint8 tensor; valid for life, readable where mapped."""

    @abstractmethod
    def export(self) -> list[int]:
        """Return descriptors of the frames for other processes; the caller closes them.

        Another process maps the same frames when it opens its address space over them. A frame is
        freed when the last process that has it lets it go.

        Raises:
            PlatformError: the frames were not made to be shared.
        """

    @abstractmethod
    def close(self) -> None:
        """Release every range and frame; closing twice is harmless."""


def not_reserved(n_bytes: int, reason: object) -> PlatformError:
    """The error of addresses that cannot be had."""
    return PlatformError(
        f"expected {format_bytes(n_bytes)} of virtual addresses, got none ({reason}): remove "
        "models, or raise the limit that `ulimit -v` shows"
    )


def not_mapped(n_pages: int, page_bytes: int, reason: object) -> PlatformError:
    """The error of pages that cannot be mapped."""
    return PlatformError(
        f"expected {n_pages} pages of {format_bytes(page_bytes)} to be mapped, got none "
        f"({reason}): free memory, or use fewer, larger pages"
    )


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
        n_frames, page_bytes: how many frames of which size.
        shared: make frames that can be exported to other processes.
        frames: descriptors that another process exported: use its frames and make none.

    Raises:
        ConfigError: no backend for that kind of device.
        CapacityError: the device has less memory than the frames need.
        PlatformError: the platform lacks what the backend needs.
    """
    if device.type == "cpu":
        from djinn_lib.engine.memory.devices.address_space_cpu import CpuAddressSpace

        return CpuAddressSpace(n_frames, page_bytes, frames)
    if device.type == "cuda":
        from djinn_lib.engine.memory.devices.address_space_cuda import CudaAddressSpace

        return CudaAddressSpace(n_frames, page_bytes, device, shared, frames)
    raise ConfigError(f"expected device 'cpu' or 'cuda', got {str(device)!r}")
