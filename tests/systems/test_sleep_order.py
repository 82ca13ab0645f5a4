"""Which engines sleep and which run: by example, and for any requests."""

from hypothesis import given
from hypothesis import strategies as st

from djinn_lib.systems.sleep_order import Run, Sleep, SleepOrder, Wake

SIZES = {"a": 5, "b": 6, "c": 3}


def decisions(order, now_s):
    """All that is decided at one moment, in short."""
    said = []
    while decision := order.next(now_s):
        match decision:
            case Run(model, requests):
                said.append((model, tuple(one.key for one in requests)))
            case Sleep(model, room_for):
                said.append(f"{model} sleeps for {room_for}")
            case Wake(model):
                said.append(f"{model} wakes")
    return said


def test_requests_for_one_model_are_served_together_the_oldest_first():
    order = SleepOrder(SIZES, 8)
    for key, model in enumerate("abacb"):
        order.arrive(key, model, 0.0)
    assert decisions(order, 0.0) == ["a wakes", ("a", (0, 2))]
    order.done("a")
    assert decisions(order, 0.1) == []
    order.done("a")
    assert decisions(order, 0.1) == ["a sleeps for b", "b wakes", ("b", (1, 4))]
    for _ in range(2):
        order.done("b")
    assert decisions(order, 0.2) == ["b sleeps for c", "c wakes", ("c", (3,))]


def test_models_that_fit_stay_awake_and_the_least_recent_sleeps_first():
    order = SleepOrder(SIZES, 8)
    for model in ("a", "c", "a"):
        order.arrive(model, model, 0.0)
        decisions(order, 0.0)
        order.done(model)
    assert list(order.awake) == ["c", "a"]
    order.arrive("b", "b", 1.0)
    assert decisions(order, 1.0)[:2] == ["c sleeps for b", "a sleeps for b"]


def test_busy_engines_take_requests_until_an_older_one_waited_long_enough():
    order = SleepOrder(SIZES, 8, max_wait_s=1.0)
    order.arrive(0, "a", 0.0)
    decisions(order, 0.0)
    order.arrive(1, "b", 0.1)
    assert order.deadline_s() == 1.1
    order.arrive(2, "a", 0.5)
    assert decisions(order, 0.5) == [("a", (2,))]
    order.arrive(3, "a", 1.2)
    assert decisions(order, 1.2) == []
    order.done("a")
    order.done("a")
    assert decisions(order, 1.3) == ["a sleeps for b", "b wakes", ("b", (1,))]


def test_the_naive_form_lets_all_others_sleep():
    order = SleepOrder(SIZES, 100, naive=True)
    order.arrive(0, "a", 0.0)
    decisions(order, 0.0)
    order.done("a")
    order.arrive(1, "c", 0.0)
    assert decisions(order, 0.0) == ["a sleeps for c", "c wakes", ("c", (1,))]


def test_an_engine_that_ended_is_woken_anew():
    order = SleepOrder(SIZES, 8)
    order.arrive(0, "a", 0.0)
    decisions(order, 0.0)
    order.arrive(1, "b", 0.0)
    assert [one.key for one in order.forget("b")] == [1]
    assert order.forget("a") == [] and not order.awake
    order.done("a")
    order.arrive(2, "a", 0.0)
    assert decisions(order, 0.0) == ["a wakes", ("a", (2,))]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 0.4)), max_size=30),
    st.booleans(),
    st.sampled_from([6, 8, 11, 14]),
)
def test_everybody_is_served_once_and_what_is_awake_fits(arrivals, naive, capacity):
    order, now_s, served, running = SleepOrder(SIZES, capacity, naive, 0.5), 0.0, [], []

    def advance():
        while decision := order.next(now_s):
            if isinstance(decision, Run):
                assert decision.model in order.awake
                running.extend((one.model, one.key) for one in decision.requests)
            elif isinstance(decision, Sleep):
                assert decision.model not in {model for model, _ in running}, "it is busy"
            assert sum(SIZES[model] for model in order.awake) <= capacity

    for key, (model, gap_s) in enumerate(arrivals):
        now_s += gap_s
        order.arrive(key, model, now_s)
        advance()
        if running and gap_s > 0.2:
            model, done = running.pop(0)
            served.append(done)
            order.done(model)
            advance()
    while running:
        model, done = running.pop(0)
        served.append(done)
        order.done(model)
        now_s += 0.1
        advance()
    assert sorted(served) == list(range(len(arrivals)))
