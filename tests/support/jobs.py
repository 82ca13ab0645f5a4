"""What workers of a cluster do in tests; apart, so that they need not import what tests import."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def double(x: int) -> int:
    return 2 * x


def refuse(x: int) -> int:
    raise ValueError(f"expected an even number, got {x}")


def leave() -> None:
    sys.exit("giving up")


def note_and_sleep(folder: str, name: str, seconds: float) -> str:
    """Leave a file a try, which says where it ran, and take some time."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (Path(folder) / f"{name}.{time.time_ns()}").write_text(node)
    time.sleep(seconds)
    return node


def make_a_lock() -> Any:
    return threading.Lock()


def die(folder: str) -> None:
    (Path(folder) / f"try.{time.time_ns()}").touch()
    os.kill(os.getpid(), 9)


def span(seconds: float) -> tuple[float, float]:
    begin_s = time.time()
    time.sleep(seconds)
    return begin_s, time.time()
