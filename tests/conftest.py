"""What every test starts from: fixed seeds, two threads, no network, GPU tests only with a GPU.

Of Hypothesis there are two profiles: `make test` and `make test-slow` draw few examples, the same
each time, and `make test-all` (`--hypothesis-profile thorough`) draws many.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Read when torch, huggingface_hub and Ray are first imported, in this process and its children.
# One thread for each of several test processes, so that they do not wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, settings
from tqdm import tqdm

from djinn_lib.fleet import environment

_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "fast", _COMMON, max_examples=20, stateful_step_count=25, derandomize=True
)
settings.register_profile("thorough", _COMMON, max_examples=200, stateful_step_count=40)
settings.load_profile("fast")

tqdm.monitor_interval = 0  # a progress bar starts no thread, which tests of leaks would find


def cuda_device_count() -> int:
    """How many GPUs the driver lists; asked from outside, so that CUDA is not initialised here."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest file begins, or all others would wait for it in the end.
    items.sort(key=lambda item: item.path.name != "test_whole_runs.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and cuda_device_count() == 0:
        skip = pytest.mark.skip(reason="needs a CUDA device; nvidia-smi lists none")
        for item in marked:
            item.add_marker(skip)
    marked = [item for item in items if item.get_closest_marker("vllm")]
    if marked and (reason := environment.unavailable()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by now stays: collecting garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def each_architecture_is_traced_once() -> Iterator[None]:
    """Adding a model runs it on fake tensors, which takes longer than all else that a test does.

    Models of one class, configuration and shapes give the same events, so these are kept. Tests
    of tracing call `tracing.observe` itself; classes defined in tests are always traced.
    """
    packing = sys.modules.get("djinn_lib.engine.models.packing")
    if packing is None:  # no collected test needs the engine
        yield
        return
    kept: dict[object, list[tuple[str, str]]] = {}
    observe = packing.observe

    def observe_once(model):
        if not type(model).__module__.startswith("transformers.models."):
            return observe(model)
        shapes = tuple((name, p.shape, p.dtype) for name, p in model.named_parameters())
        config = {**model.config.to_dict(), "_name_or_path": ""}  # wherever its files are
        key = type(model), repr(config), shapes
        if key not in kept:
            kept[key] = observe(model)
        return list(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "observe", observe_once)
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same draws in every run. torch seeds its own generators where a test uses them."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator for tests that draw their own data."""
    return np.random.default_rng(0)


def held_by_this_process() -> Counter[str]:
    """What a fault may leave behind: descriptors, threads, child processes, mapped files."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    children = psutil.Process().children(recursive=True)
    return Counter(
        [
            *("descriptor" for _ in os.listdir("/proc/self/fd")),
            *(f"thread {thread.name}" for thread in threading.enumerate()),
            *(f"child {p.pid}" for p in children if "resource_tracker" not in str(p.cmdline())),
            *("mapping" for line in maps if "memfd:" in line or ".safetensors" in line),
        ]
    )


@pytest.fixture
def nothing_leaks() -> Callable[[], AbstractContextManager[None]]:
    """A context in which nothing may be gained; what ends by itself has two seconds for it."""

    @contextmanager
    def watched() -> Iterator[None]:
        before = held_by_this_process()
        yield
        until_s = time.perf_counter() + 2
        while (gained := held_by_this_process() - before) and time.perf_counter() < until_s:
            time.sleep(0.05)
        assert not gained  # what an earlier test left may well have gone meanwhile

    return watched
