"""What is noted of a GPU's memory while a cell runs, with a driver that is made up."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from djinn_lib.nvml import MemoryWatch, busy_neighbours


def test_the_peak_is_what_was_in_use_at_most_beyond_the_beginning(monkeypatch):
    used = iter([100, 150, 900, 300])  # the first is before the block
    assert MemoryWatch().serving_bytes is None
    last: list[int] = []

    def memory(_: object) -> SimpleNamespace:
        last[:] = [next(used, 300)]
        return SimpleNamespace(used=last[0])

    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    watch = MemoryWatch(interval_s=0.001)
    assert watch.peak_bytes is None
    deadline_s = time.monotonic() + 10
    with watch:
        while watch.peak_bytes != 800 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        assert watch.serving_bytes is None
        watch.begin_serving()
        while watch.serving_bytes != 200 and time.monotonic() < deadline_s:
            time.sleep(0.001)
    assert (watch.peak_bytes, watch.serving_bytes) == (800, 200)


def test_without_a_driver_there_is_no_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("djinn_lib.nvml.used_bytes", lambda: None)
        with MemoryWatch() as watch:
            pass
    assert watch.peak_bytes is None


@pytest.mark.parametrize(
    ("visible", "busy"), [("", ["GPU-b", "GPU-d"]), ("1", ["GPU-d"]), ("GPU-d", ["GPU-b"])]
)
def test_gpus_that_others_use_are_named(monkeypatch, visible, busy):
    used = {"GPU-a": 4 << 20, "GPU-b": 5 << 20, "GPU-c": 600 << 20, "GPU-d": 3 << 30}
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(used),
        nvmlDeviceGetHandleByIndex=lambda index: sorted(used)[index],
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [7] * (handle == "GPU-b"),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert busy_neighbours() == busy
    driver.nvmlDeviceGetCount = lambda: 1  # a host with one GPU has no others
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert busy_neighbours() == []
