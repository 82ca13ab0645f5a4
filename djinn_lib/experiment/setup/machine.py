"""Describe the machine: hardware, software, and measured rates that bound all results."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from djinn_lib import nvml
from djinn_lib.provenance import package_versions

_COPY_BYTES = 256 << 20
_HBM_BYTES = 2 << 30  # much larger than the cache, and slow compared with a kernel's start
_IN_A_ROW = 8
_WARM_UP_S = 0.3  # of copies or reads, until the link or the clock of the memory is awake
_LOOP_STEPS = 10_000
_OPERATORS = 500  # fewer than a stream's queue holds, so that the host never waits for the device


def describe_machine(device: str) -> dict[str, Any]:
    """Return the machine as plain data: names, sizes in bytes, versions, measured rates.

    `link_rate_bytes_per_s` is the rate of a large copy from host memory to the device (on the CPU,
    of a copy within host memory). None without a GPU: `hbm_rate_bytes_per_s`, bytes read plus
    written by a copy within device memory, and `hbm_read_rate_bytes_per_s`, bytes read by the
    fastest of a few reductions. `eager_operator_us` bounds eager decoding: the time, in
    microseconds, in which the host starts one small operator.
    """
    memory = psutil.virtual_memory()
    return {
        "device": device,
        "device_name": device_name(device),
        "gpu_uuid": nvml.first_gpu() if device == "cuda" else None,
        "gpus_of_host": nvml.n_gpus(),
        "device_bytes": torch.cuda.mem_get_info()[1] if device == "cuda" else memory.total,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "host_bytes": memory.total,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        **measure_rates(device),
        "eager_operator_us": eager_operator_us(device),
    }


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor for the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python, the driver and the packages that matter, where installed."""
    found = package_versions()
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = nvml.driver_version() or "unknown"
    return found


def measure_rates(device: str, repeats: int = 5) -> dict[str, float | None]:
    """Measure rates in bytes per second: on a GPU the best of `repeats`, else the median.

    A GPU's link is slow at first and then reaches its maximum, which is the rate to report. The
    memory of a shared CPU is sometimes faster and sometimes slower, so the typical rate is used.
    """
    pinned = device == "cuda"
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device=device)
    rates: dict[str, float | None] = {
        "link_rate_bytes_per_s": _copy_rate(target, source, repeats),
        "d2h_rate_bytes_per_s": _copy_rate(source, target, repeats) if pinned else None,
        "hbm_rate_bytes_per_s": None,
        "hbm_read_rate_bytes_per_s": None,
    }
    if pinned:
        large = torch.ones(_HBM_BYTES, dtype=torch.uint8, device=device)
        rates["hbm_rate_bytes_per_s"] = 2 * _copy_rate(torch.empty_like(large), large, repeats)
        # Which of these the compiler made the most of differs between versions and GPUs.
        rates["hbm_read_rate_bytes_per_s"] = max(
            _rate(_HBM_BYTES, reading, True, repeats)
            for reading in (
                lambda: large.view(torch.float16).sum(dtype=torch.float32),
                lambda: large.view(torch.float32).sum(),
                lambda: large.view(torch.float32).max(),
                lambda: large.view(torch.int64).max(),
            )
        )
        del large, source, target
        torch.cuda.empty_cache()  # what was only measured with belongs to nobody
    return rates


def eager_operator_us(device: str, repeats: int = 21) -> float:
    """Measure the median time of the host, in microseconds, for one operator on one element.

    A transformer layer has some tens of operators, each started by Python. The GPU finishes most of
    them before the next one starts, so one core of the host bounds eager decoding. Replayed from a
    CUDA graph, the same kernels take a fraction of the time.
    """
    number = torch.zeros(1, device=device)
    took_s = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        for _ in range(_OPERATORS):
            number.add_(1.0)
        took_s.append(time.perf_counter() - begin_s)
        if number.is_cuda:
            torch.cuda.synchronize()
    return statistics.median(took_s) / _OPERATORS * 1e6


def host_loop_us(repeats: int = 5) -> float:
    """Measure the host's pace: the median time of a fixed loop of Python, in microseconds.

    It takes about a millisecond and uses neither much memory nor the device.
    """
    took_s = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        for _ in range(_LOOP_STEPS):
            pass
        took_s.append(time.perf_counter() - begin_s)
    return statistics.median(took_s) * 1e6


def stolen_share(since: Any) -> float | None:
    """Return the share of processor time that a hypervisor gave to others.

    It is 0 without a hypervisor, or with one that does not report it; None if the system has no
    such counter. `since` is an earlier result of `psutil.cpu_times`.
    """
    now = psutil.cpu_times()
    if not hasattr(now, "steal"):
        return None
    # Time of guests is part of the user's time already.
    names = [name for name in now._fields if not name.startswith("guest")]
    passed = {name: getattr(now, name) - getattr(since, name) for name in names}
    total_s = sum(passed.values())
    return passed["steal"] / total_s if total_s > 0 else 0.0


def _copy_rate(target: torch.Tensor, source: torch.Tensor, repeats: int) -> float:
    on_gpu = target.is_cuda or source.is_cuda
    return _rate(source.numel(), lambda: target.copy_(source), on_gpu, repeats)


def _rate(n_bytes: int, work: Callable[[], Any], on_gpu: bool, repeats: int) -> float:
    """Return the bytes per second of `work`, which handles `n_bytes`.

    On a GPU several calls are timed together, so the host's time to start them does not count.
    """
    if not on_gpu:
        work()
        return n_bytes / statistics.median(_seconds(work, 1) for _ in range(repeats))
    warm_up_s = 0.0
    while warm_up_s < _WARM_UP_S:
        warm_up_s += _IN_A_ROW * _seconds(work, _IN_A_ROW)
    return n_bytes / min(_seconds(work, _IN_A_ROW) for _ in range(repeats))


def _seconds(work: Callable[[], Any], n_times: int) -> float:
    """Return the mean time of `work` over `n_times` consecutive calls."""
    begin_s = time.perf_counter()
    for _ in range(n_times):
        work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin_s) / n_times


def other_gpu_processes() -> list[str]:
    """Return "pid name bytes" for each other process that holds memory of the first GPU."""
    return nvml.gpu_processes(with_this_one=False)
