"""The thread that loads ahead outlives whatever goes wrong on the way."""

import logging
import threading
import time

import pytest

from djinn_lib.engine.serving.lookahead import LoadAhead
from djinn_lib.errors import CapacityError


class FakePager:
    """Notes what is to be loaded; each look may be told to fail, where it is told to."""

    def __init__(self):
        self.errors, self.loaded, self.looks = {}, [], threading.Semaphore(0)

    def _step(self, name):
        if error := self.errors.get(name):
            self.looks.release()
            raise error

    def expect(self, models):
        self._step("expect")

    def is_resident(self, model):
        self._step("is_resident")
        return model == "resident"

    def prefetch(self, model, spare):
        self._step("prefetch")
        self.loaded.append((model, list(spare)))
        self.looks.release()

    def looked(self):
        assert self.looks.acquire(timeout=10)


@pytest.fixture
def pager():
    return FakePager()


@pytest.fixture
def ahead(pager):
    ahead = LoadAhead(pager, lambda n: ["resident", "a"])
    yield ahead
    ahead.close()


def warnings_of(caplog):
    return [r for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("step", ["expect", "is_resident", "prefetch"])
@pytest.mark.parametrize("error", [KeyError("a"), MemoryError()], ids=repr)
def test_an_error_is_said_once_and_the_next_nudge_loads(pager, ahead, caplog, step, error):
    pager.errors[step] = error
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            ahead.nudge(1)
            pager.looked()
        pager.errors.clear()
        ahead.nudge(1)
        pager.looked()
    assert pager.loaded == [("a", ["resident"])]
    (said,) = warnings_of(caplog)
    assert said.exc_info[1] is error and type(error).__name__ in said.getMessage()
    assert said.threadName == "djinn-lookahead"


def test_each_kind_of_error_is_said(pager, ahead, caplog):
    with caplog.at_level(logging.WARNING):
        # What a lack of capacity means the request itself says.
        for error in (
            KeyError("a"), ValueError("b"), KeyError("c"), ValueError("d"), CapacityError("taken")
        ):  # fmt: skip
            pager.errors["prefetch"] = error
            ahead.nudge(1)
            pager.looked()
        ahead.close()
    assert [r.exc_info[0] for r in warnings_of(caplog)] == [KeyError, ValueError]


def test_a_thread_that_cannot_start_is_started_by_the_next_nudge(pager, ahead, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        ahead.nudge(1)
    monkeypatch.undo()
    ahead.nudge(1)
    pager.looked()
    assert pager.loaded == [("a", ["resident"])]


def test_nobody_is_woken_for_nothing_and_closing_ends_it(pager):
    ahead = LoadAhead(pager, lambda n: [])
    ahead.nudge(0)
    ahead.close()
    ahead.close()
    ahead.nudge(1)
    time.sleep(0.01)
    assert not pager.loaded
    assert "djinn-lookahead" not in [thread.name for thread in threading.enumerate()]
