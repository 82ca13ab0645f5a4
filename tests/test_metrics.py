"""Numbers from rows, against numbers worked out by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from row_factory import cell_rows

from djinn_lib.metrics import (
    at_one_pace,
    attempted,
    block_length,
    bootstrap_interval,
    by_request,
    decode_multiples,
    decode_spread,
    difference_of_means,
    latency,
    measures,
    p99_is_max,
    prefill_ms,
    ratio_interval,
    share_interval,
)

TIMES = ["queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms"]


def rows_of(
    totals_ms: list[float],
    switches_ms: list[float],
    loaded: list[int],
    system: str = "a",
    n_failed: int = 0,
    repeat: int = 0,
) -> pd.DataFrame:
    """Served rows with these costs, of which prefill takes 2 ms; then failed ones."""
    rows = cell_rows("djinn").iloc[: len(totals_ms) + n_failed].copy()
    rows[["system", "queue_ms", "repeat"]] = system, 0.0, repeat
    failed, ok = rows.index[len(totals_ms) :], rows.index[: len(totals_ms)]
    rows.loc[ok, "total_ms"], rows.loc[ok, "switch_ms"] = totals_ms, switches_ms
    rows["ttft_ms"] = rows["switch_ms"] + 2
    rows["decode_ms"] = rows["total_ms"] - rows["ttft_ms"]
    rows.loc[ok, "loaded_bytes"] = loaded
    rows.loc[failed, ["ok", "error_kind", "error"]] = False, "oom", "out of memory"
    rows.loc[failed, TIMES] = math.nan
    rows.loc[failed, ["loaded_bytes", "evicted_bytes", "writeback_bytes"]] = 0
    return rows


# -- summaries -------------------------------------------------------------------------------


def test_measures_worked_out_by_hand():
    rows = rows_of([10, 40, 20, 30], [0, 12, 9.99, 10], [0, 7, 0, 5], n_failed=1)
    expected = {
        "requests": 5,
        "served (%)": 80,
        "repeats": 1,
        "P50 (ms)": 25,
        "P90 (ms)": 37,  # three tenths of the way from 40 back to 30
        "P99 (ms)": 40,
        "mean (ms)": 25,
        "max (ms)": 40,
        "mean TTFT (ms)": (2 + 14 + 11.99 + 12) / 4,
        "mean switch (ms)": (12 + 9.99 + 10) / 4,
        "loaded nothing (%)": 40,  # 2 of 5: a failed request found nothing
        "loaded (GiB)": 12 / 2**30,
        "written back (GiB)": 0,
    }
    found = measures(rows)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_bytes_are_those_of_one_repeat():
    rows = pd.concat([rows_of([1, 1], [0, 0], [3, 4], repeat=r) for r in range(3)])
    found = measures(rows)
    assert found["loaded (GiB)"] * 2**30 == pytest.approx(7)
    assert found["repeats"] == 3 and found["requests"] == 2


def test_unavailable_systems_are_counted_nowhere():
    both = pd.concat([cell_rows("vllm_sleep"), cell_rows("djinn")], ignore_index=True)
    assert set(attempted(both)["system"]) == {"djinn"}


def test_a_cell_that_served_nothing_has_counts_and_no_times():
    rows = rows_of([], [], [], n_failed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measures(rows)
    assert (found["requests"], found["served (%)"]) == (3, 0)
    assert math.isnan(found["P50 (ms)"]) and found["loaded nothing (%)"] == 0


def test_prefill_is_what_is_left():
    rows = rows_of([10.0, 40.0], [1.0, 12.0], [0, 7])
    assert prefill_ms(rows).tolist() == pytest.approx([2.0, 2.0])
    rows["switch_ms"] += 2.3  # clocks that overlap by a little do not make it negative
    assert prefill_ms(rows).tolist() == [0.0, 0.0]
    assert prefill_ms(rows_of([], [], [], n_failed=1)).isna().all()


def test_the_p99_is_the_maximum_below_100_values():
    assert p99_is_max(99) and not p99_is_max(100)
    assert latency(pd.Series(range(99), dtype=float))["p99"] == 98
    assert latency(pd.Series(range(100), dtype=float))["p99"] == pytest.approx(98.01)
    assert all(math.isnan(value) for value in latency(pd.Series(dtype=float)).values())


# -- intervals -------------------------------------------------------------------------------

BIMODAL = [2.0] * 16 + [1400.0] * 12 + [12_000.0] * 2  # as the paper's Djinn


def p99(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.quantile(values, 0.99, axis=axis)


@pytest.mark.parametrize("statistic", [np.median, np.mean, p99])
@pytest.mark.parametrize(
    "values",
    [[3.0] * 30, [0.0] * 15 + [1000.0] * 15, BIMODAL, list(range(30)), [1.0, 1.0, 9.0]],
    ids=["constant", "two modes", "three modes", "even", "few"],
)
@pytest.mark.parametrize("block", [1, 3])
def test_an_interval_is_a_number_around_the_statistic(values, statistic, block):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, low, high = bootstrap_interval(statistic, values, block=block)
    assert value == pytest.approx(statistic(np.asarray(values)))
    assert min(values) <= low <= value <= high <= max(values)
    if len(set(values)) == 1:
        assert low == value == high


def test_nothing_and_a_single_request_have_no_interval():
    nothing = pd.Series([], dtype=float)
    for interval in (bootstrap_interval(np.mean, []), ratio_interval(nothing, nothing, "p50")):
        assert all(math.isnan(value) for value in interval)
    value, low, high = bootstrap_interval(np.mean, [7.0])
    assert value == 7.0 and math.isnan(low) and math.isnan(high)


def test_blocks_cover_the_truth_where_requests_follow_each_other(rng):
    """Of an autoregressive sequence, whose neighbours are alike: single draws are too sure."""

    def coverage(block: int) -> float:
        covered = 0
        for seed in range(150):
            noise, x = rng.normal(0, 1, 300), np.zeros(300)
            for i in range(1, 300):
                x[i] = 0.7 * x[i - 1] + noise[i]
            _, low, high = bootstrap_interval(np.mean, x, block=block, seed=seed, n_resamples=300)
            covered += low <= 0 <= high
        return covered / 150

    assert coverage(1) < 0.7 < 0.8 < coverage(3 * block_length(300))


def test_repeats_of_a_request_are_one_observation():
    rows = pd.concat(
        [rows_of([10, 40, 30], [0, 0, 0], [0, 0, 0], repeat=r) for r in (0, 1)]
        + [rows_of([40, 40, 30], [0, 0, 0], [0, 0, 0], repeat=2)]
    )
    assert by_request(rows).tolist() == [20, 40, 30]
    assert list(by_request(rows).index.names) == ["trace", "capacity_label", "request"]
    # The same rows again make nobody surer.
    once = bootstrap_interval(np.mean, by_request(rows))
    twice = bootstrap_interval(np.mean, by_request(pd.concat([rows, rows.assign(repeat=9)])))
    assert once == twice


def test_requests_that_one_system_failed_are_not_compared():
    fast = rows_of([1.0, 2.0, 3.0], [0, 0, 0], [0, 0, 0])
    slow = rows_of([10.0, 20.0], [0, 0], [0, 0], n_failed=1)
    ratio, low, high = ratio_interval(by_request(slow), by_request(fast), "mean")
    assert (ratio, low, high) == pytest.approx((10, 10, 10))


def test_the_spread_of_decoding_is_that_of_one_model_and_length():
    rows = cell_rows("djinn").iloc[:6].assign(
        model=[*"aaabbb"], decode_ms=[10.0, 12.0, 40.0, 100.0, 300.0, 900.0], n_tokens=[6] * 6
    )  # fmt: skip
    assert decode_spread(rows) == 9.0
    rows.loc[rows.index[5], "n_tokens"] = 60  # of another length, so not comparable
    assert decode_spread(rows) == 4.0
    assert math.isnan(decode_spread(rows.assign(ok=False)))
    multiples = decode_multiples(rows.assign(day=[*"xyxyxx"]), "day")
    assert list(multiples) == [1.0, 1.0, 4.0, 1.0, 1.0, 1.0]


def test_at_one_pace_requests_decode_in_the_mean_of_both_systems():
    keys = {"trace": "t", "capacity_label": "25", "ok": True}
    one = pd.DataFrame({**keys, "request": [0, 0, 1, 2], "repeat": [0, 1, 0, 0],
                        "model": [*"aabb"], "n_tokens": 6, "decode_ms": [80.0, 120.0, 50.0, 10.0],
                        "total_ms": [100.0, 150.0, 51.0, 11.0]})  # fmt: skip
    other = pd.DataFrame({**keys, "request": [1, 0, 2], "repeat": 0, "ok": [True, True, False],
                          "model": [*"bab"], "n_tokens": 6, "capacity_label": "40",
                          "decode_ms": [150.0, 300.0, np.nan],
                          "total_ms": [155.0, 307.0, np.nan]})  # fmt: skip
    alike, other_alike = at_one_pace([one, other], "mean")
    assert alike["decode_ms"].tolist() == [200.0, 200.0, 100.0]  # request 2 was served by one only
    assert alike["total_ms"].tolist() == [220.0, 230.0, 101.0]
    assert other_alike["total_ms"].tolist() == [105.0, 207.0]
    assert set(by_request(alike, "decode_ms")) == set(by_request(other_alike, "decode_ms"))
    best, other_best = at_one_pace([one, other], "fastest")  # of model b it is that of request 2
    assert best["decode_ms"].tolist() == [80.0, 80.0, 10.0]
    assert other_best["total_ms"].tolist() == [15.0, 87.0]
    both = at_one_pace([one, other.assign(decode_ms=[150.0, 70.0, np.nan])], "fastest")
    assert [rows["decode_ms"].iloc[-1] for rows in both] == [10.0, 70.0]
    three = at_one_pace([one, other, other.assign(decode_ms=[400.0, 500.0, np.nan])], "mean")
    assert three[0]["decode_ms"].tolist() == [300.0, 300.0, 200.0]


def test_decodes_that_cannot_be_compared_have_no_common_pace():
    keys = {"trace": "t", "capacity_label": "25", "ok": True, "model": "a", "repeat": 0}
    one = pd.DataFrame({**keys, "request": [0, 1, 2], "n_tokens": [6, 6, 2], "total_ms": 90.0,
                        "decode_ms": [80.0, 60.0, 5.0]})  # fmt: skip
    other = one.assign(n_tokens=6, decode_ms=[40.0, np.nan, 50.0])  # 1: unknown, 2: longer
    for pace, decode_ms in (("mean", 60.0), ("fastest", 40.0)):
        assert [rows["decode_ms"].tolist() for rows in at_one_pace([one, other], pace)] == [
            [decode_ms], [decode_ms]]  # fmt: skip


def test_a_difference_of_means_is_paired(rng):
    shared = rng.normal(500, 300, 200)  # what requests have in common, which is most of them
    one, other = pd.Series(shared + rng.normal(10, 6, 200)), pd.Series(shared)
    difference, low, high = difference_of_means(one, other)
    assert difference == pytest.approx((one - other).mean())
    assert high - low == pytest.approx(2 * 1.96 * 6 / math.sqrt(200), rel=0.2)
    assert low < difference < high


def test_a_share_of_all_or_none_has_an_interval_too():
    """Clopper and Pearson: n of n has 0.025 ** (1 / n) as its low end."""
    for hit, ends in ((1.0, (0.025 ** (1 / 20), 1.0)), (0.0, (0.0, 1 - 0.025 ** (1 / 20)))):
        value, low, high = share_interval(pd.Series([hit] * 20))
        assert value == hit and (low, high) == pytest.approx(ends)
    some = pd.Series([1.0] * 15 + [0.0] * 5)
    assert share_interval(some, block=3) == bootstrap_interval(np.mean, some, block=3)
    assert math.isnan(share_interval(pd.Series(dtype=float))[0])


@pytest.mark.parametrize("statistic", ["p50", "mean", "p90"])
def test_a_ratio_has_the_interval_that_scipy_gives_pairs(rng, statistic):
    bottom = rng.lognormal(3, 1, 30)
    top = bottom * rng.normal(2, 0.1, 30)
    reduce = {"p50": np.median, "mean": np.mean, "p90": lambda x, axis: np.quantile(x, 0.9, axis)}

    def ratio(one, other, axis):
        return reduce[statistic](one, axis=axis) / reduce[statistic](other, axis=axis)

    scipys = scipy.stats.bootstrap(
        (top, bottom), ratio, paired=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    value, low, high = ratio_interval(pd.Series(top), pd.Series(bottom), statistic)
    assert value == pytest.approx(float(ratio(top, bottom, -1)))
    assert (low, high) == pytest.approx(tuple(scipys))


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=40), st.floats(0.5, 50))
def test_a_system_that_is_slower_by_a_factor_is_so_in_every_draw(values, factor):
    fast = pd.Series(values)
    ratio, low, high = ratio_interval(factor * fast, fast, "p50", n_resamples=50)
    assert (ratio, low, high) == pytest.approx((factor, factor, factor))
