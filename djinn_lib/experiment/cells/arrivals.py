"""Send requests at their arrival times, even if earlier ones have not been served."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial

from djinn_lib.systems.base import Served
from djinn_lib.trace import Request


@dataclass(frozen=True, slots=True)
class Arrived:
    """A finished request: its result or its error, `total_s` seconds after its arrival."""

    request: Request
    served: Served | None
    error: BaseException | None
    total_s: float


def send(
    requests: Sequence[Request], speed: float, submit: Callable[[Request], Future[Served]]
) -> Iterator[Arrived]:
    """Submit each request at its arrival time, and yield each as soon as it is done.

    Arrivals are faster by the factor `speed`; infinity sends all requests at once. If `submit`
    raises, only that request fails.
    """
    done: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
    stopped = threading.Event()

    def finish(request: Request, due_s: float, future: Future[Served]) -> None:
        total_s = time.perf_counter() - due_s
        error = CancelledError() if future.cancelled() else future.exception()
        done.put(Arrived(request, None if error else future.result(), error, total_s))

    def run() -> None:
        begin_s = time.perf_counter()
        for request in requests:
            due_s = begin_s + (0.0 if math.isinf(speed) else request.arrival_s / speed)
            if stopped.wait(max(0.0, due_s - time.perf_counter())):
                return
            try:
                submit(request).add_done_callback(partial(finish, request, due_s))
            except (Exception, SystemExit) as error:  # a library that exits ends no cell
                done.put(Arrived(request, None, error, time.perf_counter() - due_s))

    thread = threading.Thread(target=run, name="djinn-arrivals", daemon=True)
    thread.start()
    try:
        for _ in requests:
            yield done.get()
    finally:
        stopped.set()
        thread.join()
