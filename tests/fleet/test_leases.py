"""Who holds the ring and who waits: rules by example, and any order of events against a model."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from djinn_lib.engine.memory.policies import LRU, Lookahead
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import CapacityError, ConfigError, LeaseError
from djinn_lib.fleet.lease_states import Frames, Revoke, State
from djinn_lib.fleet.leases import Leases

QUANTUM_S, MAX_WAIT_S = 0.25, 1.0


def leases_of(n_frames, **n_pages):
    leases = Leases(Ring(n_frames), Lookahead(LRU()), QUANTUM_S, MAX_WAIT_S)
    for model, n in n_pages.items():
        leases.join(model, n)
    return leases


def granted(decisions):
    return [one.model for one in decisions if isinstance(one, Frames) and one.granted]


def revoked(decisions):
    return [one.model for one in decisions if isinstance(one, Revoke)]


def hold(leases, models):
    """Give models a lease each, a hundredth of a second apart, with their pages loaded."""
    for i, model in enumerate(models):
        assert granted(leases.ask(model, 0.0)) == [model]
        leases.loaded(model, 0.0, i / 100)


def test_models_that_fit_together_hold_leases_together():
    leases = leases_of(10, a=4, b=6)
    hold(leases, "ab")
    assert leases.deadline_s() is None
    leases.check()


def test_a_lease_on_a_hit_loads_nothing():
    leases = leases_of(10, a=4)
    leases.ask("a", 0.0)
    leases.give_back("a", 1.0)
    assert leases.ask("a", 2.0) == [Frames("a", 4, (), True, 0)]
    assert leases.engines[0].counts.switches == 1


def test_a_waiter_loads_ahead_and_gets_the_rest_when_the_quantum_is_over():
    leases = leases_of(10, a=8, b=6)
    leases.ask("a", 0.0)
    leases.loaded("a", 0.01, 0.0)
    (ahead,) = leases.ask("b", 0.1)
    assert (ahead.n_kept, len(ahead.frames), ahead.granted) == (0, 2, False)
    assert leases.deadline_s() == pytest.approx(QUANTUM_S)
    assert leases.tick(QUANTUM_S - 0.01) == []
    assert leases.tick(QUANTUM_S) == [Revoke("a")]
    assert leases.deadline_s() is None, "there is nothing to do before the step ends"
    (rest,) = leases.give_back("a", 0.3)
    assert (rest.n_kept, len(rest.frames), rest.granted, rest.n_evicted) == (2, 4, True, 4)
    assert leases.ring.n_resident("a") == 4, "the victim keeps its first pages"
    leases.check()


def test_a_quantum_lasts_five_times_as_long_as_loading_took():
    leases = leases_of(10, a=8, b=6)
    leases.ask("a", 0.0)
    leases.loaded("a", 0.1, 0.1)
    leases.ask("b", 0.2)
    assert leases.deadline_s() == pytest.approx(0.1 + 5 * 0.1)


def test_nobody_is_revoked_while_its_pages_are_on_their_way_unless_others_waited_too_long():
    leases = leases_of(10, a=8, b=6)
    leases.ask("a", 0.0)
    leases.ask("b", 0.5)
    assert leases.deadline_s() == pytest.approx(0.5 + MAX_WAIT_S)
    assert revoked(leases.tick(1.5)) == ["a"]


def test_a_waiter_keeps_off_the_link_until_the_pages_of_holders_have_arrived():
    leases = leases_of(10, a=6, b=4, c=6)
    leases.ask("a", 0.0)
    assert leases.ask("b", 0.1) == [], "it fits, but would slow down the load of a"
    leases.check()
    leases.loaded("a", 0.2, 0.2)
    assert granted(leases.tick(0.2)) == ["b"]
    assert leases.ask("c", 0.3) == []
    leases.give_back("a", 0.4)
    assert granted(leases.tick(0.4)) == [], "now b loads"
    assert granted(leases.tick(0.3 + MAX_WAIT_S)) == ["c"], "it need not wait for ever"
    leases.check()


def test_the_oldest_waiter_comes_first_and_one_that_misses_nothing_waits_for_nobody():
    leases = leases_of(10, a=6, b=6, c=4)
    hold(leases, "ca")
    leases.give_back("c", 0.1)
    assert granted(leases.ask("b", 0.2)) == []  # takes the pages of c, and waits for those of a
    assert leases.ring.n_resident("c") == 0
    assert granted(leases.ask("c", 0.22)) == []
    assert revoked(leases.tick(0.27)) == ["a"]
    assert granted(leases.give_back("a", 0.3)) == ["b"]
    leases.loaded("b", 0.0, 0.3)
    assert granted(leases.tick(0.3)) == ["c"], "what b leaves is enough for c"
    leases.check()

    leases = leases_of(12, a=8, b=8, c=4)
    hold(leases, "ca")
    leases.ask("b", 0.1)
    assert granted(leases.give_back("c", 0.2)) == []
    leases.check()


def test_only_as_many_are_revoked_as_are_needed_the_longest_holder_first():
    leases = leases_of(12, a=4, b=4, c=4, d=3)
    hold(leases, "abc")
    leases.ask("d", 0.1)
    assert leases.tick(5.0) == [Revoke("a")]
    assert leases.tick(6.0) == []
    assert granted(leases.give_back("a", 6.0)) == ["d"]


def test_an_engine_that_leaves_frees_its_frames_whatever_it_was_doing():
    leases = leases_of(10, a=8, b=6, c=10)
    leases.ask("a", 0.0)
    leases.ask("b", 0.1)
    leases.ask("c", 0.2)
    assert granted(leases.leave("a", 0.3)) == ["b"]
    leases.check()
    assert granted(leases.leave("b", 0.4)) == ["c"]
    leases.leave("c", 0.5)
    assert leases.ring.n_free == 10
    leases.check()


def test_a_sleeper_drops_its_pages_even_if_it_holds_no_lease():
    leases = leases_of(10, a=8)
    leases.ask("a", 0.0)
    leases.give_back("a", 0.1)
    leases.give_back("a", 0.2, drop=True)
    assert leases.ring.n_free == 10
    leases.check()


def test_what_breaks_the_protocol_is_refused_and_changes_nothing():
    leases = leases_of(10, a=8)
    with pytest.raises(CapacityError, match="raise the capacity"):
        leases.join("big", 11)
    with pytest.raises(ConfigError, match="added before"):
        leases.join("a", 2)
    with pytest.raises(LeaseError, match="is idle, but must be holding"):
        leases.give_back("a", 0.0)
    leases.ask("a", 0.0)
    with pytest.raises(LeaseError, match="is holding, but must be idle"):
        leases.ask("a", 0.0)
    leases.check()


@pytest.mark.parametrize("times", [(0, 1), (2, 1), (1, math.inf), (math.nan, 1), (-1, 1)])
def test_times_that_cannot_be_used(times):
    with pytest.raises(ConfigError, match="quantum"):
        Leases(Ring(1), LRU(), *times)


class AnyOrder(RuleBasedStateMachine):
    """Engines that do anything that the protocol allows, against what each was told last.

    The naive model knows only the messages: the frames that each engine was told to map, whether
    it computes, and since when it waits.
    """

    def __init__(self):
        super().__init__()
        self.leases = leases_of(8)
        self.now_s = 0.0
        self.mapped, self.sizes = {}, {}
        self.computing, self.told, self.asked_s = set(), set(), {}

    def hear(self, decisions):
        for one in decisions:
            if isinstance(one, Revoke):
                assert one.model in self.computing
                self.told.add(one.model)
                continue
            assert one.model in self.asked_s
            table = self.mapped[one.model]
            assert one.n_kept <= len(table)
            table[one.n_kept :] = one.frames
            for other in self.computing | self.loading() - {one.model}:
                if other != one.model:
                    assert not set(one.frames) & set(self.mapped[other]), "in use elsewhere"
            if one.granted:
                assert len(table) == self.sizes[one.model]
                assert self.now_s - self.asked_s.pop(one.model) >= 0
                self.computing.add(one.model)

    def loading(self):
        oldest = min(self.asked_s.items(), key=lambda item: item[1], default=(None, 0))[0]
        return {oldest} - {None}

    @rule(model=st.sampled_from("abcd"), n_pages=st.integers(1, 8))
    def join(self, model, n_pages):
        if model not in self.sizes:
            self.leases.join(model, n_pages)
            self.sizes[model], self.mapped[model] = n_pages, []

    @rule(model=st.sampled_from("abcd"))
    def ask(self, model):
        if model in self.sizes and model not in self.computing and model not in self.asked_s:
            self.asked_s[model] = self.now_s
            self.hear(self.leases.ask(model, self.now_s))

    @rule(model=st.sampled_from("abcd"), drop=st.booleans())
    def give_back(self, model, drop):
        if model in self.computing:
            self.computing.discard(model)
            self.told.discard(model)
            self.hear(self.leases.give_back(model, self.now_s, drop))

    @rule(model=st.sampled_from("abcd"), seconds=st.floats(0, 0.3))
    def loaded(self, model, seconds):
        if model in self.computing:
            self.leases.loaded(model, seconds, self.now_s)
            self.hear(self.leases.tick(self.now_s))

    @rule(model=st.sampled_from("abcd"))
    def leave(self, model):
        if model in self.sizes:
            for of in (self.sizes, self.mapped, self.asked_s):
                of.pop(model, None)
            self.computing.discard(model)
            self.told.discard(model)
            self.hear(self.leases.leave(model, self.now_s))

    @rule(seconds=st.floats(0.001, 0.5))
    def wait(self, seconds):
        """Let time pass as the broker does: no further than the next deadline at once."""
        until_s = self.now_s + seconds
        for _ in range(20):
            deadline_s = self.leases.deadline_s()
            if deadline_s is None or deadline_s > until_s:
                break
            self.now_s = max(self.now_s, deadline_s)
            decisions = self.leases.tick(self.now_s)
            self.hear(decisions)
            assert decisions, "a deadline at which nothing happens would come for ever"
        self.now_s = until_s

    @precondition(lambda self: self.asked_s)
    @rule()
    def all_who_are_asked_give_back_so_everybody_is_served(self):
        for _ in range(100):
            if not self.asked_s:
                break
            for model in sorted(self.told):
                self.give_back(model, False)
            self.wait(0.5)
        assert not self.asked_s

    @rule()
    def nobody_waits_much_longer_than_allowed(self):
        """All who are asked give back at once: then the oldest is served within its time."""
        if not self.asked_s:
            return
        oldest, since_s = min(self.asked_s.items(), key=lambda item: item[1])
        for model in sorted(self.told):
            self.give_back(model, False)
        while oldest in self.asked_s and self.now_s <= since_s + MAX_WAIT_S:
            self.wait(0.1)
            for model in sorted(self.told):
                self.give_back(model, False)
        ties = sum(asked_s == since_s for asked_s in self.asked_s.values())
        assert oldest not in self.asked_s or ties > 1 or self.now_s <= since_s + MAX_WAIT_S + 0.2

    @invariant()
    def the_books_agree(self):
        self.leases.check()
        for engine in self.leases.engines:
            holds = engine.state in (State.HOLDING, State.REVOKED)
            assert holds == (engine.model in self.computing)
            assert (engine.state is State.WAITING) == (engine.model in self.asked_s)
            table = self.leases.ring.frames(engine.model)
            assert list(table) == self.mapped[engine.model][: len(table)]


TestAnyOrder = AnyOrder.TestCase
