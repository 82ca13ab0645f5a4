"""The ring against a naive model that moves single pages one at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from djinn_lib.engine.memory.frames import n_frames_in
from djinn_lib.engine.memory.policies import LRU
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import CapacityError, ConfigError, LeaseError

MODELS = ["a", "b", "c", "d"]


class NaiveRing:
    """Residency as a set of (model, page), recency as a list; nothing clever."""

    def __init__(self, n_frames, eviction):
        self.n_frames, self.eviction = n_frames, eviction
        self.sizes, self.pages, self.recent, self.leases = {}, set(), [], {}

    def resident(self, model):
        return sorted(page for m, page in self.pages if m == model)

    def load(self, model):
        """Return {victim: pages lost}, or None when leases make it impossible."""
        missing = self.sizes[model] - len(self.resident(model))
        free = self.n_frames - len(self.pages)
        victims = [m for m in self.recent if m != model and not self.leases[m]]
        if missing > free + sum(len(self.resident(m)) for m in victims):
            return None
        lost = {}
        while free < missing:
            victim = next(m for m in victims if self.resident(m))
            n = len(self.resident(victim)) if self.eviction == "models" else 1
            for _ in range(n):
                self.pages.remove((victim, self.resident(victim)[-1]))
            free, lost[victim] = free + n, lost.get(victim, 0) + n
        self.pages |= {(model, page) for page in range(self.sizes[model])}
        self.touch(model)
        return lost

    def touch(self, model):
        if model in self.recent:
            self.recent.remove(model)
        self.recent.append(model)


class RingMachine(RuleBasedStateMachine):
    @initialize(
        n_frames=st.integers(1, 24),
        eviction=st.sampled_from(["pages", "models"]),
        sizes=st.lists(st.integers(1, 24), min_size=4, max_size=4),
    )
    def start(self, n_frames, eviction, sizes):
        self.ring, self.policy = Ring(n_frames, eviction), LRU()
        self.naive = NaiveRing(n_frames, eviction)
        self.ticks = 0
        sizes[0] = min(sizes[0], n_frames)  # at least one model fits
        for model, size in zip(MODELS, sizes, strict=True):
            if size > n_frames:
                with pytest.raises(CapacityError, match="raise the capacity"):
                    self.ring.add(model, size)
            else:
                self.ring.add(model, size)
                self.naive.sizes[model], self.naive.leases[model] = size, 0

    @property
    def known(self):
        return [m for m in MODELS if m in self.naive.sizes]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def load(self, data):
        model = data.draw(st.sampled_from(self.known))
        before = {m: self.ring.frames(m) for m in self.known}
        could, lost = self.ring.can_load(model), self.naive.load(model)
        assert could == (lost is not None)
        if lost is None:
            with pytest.raises(CapacityError, match="leases hold"):
                self.ring.make_room(model, self.policy)
            assert before == {m: self.ring.frames(m) for m in self.known}
            return
        evicted = self.ring.make_room(model, self.policy)
        assert {e.model: len(e.frames) for e in evicted} == lost
        for extent in evicted:  # the tail went, and the extent says which frames it had
            assert extent.frames == before[extent.model][extent.first_page :]
        mapped = self.ring.map_missing(model)
        assert self.ring.frames(model)[: len(before[model])] == before[model]
        assert mapped.first_page == len(before[model])
        assert self.ring.n_missing(model) == 0
        self.ticks += 1
        self.policy.touch(model, self.ticks)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def lease(self, data):
        model = data.draw(st.sampled_from(self.known))
        self.ring.lease(model)
        self.naive.leases[model] += 1

    @precondition(lambda self: any(self.naive.leases.values()))
    @rule(data=st.data())
    def release(self, data):
        model = data.draw(st.sampled_from([m for m, n in self.naive.leases.items() if n]))
        self.ring.release(model)
        self.naive.leases[model] -= 1

    @precondition(lambda self: self.known)
    @rule(data=st.data(), n=st.integers(0, 30))
    def evict(self, data, n):
        model = data.draw(st.sampled_from(self.known))
        resident = self.naive.resident(model)
        if self.naive.leases[model]:
            with pytest.raises(LeaseError):
                self.ring.evict(model, n)
        elif n > len(resident):
            with pytest.raises(ConfigError, match="expected 0 to"):
                self.ring.evict(model, n)
        else:
            self.ring.evict(model, n)
            self.naive.pages -= {(model, page) for page in resident[len(resident) - n :]}

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove_and_add_again(self, data):
        model = data.draw(st.sampled_from(self.known))
        if self.naive.leases[model]:
            with pytest.raises(LeaseError, match="release it first"):
                self.ring.remove(model)
            return
        self.ring.remove(model)
        assert not self.ring.is_whole(model)  # nor is it an error to ask
        self.policy.forget(model)
        self.ring.add(model, self.naive.sizes[model])
        self.naive.pages = {(m, page) for m, page in self.naive.pages if m != model}
        if model in self.naive.recent:
            self.naive.recent.remove(model)

    @invariant()
    def agrees(self):
        if hasattr(self, "ring"):
            self.ring.check()
            for model in self.known:
                pages = self.naive.resident(model)
                assert list(range(self.ring.n_resident(model))) == pages
                assert self.ring.is_whole(model) == (len(pages) == self.naive.sizes[model])
            assert self.ring.n_free == self.ring.n_frames - len(self.naive.pages)


TestRing = RingMachine.TestCase


def test_frames_are_reused_in_the_order_they_were_freed():
    ring = Ring(4)
    ring.add("a", 2)
    ring.add("b", 3)
    assert ring.map_missing("a").frames == (0, 1)
    ring.make_room("b", LRU())
    assert ring.map_missing("b").frames == (2, 3, 1)  # the hand passed over 2 and 3 first
    assert ring.frames("a") == (0,)


def test_bad_input_is_refused_with_what_to_do():
    with pytest.raises(CapacityError, match="at least 1 frame"):
        Ring(0)
    ring = Ring(2)
    ring.add("a", 1)
    ring.add("c", 2)
    ring.map_missing("a")
    with pytest.raises(CapacityError, match="make room first"):
        ring.map_missing("c")
    ring.check()
    with pytest.raises(ConfigError, match="eviction"):
        Ring(2, "some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="added before"):
        ring.add("a", 1)
    with pytest.raises(ConfigError, match="at least 1 page"):
        ring.add("b", 0)
    with pytest.raises(ConfigError, match="add it first"):
        ring.n_resident("nobody")
    with pytest.raises(LeaseError, match="holds no lease"):
        ring.release("a")


def test_roll_back_takes_leased_pages_too():
    ring = Ring(4)
    ring.add("a", 3)
    ring.map_missing("a")
    ring.lease("a")
    assert ring.roll_back("a", 2).first_page == 1
    assert (ring.n_resident("a"), ring.n_free) == (1, 3)
    ring.check()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ring: ring._free.append(0), "each frame"),
        (lambda ring: ring._resident.clear(), "listed if resident"),
        (lambda ring: ring._leases.update(a=-1), "negative"),
        (lambda ring: ring._n_pages.update(a=1), "beyond its last"),
        (lambda ring: ring._leases.clear(), "lease count"),
        (lambda ring: ring._tables.update(z=[]), "page table"),
    ],
)
def test_check_finds_damage(damage, message):
    ring = Ring(3)
    ring.add("a", 2)
    ring.map_missing("a")
    ring.check()
    damage(ring)
    with pytest.raises(AssertionError, match=message):
        ring.check()


def test_frames_are_whole_pages():
    assert n_frames_in(10, 4) == 2
    with pytest.raises(ConfigError, match="at least 1 byte, got 0"):
        n_frames_in(10, 0)
    with pytest.raises(CapacityError, match=r"host_capacity of at least one page \(4 B\), got 3 B"):
        n_frames_in(3, 4, "host_capacity")


def test_residency_can_be_asked_for_while_models_come_and_go():
    ring, stop = Ring(8), threading.Event()

    def ask():
        while not stop.is_set():
            ring.is_whole("a")

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        for _ in range(2000):
            ring.add("a", 3)
            ring.map_missing("a")
            ring.remove("a")
        stop.set()
        assert [future.result() for future in asking] == [None] * 3


@pytest.mark.parametrize("victims", [["b"], ["b", None]])
def test_a_policy_that_fails_changes_nothing(victims):
    """It names one model, of which all is taken, and then no other, or raises."""

    class Failing(LRU):
        def victims(self, candidates):
            for victim in victims:
                if victim is None:
                    raise KeyError("no more")
                yield victim

    ring = Ring(4)
    for model, n_pages in (("a", 2), ("b", 2), ("c", 4)):
        ring.add(model, n_pages)
    ring.map_missing("a")
    ring.map_missing("b")
    with pytest.raises((ConfigError, KeyError)):
        ring.make_room("c", Failing())
    assert (ring.n_resident("a"), ring.n_resident("b"), ring.n_free) == (2, 2, 0)
    ring.check()
