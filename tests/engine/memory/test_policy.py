"""One contract for every policy, and what each of them is for."""

import random
from collections.abc import Sequence

import pytest

from djinn_lib.engine.memory.policies import (
    EWMA,
    LFU,
    LRU,
    POLICIES,
    Adaptive,
    Lookahead,
    Oracle,
    Policy,
    make_policy,
)
from djinn_lib.engine.memory.ring import Ring
from djinn_lib.errors import ConfigError
from djinn_lib.simulator.optimal import optimal_loads

every_policy = pytest.mark.parametrize("name", sorted(POLICIES))


def serve(
    policy: Policy, requests: Sequence[str], sizes: dict[str, int], n_frames: int
) -> list[int]:
    """Pages that each request loads."""
    ring = Ring(n_frames)
    for model, n_pages in sizes.items():
        ring.add(model, n_pages)
        policy.admit(model, n_pages, n_frames)
    loads = []
    for now_s, model in enumerate(requests):
        loads.append(ring.n_missing(model))
        ring.make_room(model, policy)
        ring.map_missing(model)
        policy.touch(model, float(now_s))
        ring.check()
    return loads


@every_policy
def test_every_candidate_is_named_exactly_once(name):
    policy, rng = make_policy(name), random.Random(0)
    models = [f"m{i}" for i in range(8)]
    for now_s in range(200):
        policy.touch(rng.choice(models), float(now_s))
        policy.expect(rng.choices(models, k=3))
        candidates = frozenset(rng.sample(models, rng.randint(0, 8)))
        assert sorted(policy.victims(candidates)) == sorted(candidates)


@every_policy
def test_models_never_touched_or_forgotten_are_still_victims(name):
    policy = make_policy(name)
    policy.admit("old", 1, 4)
    policy.touch("old", 0.0)
    policy.forget("old")
    policy.forget("never seen")
    assert list(policy.victims(frozenset({"old"}))) == ["old"]
    policy.admit("old", 2, 4)  # and may come back, of another size


@every_policy
def test_no_policy_loads_less_than_the_optimum(name):
    rng = random.Random(3)
    for _ in range(30):
        sizes = {model: rng.randint(1, 5) for model in "abcde"}
        requests = "".join(rng.choices("abcde", k=40))
        loads = serve(make_policy(name), requests, sizes, n_frames=7)
        assert sum(loads) >= sum(optimal_loads(list(requests), sizes, 7))


def test_the_oracle_loads_the_optimum_request_by_request():
    rng = random.Random(4)
    for _ in range(100):
        sizes = {model: rng.randint(1, 5) for model in "abcde"}
        requests = "".join(rng.choices("abcde", k=40))
        assert sum(serve(Oracle(requests), requests, sizes, 7)) == sum(
            optimal_loads(list(requests), sizes, 7)
        )


def test_the_oracle_refuses_what_it_was_not_told_of():
    oracle = Oracle("ab")
    oracle.touch("a", 0.0)
    oracle.touch("b", 1.0)
    with pytest.raises(ConfigError, match="knows only 2 requests"):
        oracle.touch("a", 2.0)


def test_lru_names_the_least_recently_used_first():
    policy = LRU()
    for now_s, model in enumerate("abcb"):
        policy.touch(model, float(now_s))
    assert list(policy.victims(frozenset("abcx"))) == ["x", "a", "c", "b"]


def test_lfu_names_the_least_frequently_used_first_and_forgets_old_fame():
    policy = LFU(half_life=10)
    for now_s, model in enumerate("aaaabbbc"):
        policy.touch(model, float(now_s))
    assert list(policy.victims(frozenset("abcx"))) == ["x", "c", "b", "a"]
    for now_s in range(40):
        policy.touch("c", 8.0 + now_s)
        policy.touch("b", 8.0 + now_s)
    assert next(iter(policy.victims(frozenset("abc")))) == "a"
    policy = LFU(half_life=1)
    for i in range(3000):  # counts of any length stay finite
        policy.touch("ab"[i % 2], float(i))
    assert list(policy.victims(frozenset("ab"))) == ["a", "b"]


def test_ewma_expects_regular_models_at_their_gap_and_gives_up_idle_ones():
    policy = EWMA()
    for now_s, model in enumerate("ababababac"):
        policy.touch(model, float(now_s))
    assert list(policy.victims(frozenset("abc"))) == ["c", "b", "a"]  # c came once only
    for now_s in range(50):
        policy.touch("d", 10.0 + now_s)
    assert list(policy.victims(frozenset("abd")))[-1] == "d"


def test_lookahead_spares_what_waits():
    policy = Lookahead()
    for now_s, model in enumerate("abcd"):
        policy.touch(model, float(now_s))
    policy.expect(["a", "b", "a"])
    assert list(policy.victims(frozenset("abcd"))) == ["c", "d", "b", "a"]
    policy.expect([])
    assert list(policy.victims(frozenset("abcd"))) == ["a", "b", "c", "d"]


def test_adaptive_is_near_the_better_of_recency_and_frequency():
    rng = random.Random(5)
    models = [chr(97 + i) for i in range(20)]
    sizes = {model: rng.randint(2, 6) for model in models}
    weights = [1 / (i + 1) for i in range(20)]
    popular = rng.choices(models, weights, k=2000)
    visits = [model for model in rng.choices(models, k=300) for _ in range(2)]
    visits = [
        m for pair in zip(visits[::2], visits[4::2], strict=False) for m in pair for _ in "ab"
    ]
    for requests in (popular, visits):
        loads = {
            name: sum(serve(policy, requests, sizes, 30))
            for name, policy in (("lru", LRU()), ("lfu", LFU(1000)), ("both", Adaptive()))
        }
        assert loads["both"] <= 1.05 * min(loads["lru"], loads["lfu"])
    assert abs(loads["lru"] - loads["lfu"]) > 0.05 * loads["lru"]  # so that the choice matters


def independent(n_models: int = 20, n: int = 2000) -> tuple[list[str], dict[str, int]]:
    """Requests by Zipf's law, where frequency beats recency, and sizes in pages."""
    rng = random.Random(6)
    sizes = {f"m{i}": rng.randint(2, 6) for i in range(n_models)}
    return rng.choices(list(sizes), [1 / (i + 1) for i in range(n_models)], k=n), sizes


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"lookahead"}))
def test_lookahead_decides_as_the_policy_behind_it_where_nothing_waits(name):
    requests, sizes = independent()
    alone = serve(make_policy(name), requests, sizes, 30)
    assert serve(Lookahead(make_policy(name)), requests, sizes, 30) == alone
    assert (sum(alone) < 0.95 * sum(serve(LRU(), requests, sizes, 30))) == (name != "lru")


HOOKS = [name for name in vars(Policy) if not name.startswith("_")]


@pytest.mark.parametrize("asking", [Lookahead, lambda asked: Adaptive([asked])])
def test_whoever_asks_another_policy_passes_on_everything(asking):
    told = []

    def note(name):
        def hook(self, *arguments):
            told.append(name)
            return arguments[0] if name == "victims" else None

        return hook

    policy = asking(type("Asked", (Policy,), {name: note(name) for name in HOOKS})())
    policy.admit("a", 1, 4)
    policy.touch("a", 0.0)
    policy.expect(["a"])
    list(policy.victims(frozenset("ab")))
    policy.forget("a")
    assert set(told) == set(HOOKS)


def test_adaptive_begins_anew_when_all_models_are_forgotten():
    requests, sizes = independent()
    used, fresh = Adaptive(), Adaptive()
    serve(used, requests, sizes, 30)
    for model in sizes:
        used.forget(model)
    runs = list("aabbccaabbcc" * 20)  # where the loads of before would still prefer frequency
    few = {model: 3 for model in "abc"}
    assert serve(used, runs, few, 7) == serve(fresh, runs, few, 7)


def test_what_is_no_policy_is_refused():
    policy = LRU()
    assert make_policy(policy) is policy
    for name in ("fifo", "oracle"):
        with pytest.raises(ConfigError, match="expected a policy"):
            make_policy(name)
    for make, wrong in ((LFU, 0), (LFU, float("nan")), (EWMA, 0), (EWMA, 1.1)):
        with pytest.raises(ConfigError, match="expected"):
            make(wrong)
