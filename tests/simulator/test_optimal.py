"""The offline optimum, against a linear program, the published table and the ring itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from djinn_lib.engine.memory.policies import LRU
from djinn_lib.engine.memory.ring import Eviction, Ring
from djinn_lib.errors import CapacityError, ConfigError, TraceError
from djinn_lib.simulator.optimal import optimal_bytes, optimal_loads
from djinn_lib.trace import paper_trace, zipf_trace

GIB = 1 << 30
SIZES = {"llama-7b": 13_476_831_232, "mistral-7b": 14_483_464_192, "phi-2": 5_559_367_680}


def least_by_linear_program(models: Sequence[str], sizes: dict[str, int], capacity: int) -> float:
    """The same optimum as a linear program over the share that is kept between two uses.

    Between two uses of a model, at requests i and j, a share y of its bytes is kept; the rest is
    loaded again. At each request between them the kept bytes must fit beside the requested model.
    """
    first_touches = sum(sizes[model] for model in dict.fromkeys(models))
    uses = [[i for i, m in enumerate(models) if m == model] for model in dict.fromkeys(models)]
    gaps = [(i, j) for use in uses for i, j in pairwise(use)]
    if not gaps:
        return first_touches
    gap_bytes = np.array([float(sizes[models[i]]) for i, _ in gaps])
    covers = np.array([[i < t < j for i, j in gaps] for t in range(len(models))]) * gap_bytes
    room = [capacity - sizes[model] for model in models]
    result = linprog(-gap_bytes, A_ub=covers, b_ub=room, bounds=(0, 1), method="highs")
    assert result.success
    return first_touches + gap_bytes.sum() + result.fun


def bytes_of_lru(
    models: Sequence[str], sizes: dict[str, int], capacity: int, page_bytes: int,
    eviction: Eviction = "pages",
) -> int:  # fmt: skip
    """What the ring itself loads with least-recently-used eviction."""
    ring, policy, loaded = Ring(capacity // page_bytes, eviction), LRU(), 0
    for model, n_bytes in sizes.items():
        ring.add(model, -(-n_bytes // page_bytes))
    for now_s, model in enumerate(models):
        policy.touch(model, now_s)
        loaded += max(0, sizes[model] - ring.n_resident(model) * page_bytes)
        ring.make_room(model, policy)
        ring.map_missing(model)
    ring.check()
    return loaded


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[str], dict[str, int], int]:
    """A sequence over a few models, and a capacity between the largest and all of them."""
    sizes = {m: draw(st.integers(1, 20)) for m in "abcdef"[: draw(st.integers(1, 6))]}
    models = draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=25))
    return models, sizes, draw(st.integers(max(sizes.values()), sum(sizes.values()) + 1))


def test_the_rule_equals_the_linear_program(rng):
    n_tight = 0
    for _ in range(300):
        sizes = {str(i): int(rng.integers(1, 50)) for i in range(rng.integers(2, 8))}
        models = [str(i) for i in rng.integers(0, len(sizes), rng.integers(2, 40))]
        capacity = int(rng.integers(max(sizes.values()), sum(sizes.values()) + 1))
        least = optimal_bytes(models, sizes, capacity)
        assert least == pytest.approx(least_by_linear_program(models, sizes, capacity), abs=1e-6)
        n_tight += least > sum(sizes[model] for model in set(models))
    assert n_tight > 150  # most of them do overflow


@pytest.mark.parametrize(("ring_gib", "gib"), [(20, 117.5), (25, 67.5), (32, 31.2), (40, 31.2)])
def test_the_paper_trace_loads_what_the_table_says(ring_gib, gib):
    least = optimal_bytes(paper_trace(), SIZES, ring_gib * GIB)
    assert least / GIB == pytest.approx(gib, abs=0.05)
    models = [request.model for request in paper_trace().requests]
    by_program = least_by_linear_program(models, SIZES, ring_gib * GIB)
    assert least == pytest.approx(by_program, rel=1e-9)


@given(instances())
def test_no_policy_of_the_ring_loads_less(instance):
    models, sizes, capacity = instance
    least, compulsory = optimal_bytes(models, sizes, capacity), sum(sizes[m] for m in set(models))
    partial = bytes_of_lru(models, sizes, capacity, 1)
    assert compulsory <= least <= partial <= sum(sizes[model] for model in models)
    assert least <= bytes_of_lru(models, sizes, capacity, 1, "models")


@given(instances(), st.integers(1, 5))
def test_more_room_or_smaller_pages_never_load_more(instance, page_bytes):
    models, sizes, capacity = instance
    least = optimal_bytes(models, sizes, capacity)
    assert optimal_bytes(models, sizes, capacity + 3) <= least
    assert optimal_bytes(models, sizes, sum(sizes.values())) == sum(sizes[m] for m in set(models))
    roomy = capacity + page_bytes * len(sizes)  # so that every model fits in whole pages
    assert optimal_bytes(models, sizes, roomy, page_bytes) >= optimal_bytes(models, sizes, roomy)


def test_by_hand():
    # b fits beside a's first 3 bytes; the furthest next use loses its bytes first.
    assert optimal_loads(list("aba"), {"a": 6, "b": 7}, 10) == [6, 7, 3]
    assert optimal_loads(list("abcab"), {"a": 4, "b": 4, "c": 4}, 8) == [4, 4, 4, 0, 4]
    assert optimal_loads(list("abcb"), {"a": 4, "b": 4, "c": 4}, 8) == [4, 4, 4, 0]
    assert optimal_bytes(list("aaaa"), {"a": 5, "unused": 9}, 5) == 5


def test_pages():
    # Two frames of 4 bytes: a model of 5 fills one page and a quarter of the next.
    assert optimal_loads(list("aba"), {"a": 5, "b": 4}, 9, page_bytes=4) == [5, 4, 1]
    assert optimal_loads(list("aba"), {"a": 5, "b": 4}, 9, page_bytes=1) == [5, 4, 0]
    assert optimal_loads(list("aba"), {"a": 5, "b": 4}, 12, page_bytes=4) == [5, 4, 0]
    sizes = {model: 4 * n_pages for model, n_pages in zip("abc", (3, 5, 2), strict=True)}
    in_pages = {model: n_bytes // 4 for model, n_bytes in sizes.items()}
    assert optimal_bytes(list("abcacb"), sizes, 27, 4) == 4 * optimal_bytes(
        list("abcacb"), in_pages, 6
    )


def test_a_trace_is_as_good_as_its_models():
    trace = zipf_trace(200, 1.0, ["a", "b", "c"], 4, 1.0)
    sizes = {"a": 100, "b": 90, "c": 80}
    models = [request.model for request in trace.requests]
    assert optimal_bytes(trace, sizes, 150) == optimal_bytes(models, sizes, 150)


def test_a_long_trace_over_many_models_is_quick():
    names = [f"model-{i}" for i in range(1000)]
    trace = zipf_trace(100_000, 0.9, names, seed=0, rate_per_s=100.0)
    sizes = {name: (1 + i % 14) * GIB for i, name in enumerate(names)}
    begin_s = time.thread_time()  # of this thread alone, whoever else computes
    least = optimal_bytes(trace, sizes, 640 * GIB)
    assert time.thread_time() - begin_s < 10
    assert sum(sizes.values()) < least < 100_000 * 7.5 * GIB


@pytest.mark.parametrize(
    ("models", "sizes", "capacity", "page_bytes", "error", "message"),
    [
        ([], {"a": 1}, 1, 1, TraceError, "at least 1 request, got none"),
        (["a", "b"], {"a": 1}, 1, 1, TraceError, "got none for 'b'"),
        (["a"], {"a": 0}, 1, 1, ConfigError, "for 'a', got 0"),
        (["a"], {"a": 5}, 4, 1, CapacityError, "at most 4 B .*'a' with 5 B: raise"),
        (["a"], {"a": 5}, 7, 4, CapacityError, "at most 7 B .*'a' with 5 B: raise"),
        (["a"], {"a": 5}, 0, 1, CapacityError, "raise the capacity"),
        (["a"], {"a": 5}, 9, 0, ConfigError, "pages of at least 1 byte, got 0"),
    ],
)
def test_errors(models, sizes, capacity, page_bytes, error, message):
    with pytest.raises(error, match=message):
        optimal_bytes(models, sizes, capacity, page_bytes)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -1, 0])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ConfigError, match=f"for 'a', got {size}"):
        optimal_bytes(["a"], {"a": size}, 10)
