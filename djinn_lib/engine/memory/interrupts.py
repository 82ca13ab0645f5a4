"""Hold back interrupts from the keyboard while pages move."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back() -> Iterator[None]:
    """Handle SIGINT after the block, not in it; also a decorator.

    Python raises `KeyboardInterrupt` between any two steps of the main thread. Where tables,
    mappings and copies change together, no roll-back could know how far they got. Other threads are
    not interrupted, so nothing happens there. The block must be short.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held = []
    signal.signal(signal.SIGINT, lambda *interrupt: held.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
