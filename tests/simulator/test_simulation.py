"""The simulator: the same decisions as the pager, honest clocks, rows like measured ones."""

import json
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import djinn_lib as dj
from djinn_lib.analysis.validation import looking_ahead
from djinn_lib.engine.memory.layout import Layout
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.pager import Pager
from djinn_lib.engine.memory.policies import LRU, POLICIES
from djinn_lib.errors import CapacityError, ConfigError, TraceError
from djinn_lib.paths import REPO
from djinn_lib.rows import COLUMNS, check_rows
from djinn_lib.simulator.checkpoint_sizes import checkpoint_bytes, fleet
from djinn_lib.simulator.cost_model import CostModel
from djinn_lib.simulator.optimal import optimal_loads
from djinn_lib.simulator.simulate import simulate
from djinn_lib.trace import paper_trace, session_trace, zipf_trace

GIB, PAGE = 2**30, 64 << 20
SIZES = {"llama-7b": 13_476_831_232, "mistral-7b": 14_483_464_192, "phi-2": 5_559_367_680}


@pytest.mark.parametrize("eviction", ["pages", "models"])
@pytest.mark.parametrize("policy", ["lru", "ewma", "adaptive"])
def test_every_request_loads_what_the_pager_loads(policy, eviction):
    """The pager with real bytes, and the simulator without any, side by side."""
    rng, page = random.Random(1), 4096
    sizes = {name: rng.randint(1, 9) * page - rng.randint(0, page - 1) for name in "abcdef"}
    requests = rng.choices("abcdef", k=150)
    pool = HostMasters()
    for name, n_bytes in sizes.items():
        pool.add(name, Layout.pack([("w", (n_bytes,), torch.uint8)]), lambda views: None)
    pager = Pager(pool, 16 * page, page, torch.device("cpu"), policy, eviction)
    for name, n_bytes in sizes.items():
        pager.add(name, n_bytes)
    measured = []
    for name in requests:
        with pager.lease(name) as lease:
            pager.block_until_loaded(name)
        measured.append(
            (lease.stats.resident_before_bytes, lease.stats.loaded_bytes, lease.stats.evicted_bytes)
        )
    pager.close()
    rows = simulate(requests, sizes, 16 * page, policy, page_bytes=page, eviction=eviction)
    columns = ["resident_before_bytes", "loaded_bytes", "evicted_bytes"]
    assert rows[columns].to_records(index=False).tolist() == measured


@pytest.mark.parametrize(("capacity", "gib"), [("20GiB", 122.7), ("25GiB", 72.7), ("40GiB", 31.2)])
def test_the_paper_trace_loads_what_the_table_says(capacity, gib):
    rows = dj.simulate(paper_trace(), SIZES, capacity)
    assert rows["loaded_bytes"].sum() / GIB == pytest.approx(gib, abs=0.2)
    whole = dj.simulate(paper_trace(), SIZES, "25GiB", eviction="models")
    assert whole["loaded_bytes"].sum() / GIB == pytest.approx(171.8, abs=0.2)


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "concurrent"}, {"mode": "concurrent", "lookahead": True, "policy": "lookahead"}],
)
def test_rows_fit_the_schema_of_measured_rows(options):
    trace = zipf_trace(50, 1.0, [*SIZES], seed=1, rate_per_s=2.0)
    for requests in (trace, [*SIZES, "phi-2"]):
        rows = simulate(requests, SIZES, "25GiB", **options)
        assert check_rows(rows, "simulated rows").columns.tolist() == list(COLUMNS)


@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=40),
    st.lists(st.integers(1, 30), min_size=4, max_size=4),
    st.integers(30, 60),
    st.sampled_from([*POLICIES, "oracle"]),
)
def test_bytes_are_conserved_and_never_below_the_optimum(requests, sizes, capacity, policy):
    by_name = dict(zip("abcd", sizes, strict=True))
    rows = simulate(requests, by_name, capacity, policy, page_bytes=1)
    resident = json.loads(rows["resident_bytes"].iloc[-1])
    assert rows["loaded_bytes"].sum() - rows["evicted_bytes"].sum() == sum(resident.values())
    assert sum(resident.values()) <= capacity
    least = optimal_loads(requests, by_name, capacity)
    assert rows["loaded_bytes"].sum() >= sum(least)
    if policy == "oracle":
        assert rows["loaded_bytes"].sum() == sum(least)


def test_times_are_those_of_the_cost_model():
    costs = CostModel(
        link_bytes_per_s=1e9, load_start_s=0.01, hit_s=0.001, n_tokens=11,
        prefill_s={"a": 0.5, "b": 0.1}, token_s={"a": 0.02, "b": 0.03},
    )  # fmt: skip
    sizes = {"a": 10**9, "b": 10**9}
    rows = simulate(["a", "a", "b"], sizes, 10**9, costs=costs, page_bytes=10**6)
    # a: loads 1 s + 0.01 s, of which 0.5 s hide behind the prefill
    assert rows["switch_ms"].tolist() == pytest.approx([510, 1, 910])
    assert rows["ttft_ms"].tolist() == pytest.approx([1010, 501, 1010])
    assert rows["decode_ms"].tolist() == pytest.approx([200, 200, 300])
    assert rows["total_ms"].tolist() == pytest.approx([1210, 701, 1310])
    assert rows["start_s"].tolist() == pytest.approx([0, 1.21, 1.911])
    serial = simulate(
        ["a"], sizes, 2**30, costs=CostModel(1e9, prefill_s={"a": 0.5}, overlap=False)
    )
    assert serial["ttft_ms"].tolist() == pytest.approx([1500])
    mapped = CostModel(1e12, prefill_s={"a": 0.5}, plan_line=(0.002, 1e-12))
    # the copy hides behind the prefill, but the prefill begins when all is mapped
    assert simulate(["a"], sizes, 2**30, costs=mapped)["switch_ms"].tolist() == pytest.approx([3])


def test_requests_that_arrive_by_themselves_wait_for_each_other():
    trace = zipf_trace(200, 1.0, ["a", "b"], seed=1, rate_per_s=2.0)
    costs = CostModel(prefill_s={"a": 0.3, "b": 0.6})
    rows = simulate(trace, {"a": 1, "b": 1}, 10, costs=costs, page_bytes=1, mode="concurrent")
    free_at_s = 0.0
    for row in rows.itertuples():
        assert row.start_s == pytest.approx(max(row.arrival_s, free_at_s))
        assert row.queue_ms == pytest.approx((row.start_s - row.arrival_s) * 1e3)
        assert row.total_ms == pytest.approx(
            row.queue_ms + row.switch_ms + costs.prefill_s[row.model] * 1e3
        )
        free_at_s = row.arrival_s + row.total_ms / 1e3
    assert (rows["queue_ms"] > 0).any() and (rows["queue_ms"] == 0).any()
    assert set(rows["mode"]) == {"concurrent"}


def test_lookahead_loads_less_where_a_queue_is_known():
    sizes = fleet(10)
    trace = zipf_trace(1500, 0.5, list(sizes), seed=0, rate_per_s=50.0)  # far more than it can do
    loads = {
        policy: simulate(trace, sizes, sum(sizes.values()) // 2, policy, mode="concurrent")
        ["loaded_bytes"].sum()
        for policy in ("lru", "lookahead", "oracle")
    }  # fmt: skip
    assert loads["oracle"] <= loads["lookahead"] < 0.8 * loads["lru"]


def test_a_plain_sequence_and_a_policy_of_ones_own():
    class Newest(LRU):
        def victims(self, candidates):
            return reversed(list(super().victims(candidates)))

    sizes = dict.fromkeys("abc", 1)
    requests = list("abcabcabc")
    own = simulate(requests, sizes, 2, Newest(), page_bytes=1)["loaded_bytes"].sum()
    lru = simulate(requests, sizes, 2, page_bytes=1)["loaded_bytes"].sum()
    assert own < lru == len(requests)  # LRU's worst case


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], SIZES, "25GiB"), TraceError, "at least 1 request"),
        (("llama-7b", SIZES, "25GiB"), TraceError, "sequence of model names"),
        ((["x"], SIZES, "25GiB"), TraceError, "a size for every model.*'x'"),
        ((["a"], {"a": -1}, "25GiB"), ConfigError, "got -1"),
        ((["a"], {"a": 10**30}, "25GiB"), ConfigError, "a size from 1 to"),
        ((["llama-7b"], SIZES, "5GiB"), CapacityError, "'llama-7b' with 12.6 GiB: raise"),
        ((["a"], {"a": 1}, "none"), ConfigError, "none"),
        ((["llama-7b"], SIZES, "25GiB", "fifo"), ConfigError, "a policy out of"),
        ((["llama-7b"], SIZES, "25GiB", "lru", float("nan")), ConfigError, "rate of the link.*nan"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        simulate(*arguments)


def test_session_traces_stay_with_a_model():
    names = [f"m{i}" for i in range(20)]
    lonely = session_trace(2000, 0.0, names, 0, 1.0, visit_requests=10, n_visits=1)
    models = [r.model for r in lonely.requests]
    stays = np.mean([a == b for a, b in pairwise(models)])
    assert stays == pytest.approx(0.9 + 0.1 / 20, abs=0.03)
    assert lonely == session_trace(2000, 0.0, names, 0, 1.0, visit_requests=10, n_visits=1)
    with pytest.raises(TraceError, match="visits of at least 1 request"):
        session_trace(10, 0.0, names, 0, 1.0, visit_requests=0.5)


def test_fleets():
    assert list(fleet(3).values()) == list(SIZES.values())
    assert len(fleet(100)) == 100 and fleet(100) == fleet(100) != fleet(100, seed=1)
    assert set(fleet(50).values()) <= set(checkpoint_bytes().values())
    with pytest.raises(ConfigError, match="at least 1 model, got 0"):
        fleet(0)


@pytest.mark.slow
def test_the_cost_of_a_request_does_not_depend_on_their_number():
    command = [sys.executable, str(REPO / "benchmarks" / "simulator.py"), "--one"]
    small, large = (
        json.loads(
            subprocess.run([*command, str(n)], capture_output=True, text=True, check=True).stdout
        )
        for n in (10_000, 160_000)
    )
    assert large["cpu_us_per_request"] < 2 * small["cpu_us_per_request"]
    assert large["peak_mib"] - small["peak_mib"] < 160  # a million then fits in 1 GiB


def test_loading_ahead_hides_what_the_link_has_time_for():
    sizes = {"a": 10 << 30, "b": 10 << 30, "c": 10 << 30}
    costs = CostModel(link_bytes_per_s=50e9, prefill_line=(0.01, 0.0), token_line=(0.02, 0.0),
                      n_tokens=50)  # fmt: skip
    models = list("abcabcabc")
    options = {"costs": costs, "mode": "concurrent"}
    without = simulate(models, sizes, "20GiB", **options)
    ahead = simulate(models, sizes, "20GiB", lookahead=True, **options)
    # A second of decoding brings in more than a model, and room for the next one there is.
    assert without.switch_ms.iloc[1:].gt(150).any()
    assert ahead.switch_ms.iloc[1:].eq(0).all()
    assert ahead.loaded_bytes.sum() >= without.loaded_bytes.sum() > 0
    assert (ahead.loaded_bytes + ahead.resident_before_bytes).eq(10 << 30).all()
    assert ahead.total_ms.max() < without.total_ms.max()


def test_loading_ahead_takes_nothing_from_who_computes_and_no_more_than_the_link_brings():
    sizes = {"a": 10 << 30, "b": 10 << 30}
    costs = CostModel(link_bytes_per_s=50e9, token_line=(0.02, 0.0), n_tokens=50)
    rows = simulate(["a", "b"], sizes, "15GiB", costs=costs, mode="concurrent", lookahead=True)
    # 5 GiB were free; the rest can only come when a has been served.
    assert rows.switch_ms.iloc[1] == pytest.approx(5 * 2**30 / 50e9 * 1e3)
    slow = CostModel(link_bytes_per_s=1e9, token_line=(0.02, 0.0), n_tokens=50)
    rows = simulate(["a", "b"], sizes, "20GiB", costs=slow, mode="concurrent", lookahead=True)
    came = 0.98 * 1e9 // (64 << 20) * (64 << 20)  # whole pages
    assert rows.switch_ms.iloc[1] == pytest.approx(((10 << 30) - came) / 1e9 * 1e3)


def test_nobody_looks_ahead_where_nobody_waits():
    with pytest.raises(ConfigError, match="no request waits"):
        simulate(["a"], {"a": 1 << 30}, "2GiB", lookahead=True)


def test_the_paper_trace_back_to_back_hides_its_switches():
    table = looking_ahead()
    exposed_ms, done_s = table["mean later switch (ms)"], table["all done (s)"]
    assert exposed_ms["waiting, loading ahead"] <= 5.0  # the claim, predicted
    assert exposed_ms["waiting"] > 4 * exposed_ms["waiting, loading ahead"]
    assert done_s["waiting, loading ahead"] < done_s["waiting"]
