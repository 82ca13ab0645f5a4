"""Turns among threads: one at a time, in order, none lost."""

import contextvars
import logging
import threading
import time

import pytest

from djinn_lib.engine.serving.queue import RequestQueue
from djinn_lib.engine.serving.turns import Turns
from djinn_lib.errors import DjinnError, LeaseError


def make(order="fifo", resident="", **options):
    return Turns(RequestQueue(order, **options), resident.__contains__)


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("did not happen within 2 s")


def test_one_at_a_time_in_order_of_arrival():
    turns, served, inside = make(), [], []

    def serve(i):
        with turns.turn("a"):
            inside.append(i)
            assert len(inside) == 1
            time.sleep(0.001)
            served.append(i)
            inside.remove(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    with turns.turn("a"):
        for n, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda n=n: turns.n_waiting == n)
    for thread in threads:
        thread.join(10)
    assert served == list(range(8))


def test_a_turn_within_a_turn_of_the_same_thread_is_no_new_one():
    turns = make()
    with turns.turn("a"), turns.turn("b"):
        ticket = turns.join("c")
        assert not ticket.done()
    assert ticket.done()
    with turns.take(ticket):
        pass


def test_an_interrupt_in_a_conditions_own_code_keeps_no_lock(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt  # before the lock is released

    turns = make()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "__exit__", interrupted)
        assert turns.upcoming(1) == []
    assert turns._lock.acquire(blocking=False)


def test_a_withdrawn_ticket_lets_the_next_one_in():
    turns = make()
    with turns.turn("a"):
        first, second = turns.join("b"), turns.join("c")
        assert turns.upcoming(5) == ["b", "c"]
        assert turns.withdraw(first)
        assert first.cancelled()
    assert second.done() and not second.cancelled()
    assert not turns.withdraw(second)  # too late: it has the turn
    with turns.take(second):
        pass


def test_an_interrupted_wait_leaves_the_queue(monkeypatch):
    turns = make()
    with turns.turn("a"):
        caught = []

        def interrupted(*_):
            raise KeyboardInterrupt

        def ask():
            try:
                with turns.turn("b"):
                    raise AssertionError("expected no turn")
            except KeyboardInterrupt as error:
                caught.append(error)

        monkeypatch.setattr("djinn_lib.engine.serving.turns.Ticket.result", interrupted)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(10)
        assert len(caught) == 1 and turns.n_waiting == 0
    # Interrupted just when the turn was granted: it is passed on.
    with pytest.raises(KeyboardInterrupt), turns.turn("b"):
        pass
    monkeypatch.undo()
    with turns.turn("c"):
        pass


def test_close_refuses_who_waits_and_waits_for_who_computes():
    turns, order = make(), []
    entered, leave = threading.Event(), threading.Event()

    def compute():
        with turns.turn("a"):
            entered.set()
            leave.wait(10)
            order.append("computed")

    thread = threading.Thread(target=compute)
    thread.start()
    entered.wait(10)
    ticket = turns.join("b")
    threading.Timer(0.05, leave.set).start()
    turns.close()
    order.append("closed")
    assert order == ["computed", "closed"]
    with pytest.raises(DjinnError, match="was closed before its request"):
        ticket.result(10)
    with pytest.raises(DjinnError, match="after its Djinn was closed"):
        turns.join("c")
    turns.close()
    thread.join(10)
    turns = make()
    with turns.turn("a"):  # whoever has the turn may close, and keeps it
        turns.close()
        assert turns.is_mine


def test_a_turn_ends_with_its_last_use():
    turns = make()
    first, second = turns.turn("a"), turns.turn("b")
    first.__enter__()
    second.__enter__()
    ticket = turns.join("c")
    first.__exit__(None, None, None)
    assert turns.is_mine and not ticket.done()
    second.__exit__(None, None, None)
    assert ticket.done() and not turns.is_mine
    with turns.take(ticket):
        pass


def test_nobody_waits_for_a_turn_of_their_own():
    turns, other = make(), make()
    with turns.turn("a"):
        with pytest.raises(LeaseError, match="'b' cannot be waited for inside a lease"):
            turns.ensure_may_wait("b")
        context = contextvars.copy_context()  # what asyncio hands on to its tasks and threads
        thread = threading.Thread(
            target=context.run, args=(pytest.raises, LeaseError, turns.turn("b").__enter__)
        )
        thread.start()
        thread.join(10)
        assert not thread.is_alive() and not turns.n_waiting
        other.ensure_may_wait("b")  # that of another object
    turns.ensure_may_wait("b")
    context.run(turns.ensure_may_wait, "b")


def test_a_task_may_wait_for_another_of_its_thread():
    turns = make()
    outside = contextvars.copy_context()
    with turns.turn("a"):
        outside.run(turns.ensure_may_wait, "b", blocks_thread=False)
        with pytest.raises(LeaseError):
            outside.run(turns.ensure_may_wait, "b")


class Broken:
    """A callback that raises what it is told to, for as long as it is."""

    def __init__(self, error=None):
        self.error, self.n_raised = error, 0

    def __call__(self, *_):
        if self.error:
            self.n_raised += 1
            raise self.error
        return False


@pytest.mark.parametrize("error", [KeyError("a"), MemoryError()], ids=repr)
@pytest.mark.parametrize("broken", ["is_resident", "on_change"])
def test_a_callback_that_fails_keeps_nobody_waiting(broken, error, caplog):
    callback = Broken()
    turns = Turns(
        RequestQueue("affinity"), **{"is_resident": lambda model: False, broken: callback}
    )
    served = []

    def serve(i):
        with turns.turn("abc"[i % 3]):
            served.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(6)]
    with caplog.at_level(logging.WARNING), turns.turn("z"):
        callback.error = error  # from now on, for all who join, end their turns and give up
        for n, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda n=n: turns.n_waiting == n)
        given_up = turns.join("b")
        assert turns.withdraw(given_up) and given_up.cancelled()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert served == list(range(6))  # in order of arrival, where nothing else can be told
    assert callback.n_raised >= 6
    assert any(record.exc_info and record.exc_info[1] is error for record in caplog.records)
    callback.error = None
    with turns.turn("a"):
        pass
    turns.close()


@pytest.mark.parametrize("broken", ["is_resident", "on_change"])
def test_an_interrupt_in_a_callback_keeps_nobody_else_waiting(broken):
    callback = Broken()
    turns = Turns(
        RequestQueue("affinity"), **{"is_resident": lambda model: False, broken: callback}
    )
    with pytest.raises(KeyboardInterrupt), turns.turn("a"):
        ticket = turns.join("b")
        callback.error = KeyboardInterrupt()
    callback.error = None
    assert ticket.done()
    with turns.take(ticket):
        pass


@pytest.mark.parametrize("free", [True, False])
def test_who_is_interrupted_while_joining_leaves_no_ticket_behind(free):
    interrupts = []

    def on_change():
        if interrupts:
            raise interrupts.pop()

    turns = Turns(RequestQueue(), lambda model: False, on_change)

    def join():
        interrupts.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            turns.join("b")

    if free:  # granted at once, and passed on
        join()
    else:
        with turns.turn("a"):
            join()
            assert turns.n_waiting == 0
    with turns.turn("c"):
        pass
