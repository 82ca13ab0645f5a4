"""Query NVIDIA's management library; without a driver, all results are empty."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
_IDLE_BYTES = 1 << 30  # more than a driver keeps of a GPU that nobody uses


def ask(read: Callable[[Any], T]) -> T | None:
    """Return what `read` gets from the library; None without a driver or such a GPU."""
    import pynvml  # the module of nvidia-ml-py

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return read(pynvml)
    except (pynvml.NVMLError, StopIteration):
        return None
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Return the driver's version."""
    return ask(lambda nvml: nvml.nvmlSystemGetDriverVersion())


def n_gpus() -> int:
    """Return the number of GPUs that the driver lists; 0 without a driver."""
    return ask(lambda nvml: int(nvml.nvmlDeviceGetCount())) or 0


def first_gpu() -> str:
    """Return the UUID of the first GPU that CUDA shows this process, else "gpu0" etc.

    It queries the driver, because a query of CUDA would take device memory. Without a UUID, it
    returns the index in the driver's list.
    """
    visible = _first_visible()
    if visible.startswith("MIG-"):
        return visible  # a MIG instance has no index
    uuid = ask(lambda nvml: nvml.nvmlDeviceGetUUID(_first_handle(nvml)))
    return uuid or (f"gpu{visible}" if visible.isdigit() else visible)


def _first_visible() -> str:
    """Return CUDA_VISIBLE_DEVICES' first entry: an index, or the start of a UUID."""
    entry = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return entry if re.fullmatch(r"\d+|(GPU|MIG)-[0-9A-Za-z-]+", entry) else "0"


def _first_handle(nvml: Any) -> Any:
    visible = _first_visible()
    if visible.startswith("GPU-"):
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return next(h for h in handles if nvml.nvmlDeviceGetUUID(h).startswith(visible))
    return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)


def used_bytes() -> int | None:
    """Return the memory in use on the first GPU, in bytes; None without a driver."""
    return ask(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(_first_handle(nvml)).used))


def free_bytes() -> int | None:
    """Return the free memory of the first GPU, in bytes; None without a driver."""
    return ask(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(_first_handle(nvml)).free))


class MemoryWatch:
    """Records the peak use of the first GPU's memory while its block runs.

    Memory of libraries and other processes counts too. A thread samples it ten times a second,
    which costs the serving thread less than the noise of its clock.

    Attributes:
        base_bytes: the use before the block, which does not count; None without a driver.
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self.base_bytes: int | None = None
        self._most_bytes = 0
        self._serving_most_bytes: int | None = None
        self._interval_s, self._ended = interval_s, threading.Event()

    @property
    def peak_bytes(self) -> int | None:
        """The peak above the use before the block; None without a driver."""
        if self.base_bytes is None:
            return None
        return max(0, self._most_bytes - self.base_bytes)

    @property
    def serving_bytes(self) -> int | None:
        """The peak since `begin_serving`; None without it, or without a driver."""
        if self.base_bytes is None or self._serving_most_bytes is None:
            return None
        return max(0, self._serving_most_bytes - self.base_bytes)

    def begin_serving(self) -> None:
        """Note that the system has started, which can take more memory than serving does."""
        self._serving_most_bytes = 0

    def __enter__(self) -> MemoryWatch:
        self.base_bytes = used_bytes()
        self._thread = threading.Thread(target=self._watch, name="djinn-memory", daemon=True)
        if self.base_bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def _watch(self) -> None:
        def watch(nvml: Any) -> None:
            gpu = _first_handle(nvml)
            while not self._ended.wait(self._interval_s):
                used = int(nvml.nvmlDeviceGetMemoryInfo(gpu).used)
                self._most_bytes = max(self._most_bytes, used)
                if self._serving_most_bytes is not None:
                    self._serving_most_bytes = max(self._serving_most_bytes, used)

        ask(watch)


def await_memory(
    base_bytes: int | None, patience_s: float = 60.0, slack_bytes: int = 64 << 20
) -> str:
    """Wait until the first GPU's memory in use has returned to its earlier level.

    Args:
        base_bytes: earlier result of `used_bytes`; None waits for nothing.
        patience_s: maximum time to wait, in seconds.
        slack_bytes: additional bytes that the driver itself may use.

    Returns:
        "" on success; else a message about the memory that remains in use.
    """
    deadline_s = time.monotonic() + patience_s
    while base_bytes is not None and (used := used_bytes() or 0) > base_bytes + slack_bytes:
        if time.monotonic() > deadline_s:
            held = ", ".join(gpu_processes(with_this_one=False)) or "no process that NVML lists"
            return (
                f"expected {base_bytes:,} bytes of GPU memory in use as before, got {used:,} "
                f"after {patience_s:.0f} s, held by {held}"
            )
        time.sleep(0.5)
    return ""


def gpu_processes(with_this_one: bool = True) -> list[str]:
    """Return "pid name bytes" for each process that holds memory of the first GPU."""

    def read(nvml: Any) -> list[str]:
        handle = _first_handle(nvml)
        return [
            f"{p.pid} {_name(p.pid)} {p.usedGpuMemory or 0}"
            for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if with_this_one or p.pid != os.getpid()
        ]

    return ask(read) or []


def busy_neighbours() -> list[str]:
    """Return the UUIDs of the host's other GPUs that are in use.

    A run there shares the host's memory and driver: while its processes start and pin memory, a
    copy here can take many times as long.
    """

    def read(nvml: Any) -> list[str]:
        own = nvml.nvmlDeviceGetUUID(_first_handle(nvml))
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        others = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
        others.pop(own, None)
        return sorted(
            uuid
            for uuid, handle in others.items()
            if nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            or nvml.nvmlDeviceGetMemoryInfo(handle).used > _IDLE_BYTES
        )

    return ask(read) or []


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"
