"""The backend of NVIDIA GPUs, by the driver's virtual memory management.

Frames are physical allocations (`cuMemCreate`), a range is `cuMemAddressReserve`, and a page is
mapped with `cuMemMap` and `cuMemSetAccess`. None of these waits for the device, so copies and
kernels in flight are not stalled. See the CUDA driver API, "Virtual Memory Management".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from djinn_lib.engine.memory.devices import host
from djinn_lib.engine.memory.devices.base import AddressSpace, Range, Refused
from djinn_lib.errors import CapacityError, PlatformError
from djinn_lib.nvml import gpu_processes
from djinn_lib.units import format_bytes

try:
    from cuda.bindings import driver
except ImportError:  # reported when a GPU is requested, not on import
    driver: Any = None


class CudaAddressSpace(AddressSpace):
    """Frames of one GPU.

    Args:
        n_frames, page_bytes: number and size of the frames.
        device: the GPU.
        shared: make frames that `export` can pass to other processes.
        frames: exported descriptors of another process's frames; default is to make new ones.

    Raises:
        PlatformError: no usable GPU, driver or `cuda-bindings`, or no virtual memory management.
        CapacityError: less device memory is free than the frames need.
    """

    def __init__(
        self,
        n_frames: int,
        page_bytes: int,
        device: torch.device,
        shared: bool = False,
        frames: Sequence[int] | None = None,
    ) -> None:
        self._frames: list[Any] = []
        _require_cuda(device)
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            torch.empty(1, device=self.device)  # makes torch's context, which the driver then uses
            self._context = _call(driver.cuCtxGetCurrent)
        _require_virtual_memory(self.device)
        self._kind = _allocation_kind(self.device, shared)
        super().__init__(n_frames, page_bytes)
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._kind.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        if frames is None:
            self._make_frames()
        else:
            self._import_frames(frames)

    def _import_frames(self, descriptors: Sequence[int]) -> None:
        """Use the frames of another process; the caller still has to close the descriptors."""
        try:
            for one in descriptors:
                self._frames.append(_call(driver.cuMemImportFromShareableHandle, one, _handles()))
        except PlatformError:
            self.close()
            raise

    def _make_frames(self) -> None:
        n_bytes = self.n_frames * self.page_bytes
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        if n_bytes > free_bytes:
            raise CapacityError(
                f"expected {format_bytes(n_bytes)} of free device memory for the ring, got "
                f"{format_bytes(free_bytes)}; processes on the GPU: {gpu_processes() or 'none'}: "
                "lower the capacity or end them"
            )
        try:
            for _ in range(self.n_frames):
                self._frames.append(_call(driver.cuMemCreate, self.page_bytes, self._kind, 0))
        except PlatformError as error:
            self.close()
            raise CapacityError(
                f"expected {format_bytes(n_bytes)} of device memory, got {error}: "
                "lower the capacity"
            ) from error

    def granularity_bytes(self) -> int:
        """The driver's smallest allocation, 2 MiB on current GPUs."""
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(_call(driver.cuMemGetAllocationGranularity, self._kind, flag))

    def _enter_context(self) -> None:
        """Make torch's context current: a thread has none before it first uses CUDA."""
        if not int(_call(driver.cuCtxGetCurrent)):
            _call(driver.cuCtxSetCurrent, self._context)

    def _reserve(self, n_bytes: int) -> int:
        self._enter_context()
        return int(_call(driver.cuMemAddressReserve, n_bytes, 0, 0, 0))

    def _release(self, area: Range, pages: Sequence[int]) -> None:
        self._enter_context()
        for page in pages:
            _call(driver.cuMemUnmap, area.address + page * self.page_bytes, self.page_bytes)
        _call(driver.cuMemAddressFree, area.address, area.n_pages * self.page_bytes)

    def _map(self, area: Range, first_page: int, frames: Sequence[int]) -> None:
        """Map frames one by one, then allow access to all of them at once."""
        self._enter_context()
        begin = area.address + first_page * self.page_bytes
        for i, frame in enumerate(frames):
            address = begin + i * self.page_bytes
            _call(driver.cuMemMap, address, self.page_bytes, 0, self._frames[frame], 0)
            self._mapped[area.address].add(first_page + i)
        _call(driver.cuMemSetAccess, begin, len(frames) * self.page_bytes, [self._access], 1)

    def _unmap(self, area: Range, pages: Sequence[int]) -> None:
        """Unmap pages one by one, because a mapping can only be undone as a whole."""
        self._enter_context()
        for page in pages:
            _call(driver.cuMemUnmap, area.address + page * self.page_bytes, self.page_bytes)
            self._mapped[area.address].remove(page)

    def bytes_view(self, area: Range) -> torch.Tensor:
        """A tensor over the addresses, through the CUDA array interface.

        torch looks up the pointer once, so the first page is mapped for that moment.
        """
        needs_page = 0 not in self._mapped[area.address]
        if needs_page:
            self.map(area, 0, [0])
        try:
            return host.tensor_at(area.address, area.n_pages * self.page_bytes, self.device)
        finally:
            if needs_page:
                self.unmap(area, 0, 1)

    def export(self) -> list[int]:
        """Return a descriptor for each frame."""
        try:
            export = driver.cuMemExportToShareableHandle
            return [int(_call(export, frame, _handles(), 0)) for frame in self._frames]
        except PlatformError as error:
            raise PlatformError(
                f"these frames cannot be passed to other processes ({error}): make them with "
                "shared=True, and raise `ulimit -n` above their number"
            ) from error

    def close(self) -> None:
        """Wait for the device, then release every range and frame."""
        if self._areas or self._frames:
            self._enter_context()
            torch.cuda.synchronize(self.device)
        for area in list(self._areas.values()):
            self.release(area)
        while self._frames:
            _call(driver.cuMemRelease, self._frames.pop())


def _call(function: Any, *arguments: Any) -> Any:
    """Call the driver and return its result.

    Raises:
        Refused: it returned an error; the message has its name.
    """
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise Refused(f"{function.__name__} failed with {status.name}")
    return values[0] if values else None


def _handles() -> Any:
    """Return the kind of handle by which processes share frames: file descriptors."""
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _allocation_kind(device: torch.device, shared: bool) -> Any:
    kind = driver.CUmemAllocationProp()
    kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    kind.location.id = device.index
    if shared:
        kind.requestedHandleTypes = _handles()
    return kind


def _require_cuda(device: torch.device) -> None:
    if driver is None:
        raise PlatformError(
            "expected the package cuda-bindings for device 'cuda', got none: "
            "pip install 'cuda-bindings>=13,<14', or use device='cpu'"
        )
    if not torch.cuda.is_available():
        raise PlatformError(
            f"expected a usable CUDA driver and GPU for device {str(device)!r}, got none: "
            "install the driver, or use device='cpu'"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise PlatformError(
            f"expected one of {torch.cuda.device_count()} GPUs, got {str(device)!r}"
        )


def _require_virtual_memory(device: torch.device) -> None:
    name = "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"
    attribute = getattr(driver.CUdevice_attribute, name)
    handle = _call(driver.cuDeviceGet, device.index)
    if not _call(driver.cuDeviceGetAttribute, attribute, handle):
        raise PlatformError(
            f"expected a GPU with virtual memory management, got "
            f"{torch.cuda.get_device_name(device)}: use a GPU of Pascal or later, not under WSL1"
        )
