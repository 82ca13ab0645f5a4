"""Facts of NVIDIA's management library; all of them are empty where there is no driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import psutil

T = TypeVar("T")


def ask(read: Callable[[Any], T]) -> T | None:
    """Return what `read` gets from the library, None where there is no driver."""
    import pynvml  # the module of nvidia-ml-py

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return read(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Version of the driver."""
    return ask(lambda nvml: nvml.nvmlSystemGetDriverVersion())


def gpu_processes(with_this_one: bool = True) -> list[str]:
    """Return "pid name bytes" for each process that holds memory of the first GPU."""

    def read(nvml: Any) -> list[str]:
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
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
