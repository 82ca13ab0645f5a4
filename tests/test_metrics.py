"""Numbers from rows, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_factory import UNAVAILABLE, cell_rows, run_rows

from djinn_lib.metrics import (
    attempted,
    bootstrap_interval,
    comparison_summary,
    decode_multiples,
    decode_spread,
    difference_of_means,
    latency,
    p99_is_max,
    prefill_ms,
    ratio_interval,
    served,
    share_interval,
    summarise,
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


def test_a_summary_worked_out_by_hand():
    rows = rows_of([10, 40, 20, 30], [0, 12, 9.99, 10], [0, 7, 0, 5], n_failed=1)
    summary = summarise(rows).loc[("a", "paper", "25", "sequential")]
    expected = {
        "n": 5,
        "completed": 4,
        "failed": 1,
        "repeats": 1,
        "p50_total_ms": 25,
        "p90_total_ms": 37,  # three tenths of the way from 40 back to 30
        "p99_total_ms": 40,
        "mean_total_ms": 25,
        "max_total_ms": 40,
        "p50_ttft_ms": 11.995,  # between 9.99 + 2 and 10 + 2
        "max_ttft_ms": 14,
        "p99_is_max": True,
        "mean_switch_ms": (12 + 9.99 + 10) / 4,
        "hit_share": 0.5,  # 10 ms is no hit
        "zero_load_share": 0.5,
        "loaded_bytes": 12,
        "writeback_bytes": 0,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)


def test_bytes_are_those_of_one_repeat():
    rows = pd.concat([rows_of([1, 1], [0, 0], [3, 4], repeat=r) for r in range(3)])
    summary = summarise(rows).iloc[0]
    assert summary["loaded_bytes"] == 7 and summary["repeats"] == 3 and summary["n"] == 6


def test_unavailable_systems_are_counted_nowhere():
    rows, unavailable = cell_rows("djinn"), cell_rows("vllm_sleep")
    both = pd.concat([unavailable, rows], ignore_index=True)
    pd.testing.assert_frame_equal(summarise(both), summarise(rows))
    assert comparison_summary(both) == comparison_summary(rows)
    assert set(attempted(both)["system"]) == {"djinn"}
    assert summarise(unavailable).empty and comparison_summary(unavailable) == {}


def test_failed_requests_are_counted():
    rows = cell_rows("vllm_recreate")
    summary = summarise(rows).iloc[0]
    assert (summary["n"], summary["completed"], summary["failed"]) == (30, 22, 8)
    assert len(attempted(rows)) == 30 and len(served(rows)) == 22
    assert summary["p50_total_ms"] == rows["total_ms"].dropna().median()


def test_a_cell_that_served_nothing_has_counts_and_no_times():
    rows = rows_of([], [], [], n_failed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = summarise(rows).iloc[0]
    assert (summary["n"], summary["completed"], summary["failed"]) == (3, 0, 3)
    assert summary[["p50_total_ms", "p99_ttft_ms", "hit_share"]].isna().all()


def test_cells_keep_their_order_and_types():
    rows = run_rows()
    table = summarise(rows)
    cells = rows[~rows["system"].isin(UNAVAILABLE)]
    keys = ["system", "trace", "capacity_label", "mode"]
    expected = list(cells[keys].drop_duplicates().itertuples(index=False, name=None))
    assert list(table.index) == expected and list(table.index.names) == keys
    assert table["n"].dtype == table["completed"].dtype == int
    assert table["p99_is_max"].dtype == bool and table["p50_total_ms"].dtype == float


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


def p99(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99))


@pytest.mark.parametrize("statistic", [np.median, np.mean, np.max, p99])
@pytest.mark.parametrize(
    "values",
    [[7.0], [3.0] * 30, [0.0] * 15 + [1000.0] * 15, BIMODAL, list(range(30)), [1.0, 1.0, 9.0]],
    ids=["single", "constant", "two modes", "three modes", "even", "few"],
)
def test_an_interval_is_a_number_around_the_statistic(values, statistic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, low, high = bootstrap_interval(values, statistic)
    assert value == pytest.approx(statistic(np.asarray(values)))
    assert min(values) <= low <= value <= high <= max(values)
    if len(set(values)) == 1:
        assert low == value == high


def test_intervals_are_the_same_every_time_and_depend_on_the_confidence():
    values = pd.Series(BIMODAL)
    assert bootstrap_interval(values, np.mean) == bootstrap_interval(values, np.mean)
    assert bootstrap_interval(values, np.mean, seed=1) != bootstrap_interval(values, np.mean)
    _, low, high = bootstrap_interval(values, np.mean, confidence=0.5)
    _, lower, higher = bootstrap_interval(values, np.mean, confidence=0.95)
    assert lower < low < high < higher


def test_nothing_has_no_interval():
    for interval in (bootstrap_interval([]), share_interval([]), ratio_interval([], [1.0], "p50")):
        assert all(math.isnan(value) for value in interval)
    assert all(math.isnan(value) for value in ratio_interval([1.0], [], "p50"))


def test_a_95_percent_interval_covers_the_truth_that_often(rng):
    covered = 0
    for seed in range(200):
        _, low, high = bootstrap_interval(
            rng.normal(10, 3, 60), np.mean, seed=seed, n_resamples=400
        )
        covered += low <= 10 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_share_of_hits_of_the_paper():
    share, low, high = share_interval([True] * 16 + [False] * 14)
    assert share == pytest.approx(16 / 30)
    assert (low, high) == pytest.approx((0.3614, 0.6977), abs=1e-4)  # Wilson's formula by hand


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.1135), (30, 0.8865, 1.0)])
def test_shares_of_none_and_all_still_have_a_width(hits, low, high):
    share, lowest, highest = share_interval(pd.Series([True] * hits + [False] * (30 - hits)))
    assert share == hits / 30 and (lowest, highest) == pytest.approx((low, high), abs=1e-4)


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


def test_a_difference_of_means_has_the_width_that_theory_has(rng):
    one, other = rng.normal(50, 6, 400), rng.normal(40, 8, 400)
    difference, low, high = difference_of_means(one, other)
    assert difference == pytest.approx(one.mean() - other.mean())
    width = 2 * 1.96 * math.sqrt((6**2 + 8**2) / 400)
    assert high - low == pytest.approx(width, rel=0.15) and low < difference < high
    assert difference_of_means(one, other) == (difference, low, high)
    assert all(math.isnan(value) for value in difference_of_means([], other))


def test_the_ratio_of_medians():
    assert ratio_interval([6.0] * 5, [2.0] * 9, "p50") == (3.0, 3.0, 3.0)
    top, bottom = [4.0, 5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0]
    ratio, low, high = ratio_interval(top, pd.Series(bottom), "p50")
    assert ratio == 3.0 and 4 / 3 <= low < 3.0 < high <= 8.0
    assert ratio_interval(top, bottom, "p50") == (ratio, low, high)
    _, narrower, _ = ratio_interval(top, [2.0] * 3, "p50")  # less spread below, less in the ratio
    assert narrower > low


def test_the_interval_of_a_ratio_is_as_wide_as_theory_has_it(rng):
    sample, constant = rng.normal(100, 10, 400), [100.0] * 400
    width = 2 * 1.96 * math.sqrt(math.pi / 2) * 10 / math.sqrt(400) / 100  # of a sample's median
    for pair in ((sample, constant), (constant, sample)):
        _, low, high = ratio_interval(*pair, "p50")
        assert width / 1.5 < high - low < width * 1.5


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40), st.floats(0.5, 50))
def test_ratios_scale_with_the_numerator(values, factor):
    ratio, low, high = ratio_interval([factor * v for v in values], values, "p50", n_resamples=50)
    assert ratio == pytest.approx(factor)
    assert max(values) / min(values) * factor >= high * 0.999
    assert low <= high


# -- the paper's own summary -----------------------------------------------------------------


def test_the_comparison_has_the_form_of_the_published_one():
    rows = pd.concat([cell_rows("djinn"), cell_rows("vllm_recreate"), cell_rows("djinn", "20")])
    summary = comparison_summary(rows)
    assert list(summary) == ["djinn_sequential", "vllm_recreate_sequential"]
    published = {"p50_total_ms", "p99_total_ms", "mean_total_ms", "completed"}
    assert all(published <= cell.keys() for cell in summary.values())
    djinn, vllm = summary.values()
    totals_ms = cell_rows("djinn")["total_ms"]
    assert djinn["p50_total_ms"] == pytest.approx(totals_ms.median(), abs=1e-3)
    assert djinn["p99_total_ms"] == pytest.approx(totals_ms.max(), abs=1e-3)
    assert djinn["mean_total_ms"] == pytest.approx(totals_ms.mean(), abs=1e-3)
    assert (djinn["completed"], vllm["completed"], vllm["requests"]) == (30, 22, 30)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_comparison_counts_one_repeat_and_keeps_modes_apart():
    rows = cell_rows("djinn", repeats=3)
    concurrent = cell_rows("djinn").assign(mode="concurrent", total_ms=1e4)
    summary = comparison_summary(pd.concat([rows, concurrent]))
    assert summary["djinn_sequential"]["completed"] == summary["djinn_sequential"]["requests"] == 30
    assert summary["djinn_sequential"]["repeats"] == 3
    assert summary["djinn_concurrent"]["p50_total_ms"] == 1e4
    assert summary["djinn_sequential"]["p99_total_ms"] < 1e4


def test_the_comparison_of_a_system_that_served_nothing_is_plain_json():
    summary = comparison_summary(rows_of([], [], [], n_failed=4))
    assert summary["a_sequential"]["p50_total_ms"] is None
    assert summary["a_sequential"]["completed"] == 0
    json.dumps(summary, allow_nan=False)


def test_the_comparison_is_of_one_capacity():
    rows = pd.concat([cell_rows("djinn", label) for label in ("20", "40")])
    assert comparison_summary(rows) == {}
    slow, fast = (comparison_summary(rows, label)["djinn_sequential"] for label in ("20", "40"))
    assert slow["mean_total_ms"] > fast["mean_total_ms"]
