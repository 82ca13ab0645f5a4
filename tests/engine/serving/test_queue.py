"""The order of waiting requests against a naive model, and its bound on overtaking."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from djinn_lib.engine.serving.queue import RequestQueue
from djinn_lib.errors import ConfigError

MODELS = "abcd"


def drain(queue, resident=""):
    return [queue.pop(resident.__contains__) for _ in range(len(queue))]


def filled(models, order="fifo", max_overtaken=8):
    queue = RequestQueue(order, max_overtaken)
    for i, model in enumerate(models):
        queue.push(i, model)
    return queue


def test_affinity_serves_resident_models_first():
    assert drain(filled("abab", "affinity"), resident="b") == [1, 3, 0, 2]
    assert drain(filled("abab", "affinity"), resident="") == [0, 1, 2, 3]


def test_no_request_is_overtaken_more_often_than_allowed():
    assert drain(filled("abbbbb", "affinity", max_overtaken=2), resident="b") == [1, 2, 0, 3, 4, 5]
    assert drain(filled("abb", "affinity", max_overtaken=0), resident="b") == [0, 1, 2]


def test_what_comes_next_is_what_pop_gives_then():
    queue = filled("abbab", "affinity", max_overtaken=2)
    assert queue.upcoming("b".__contains__, 9) == ["b", "b", "a", "b", "a"]
    assert queue.upcoming("b".__contains__, 2) == ["b", "b"]
    queue.check()
    assert [len(queue), *drain(queue, "b")] == [5, 1, 2, 0, 4, 3]


def test_bad_input():
    with pytest.raises(ConfigError, match="order to be one of"):
        RequestQueue("lifo")
    with pytest.raises(ConfigError, match="at least 0"):
        RequestQueue("affinity", -1)
    with pytest.raises(LookupError, match="empty queue"):
        RequestQueue().pop("".__contains__)
    queue = filled("a")
    with pytest.raises(ConfigError, match="already queued"):
        queue.push(0, "a")


class QueueMachine(RuleBasedStateMachine):
    """The queue against a list of [request, model, times overtaken]."""

    @initialize(order=st.sampled_from(["fifo", "affinity"]), bound=st.integers(0, 3))
    def start(self, order, bound):
        self.queue, self.order, self.bound = RequestQueue(order, bound), order, bound
        self.naive, self.n = [], 0

    @rule(model=st.sampled_from(MODELS))
    def push(self, model):
        self.queue.push(self.n, model)
        self.naive.append([self.n, model, 0])
        self.n += 1

    def expected(self, resident):
        may_be_overtaken = [n < self.bound for _, _, n in self.naive]
        for i, (_, model, _) in enumerate(self.naive):
            if self.order == "affinity" and model in resident and all(may_be_overtaken[:i]):
                return i
        return 0

    @precondition(lambda self: self.naive)
    @rule(resident=st.sets(st.sampled_from(MODELS)))
    def pop(self, resident):
        i = self.expected(resident)
        assert self.queue.upcoming(resident.__contains__, 1) == [self.naive[i][1]]
        for entry in self.naive[:i]:
            entry[2] += 1
        assert self.queue.pop(resident.__contains__) == self.naive.pop(i)[0]

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def withdraw(self, data):
        i = data.draw(st.integers(0, len(self.naive) - 1))
        assert self.queue.withdraw(self.naive.pop(i)[0])

    @invariant()
    def audit(self):
        if hasattr(self, "queue"):
            self.queue.check()
            assert len(self.queue) == len(self.naive)
            assert all(n <= self.bound for _, _, n in self.naive)


TestQueue = QueueMachine.TestCase


def test_a_look_at_residency_that_fails_changes_nothing():
    def fails(model):
        raise KeyError(model)

    queue = filled("abc", "affinity")
    for look in (queue.pop, lambda is_resident: queue.upcoming(is_resident, 2)):
        with pytest.raises(KeyError):
            look(fails)
    queue.check()
    assert drain(queue) == [0, 1, 2]
