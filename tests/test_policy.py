"""One contract for every policy."""

import random

import pytest

from djinn_lib.errors import ConfigError
from djinn_lib.policy import LRU, POLICIES, make_policy

every_policy = pytest.mark.parametrize("name", sorted(POLICIES))


@every_policy
def test_every_candidate_is_named_exactly_once(name):
    policy, rng = make_policy(name), random.Random(0)
    models = [f"m{i}" for i in range(8)]
    for now_s in range(200):
        policy.touch(rng.choice(models), float(now_s))
        candidates = frozenset(rng.sample(models, rng.randint(0, 8)))
        assert sorted(policy.victims(candidates)) == sorted(candidates)


@every_policy
def test_models_never_touched_or_forgotten_are_still_victims(name):
    policy = make_policy(name)
    policy.touch("old", 0.0)
    policy.forget("old")
    policy.forget("never seen")
    assert list(policy.victims(frozenset({"old"}))) == ["old"]


@every_policy
def test_order_is_deterministic(name):
    first, second = make_policy(name), make_policy(name)
    for policy in (first, second):
        for now_s, model in enumerate("abcabdda"):
            policy.touch(model, float(now_s))
    candidates = frozenset("abcdxyz")
    assert list(first.victims(candidates)) == list(second.victims(candidates))


def test_lru_names_the_least_recently_used_first():
    policy = LRU()
    for now_s, model in enumerate("abcb"):
        policy.touch(model, float(now_s))
    assert list(policy.victims(frozenset("abcx"))) == ["x", "a", "c", "b"]


def test_make_policy_takes_names_and_objects_and_refuses_the_rest():
    policy = LRU()
    assert make_policy(policy) is policy
    with pytest.raises(ConfigError, match="expected a policy out of"):
        make_policy("fifo")
