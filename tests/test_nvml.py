"""What is noted of a GPU's memory while a cell runs, with a driver that is made up."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from djinn_lib.nvml import MemoryWatch


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
