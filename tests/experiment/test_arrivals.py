"""Requests are sent when they arrive; each comes back once, whatever happens to it."""

import math
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.cells.arrivals import send
from djinn_lib.systems.base import Served
from djinn_lib.trace import Request

SERVED = Served((1,), 0.0, 1.0, 1.0, 2.0)
REQUESTS = [Request(i, i * 0.04, "m") for i in range(4)]


def at_once(request):
    future = Future()
    future.set_result(SERVED)
    return future


@pytest.mark.parametrize(("speed", "expected_s"), [(1.0, 0.12), (4.0, 0.03), (math.inf, 0.0)])
def test_they_are_sent_when_they_arrive(speed, expected_s):
    begin_s = time.perf_counter()
    sent_s = {
        a.request.request: time.perf_counter() - begin_s for a in send(REQUESTS, speed, at_once)
    }
    assert list(sent_s) == [0, 1, 2, 3]
    assert sent_s[3] >= expected_s
    for i, request in enumerate(REQUESTS):
        assert math.isinf(speed) or sent_s[i] >= request.arrival_s / speed


def test_time_counts_from_the_arrival():
    with ThreadPoolExecutor(1) as worker:
        arrived = list(send(REQUESTS, math.inf, lambda r: worker.submit(slow)))
    totals = [a.total_s for a in arrived]
    assert totals == sorted(totals) and totals[-1] >= 4 * 0.02


def slow():
    time.sleep(0.02)
    return SERVED


def test_errors_stay_with_their_request():
    def submit(request):
        if raised := raises.get(request.request):
            raise raised
        future = at_once(request) if request.request not in (2, 4) else Future()
        if request.request == 2:
            future.set_exception(MemoryError("no room"))
        elif request.request == 4:
            assert future.cancel()
        return future

    raises = {1: ConfigError("refused"), 3: SystemExit("giving up")}
    requests = [Request(i, 0.0, "m") for i in range(6)]
    errors = {a.request.request: type(a.error) for a in send(requests, math.inf, submit)}
    assert [errors[i] for i in range(6)] == [
        type(None), ConfigError, MemoryError, SystemExit, CancelledError, type(None)
    ]  # fmt: skip


def test_who_stops_listening_stops_the_sending():
    sent = []
    slow_trace = [Request(i, float(i), "m") for i in range(100)]
    arrivals = send(slow_trace, 10.0, lambda r: sent.append(r) or at_once(r))
    next(arrivals)
    arrivals.close()
    assert len(sent) < 5
