"""Facts of NVIDIA's management library; all of them are empty where there is no driver."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil

T = TypeVar("T")


def ask(read: Callable[[Any], T]) -> T | None:
    """Return what `read` gets from the library, None where there is no driver or no such GPU."""
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
    """Version of the driver."""
    return ask(lambda nvml: nvml.nvmlSystemGetDriverVersion())


def first_gpu() -> str:
    """Return the UUID of the GPU that CUDA shows this process first, or "gpu0" and the like.

    The driver is asked, not CUDA, which would take device memory for the answer. Where no UUID is
    to be had, the place in the driver's list stands for it.
    """
    visible = _first_visible()
    if visible.startswith("MIG-"):
        return visible  # a part of a GPU: no index leads to it
    uuid = ask(lambda nvml: nvml.nvmlDeviceGetUUID(_first_handle(nvml)))
    return uuid or (f"gpu{visible}" if visible.isdigit() else visible)


def _first_visible() -> str:
    """The first entry of CUDA_VISIBLE_DEVICES: an index, or a UUID as far as it was written."""
    entry = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    return entry if re.fullmatch(r"\d+|(GPU|MIG)-[0-9A-Za-z-]+", entry) else "0"


def _first_handle(nvml: Any) -> Any:
    visible = _first_visible()
    if visible.startswith("GPU-"):
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return next(h for h in handles if nvml.nvmlDeviceGetUUID(h).startswith(visible))
    return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)


def used_bytes() -> int | None:
    """Bytes of the first GPU's memory in use, by whomever; None where there is no driver."""

    def read(nvml: Any) -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(_first_handle(nvml)).used)

    return ask(read)


class MemoryWatch:
    """Notes the most of the first GPU's memory that is in use while its block runs.

    By whomever: what libraries and other processes of a system take counts as well. It is asked for
    ten times a second by a thread, which costs the serving thread less than the noise of its clock.

    Attributes:
        peak_bytes: the most, less what was in use before the block; None where there is no driver.
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self.peak_bytes: int | None = None
        self._interval_s, self._ended = interval_s, threading.Event()

    def __enter__(self) -> MemoryWatch:
        self._base_bytes = used_bytes()
        self._thread = threading.Thread(target=self._watch, name="djinn-memory", daemon=True)
        if self._base_bytes is not None:
            self.peak_bytes = 0
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
                used = int(nvml.nvmlDeviceGetMemoryInfo(gpu).used) - (self._base_bytes or 0)
                self.peak_bytes = max(self.peak_bytes or 0, used)

        ask(watch)


def await_memory(
    base_bytes: int | None, patience_s: float = 60.0, slack_bytes: int = 64 << 20
) -> str:
    """Wait until no more of the first GPU's memory is in use than before.

    Args:
        base_bytes: from `used_bytes`, before; None: there is nothing to wait for.
        patience_s: how long (s) to wait.
        slack_bytes: what the driver itself may need more.

    Returns:
        "" when it is; else what is left in use, for people.
    """
    deadline_s = time.monotonic() + patience_s
    while base_bytes is not None and (used := used_bytes() or 0) > base_bytes + slack_bytes:
        if time.monotonic() > deadline_s:
            held = ", ".join(gpu_processes(with_this_one=False)) or "no process that it names"
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


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "?"
