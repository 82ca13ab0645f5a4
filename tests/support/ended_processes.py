"""What a fleet leaves behind: processes, folders, shared memory."""

import os
import time

import psutil


def descendants(process=None):
    return [
        one
        for one in psutil.Process(process).children(recursive=True)
        if "resource_tracker" not in " ".join(one.cmdline())
    ]


def assert_nothing_is_left(processes, folder):
    _, alive = psutil.wait_procs(list(processes), timeout=30)
    assert not alive
    until(lambda: not folder.exists(), "the folder of sockets and logs is gone")
    assert not [one for one in os.listdir("/dev/shm") if "djinn" in one or "vllm" in one.lower()]


def until(condition, what, seconds=60.0):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)
