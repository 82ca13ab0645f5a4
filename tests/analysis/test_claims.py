"""Claims: the file, every metric on rows with known answers, and the verdicts."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import yaml
from row_factory import CAPACITIES, SIZES, TOTAL_BYTES, cell_rows, run_rows
from run_factory import GPU_MACHINE, MACHINE, run_of

from djinn_lib.analysis.claim_metrics import METRICS, TIMED, Measurement
from djinn_lib.analysis.claims import (
    Claim,
    Expected,
    Verdict,
    claims_table,
    colored,
    compare,
    judge,
    load_claims,
    read_claims,
    verdict_counts,
    write_claims,
)
from djinn_lib.analysis.run import Run
from djinn_lib.analysis.selection import CPU_CLOCKS, NotMeasured
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment.profile import load_profile
from djinn_lib.paths import REPO
from djinn_lib.trace import zipf_trace


def served(system: str, total_ms: list[float], **columns: Any) -> pd.DataFrame:
    """Rows of a system whose totals are these, with any other column set."""
    rows = cell_rows("djinn").iloc[: len(total_ms)].copy()
    known = {"system": system, "run_id": system, "total_ms": total_ms}
    return rows.assign(**{**known, **columns})


def failed(rows: pd.DataFrame, kind: str, error: str) -> pd.DataFrame:
    times = dict.fromkeys(["queue_ms", "switch_ms", "ttft_ms", "decode_ms", "total_ms"], math.nan)
    return rows.assign(
        **times, ok=False, error_kind=kind, error=error, loaded_bytes=0, token_sha=""
    )


def measure(name: str, rows: pd.DataFrame, **arguments: Any) -> Measurement:
    return METRICS[name](run_of(rows), **arguments)


# -- claims.yml ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return load_claims()


def test_the_claims_name_what_exists(claims):
    profile = load_profile("gpu")
    systems = {*profile.systems, None}
    for claim in claims:
        assert (REPO / "notebooks" / f"{claim.notebook}.ipynb").exists(), claim.id
        for key in ("system", "to", "baseline"):
            named = claim.arguments.get(key)
            assert ({*named} if isinstance(named, list) else {named}) <= systems, claim.id
        assert claim.arguments.get("capacity_label") in {*profile.capacities, None}, claim.id
        assert claim.arguments.get("trace") in {*profile.traces, None}, claim.id
        assert claim.quote and claim.quote == claim.quote.strip()


GOOD = {
    "id": "a-claim",
    "source": "ours",
    "quote": "It is so",
    "metric": "zero_load_share",
    "arguments": {"system": "djinn"},
    "expected": {"value": 0.5, "unit": "share", "better": "higher"},
    "tolerance": 0.1,
    "notebook": "05_claims",
    "figure": None,
}


def claim_of(expected: dict[str, Any], **fields: Any) -> Claim:
    unit = {"unit": "share", "better": "higher"}
    return Claim.model_validate({**GOOD, "expected": {**unit, **expected}, **fields})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "beauty"}, "expected a metric out of .*got 'beauty'"),
        ({"arguments": {}}, "'zero_load_share': missing a required argument: 'system'"),
        ({"arguments": {"system": "djinn", "colour": "red"}}, "unexpected keyword argument 'col"),
        (
            {"metric": "latency", "arguments": {"system": "djinn", "statistic": "p98"}},
            "a statistic out of .*got 'p98'",
        ),
        (
            {
                "metric": "median_ratio",
                "arguments": {"system": "a", "to": "b", "pace": "slowest"},
            },
            "a pace out of .*got 'slowest'",
        ),
        ({"source": "hearsay"}, "source"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"colour": "red"}, "colour"),
        ({"withdrawn": ""}, "withdrawn"),
        ({"expected": {**GOOD["expected"], "low": 0.4}}, "either a value, or low and/or high"),
        ({"expected": {"unit": "share", "better": "higher"}}, "either a value, or low and/or"),
        ({"expected": {"unit": "x", "better": "lower", "low": 2, "high": 1}}, "low <= high"),
    ],
    ids=str,
)
def test_a_bad_claim_is_refused_with_its_reason(tmp_path, change, message):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([GOOD]))
    assert load_claims(path)[0].id == "a-claim"
    path.write_text(yaml.safe_dump([{**GOOD, "id": "another"}, {**GOOD, **change}]))
    with pytest.raises(ConfigError, match=rf"claims\.yml cannot be used: (?s:.*){message}"):
        load_claims(path)


def test_an_id_stands_once(tmp_path):
    (tmp_path / "claims.yml").write_text(yaml.safe_dump([GOOD, GOOD]))
    with pytest.raises(ConfigError, match=r"every id once, got \['a-claim'\]"):
        load_claims(tmp_path / "claims.yml")


# -- metrics ---------------------------------------------------------------------------------


def test_ratios_of_latencies():
    rows = pd.concat([served("a", [6.0, 6.0, 9.0]), served("b", [2.0, 3.0, 2.0])])
    ratio = measure("median_ratio", rows, system="a", to="b")
    assert ratio.value == 3.0 and ratio.n == 3
    assert ratio.interval and ratio.interval[0] <= 3.0 <= ratio.interval[1]
    ratio = measure("statistic_ratio", rows, system="a", to="b", statistic="max")
    assert (ratio.value, ratio.interval, ratio.span, ratio.n) == (3.0, None, (3.0, 3.0), 3)
    ratio = measure("statistic_ratio", rows, system="a", to="b", statistic="mean")
    assert ratio.value == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("statistic", "value"), [("p50", 15.5), ("mean", 15.5), ("p99", 30), ("max", 30), ("p90", 27.1)]
)
def test_latency(statistic, value):
    rows = served("a", [float(i) for i in range(1, 31)])
    measured = measure("latency", rows, system="a", statistic=statistic)
    assert measured.value == pytest.approx(value) and measured.n == 30
    assert measured.judged[0] <= value <= measured.judged[1]
    assert (measured.interval is None) == (statistic in ("p99", "max"))
    assert ("the maximum" in measured.remark) == (statistic == "p99")


def test_maxima_are_judged_by_every_repeat():
    rows = pd.concat([served("a", [1.0, peak], repeat=k) for k, peak in enumerate((8.0, 12.0))])
    claim = claim_of({"high": 10, "unit": "ms", "better": "lower"}, metric="latency",
                     arguments={"system": "a", "statistic": "max"})  # fmt: skip
    (verdict,) = judge([claim], run_of(rows))
    assert (verdict.verdict, verdict.measured, verdict.low) == ("unresolved", 10.0, None)


@pytest.mark.parametrize(("mode", "last_ms"), [("sequential", 6.5), ("concurrent", 10.0)])
def test_another_request_may_be_the_last_of_each_repeat(mode, last_ms):
    rows = pd.concat(
        [
            served("a", [8.0, 1.0], mode=mode, repeat=0),
            served("a", [1.0, 12.0], mode=mode, repeat=1),
        ]
    )
    found = measure("latency", rows, system="a", statistic="max", mode=mode)
    assert found.value == last_ms and found.span == (8.0, 12.0)
    both = pd.concat([rows, served("b", [2 * last_ms] * 2, mode=mode)])
    assert (
        measure("statistic_ratio", both, system="b", to="a", statistic="max", mode=mode).value == 2
    )


def test_switch_share_counts_from_low_to_below_high():
    rows = served("a", [20_000.0] * 4, switch_ms=[0.0, 9.999, 10.0, 15_000.0])
    assert measure("switch_share", rows, system="a", low_ms=0, high_ms=10).value == 0.5
    assert measure("switch_share", rows, system="a", low_ms=10, high_ms=15_000).value == 0.25
    assert measure("switch_share", rows, system="a", low_ms=10).value == 0.5
    assert measure("switch_share", rows, system="a", low_ms=0).n == 4


def test_speedup_over_capacities():
    rows = []
    for label, slow_ms in (("20", 30.0), ("25", 31.0), ("40", 34.0)):
        rows += [served("a", [10.0] * 3, capacity_label=label)]
        rows += [served("b", [slow_ms] * 3, capacity_label=label)]
    measured = measure("speedup_over_capacities", pd.concat(rows), system="a", baseline="b")
    assert (measured.value, measured.span, measured.n) == (3.1, (3.0, 3.4), 3)
    assert measured.remark == "3.00 to 3.40 over 3 capacities"
    spread = measure("speedup_spread", pd.concat(rows), system="a", baseline="b")
    assert spread.value == pytest.approx(3.4 / 3.0) and spread.n == 3
    assert spread.interval == pytest.approx((3.4 / 3.0,) * 2) and spread.remark == measured.remark
    with pytest.raises(NotMeasured, match=r"rows of one capacity only \(20\)"):
        measure("speedup_over_capacities", pd.concat(rows[:2]), system="a", baseline="b")


def test_at_one_pace_only_what_is_not_decoding_counts():
    """Ratios of totals are 4.5, 1.5 and 0.9; without the pace of the decode they are equal."""
    rows = []
    for label, fast_ms, slow_ms in (("20", 200.0, 1000.0), ("25", 500.0, 700.0), ("40", 900, 300)):
        before = {"a": 50.0, "b": 450.0}
        rows += [served(name, [before[name] + ms] * 3, decode_ms=ms, capacity_label=label)
                 for name, ms in (("a", fast_ms), ("b", slow_ms))]  # fmt: skip
    together, two = pd.concat(rows), {"system": "a", "baseline": "b"}
    ratios = [measure("median_ratio", together, system="b", to="a", pace=pace)
              for pace in ("mean", "fastest")]  # fmt: skip
    assert [one.value for one in ratios] == pytest.approx([1050 / 650, 950 / 550])
    assert ratios[0].n == 3
    span = measure("speedup_over_capacities", together, **two, pace="mean").span
    assert span == pytest.approx((1050 / 650, 1050 / 650))
    spread = [measure("speedup_spread", together, **two, pace=pace)
              for pace in (None, "mean", "fastest")]  # fmt: skip
    assert [one.value for one in spread] == pytest.approx([1450 / 250 / (750 / 950), 1.0, 1.0])


def test_the_pace_is_the_same_at_all_capacities():
    rows = [served(name, [before + ms] * 3, decode_ms=ms, capacity_label=label)
            for label, ms in (("20", 100.0), ("40", 1000.0))
            for name, before in (("a", 50.0), ("b", 450.0))]  # fmt: skip
    two = {"system": "a", "baseline": "b"}
    assert measure("speedup_spread", pd.concat(rows), **two).value > 2
    for pace in ("mean", "fastest"):
        assert measure("speedup_spread", pd.concat(rows), **two, pace=pace).value == 1


def test_one_pace_is_for_systems_that_decode_by_the_same_steps():
    rows = pd.concat([served("djinn", [1.0] * 3), served("pytorch_pinned", [2.0] * 3)])
    with pytest.raises(NotMeasured, match="not decoded by transformers' own steps: djinn"):
        measure("median_ratio", rows, system="pytorch_pinned", to="djinn", pace="mean")
    rows = pd.concat([rows, served("pytorch_lru", [4.0] * 3)]).assign(decode_ms=1.0)
    found = measure("statistic_ratio", rows, system=["djinn", "pytorch_lru"], to="pytorch_pinned",
                    statistic="p50", pace="mean")  # fmt: skip
    assert found.value == 2 and "no machine ran it with pytorch_pinned: djinn" in found.remark
    with pytest.raises(NotMeasured, match="waited for each other"):
        measure("median_ratio", rows.assign(mode="concurrent"), system="pytorch_lru",
                to="pytorch_pinned", mode="concurrent", pace="mean")  # fmt: skip


def test_speedups_of_different_machines_are_not_divided():
    def on(machine: int, label: str, slow_ms: float) -> pd.DataFrame:
        cell = {"capacity_label": label, "capacity_bytes": int(label)}
        return pd.concat(
            [served(name, [ms] * 4, run_id=f"{name}{label}-{machine}", **cell)
             for name, ms in (("a", 10.0), ("b", slow_ms))]
        )  # fmt: skip

    def measured(*rows: pd.DataFrame) -> Measurement:
        run = run_of(pd.concat(rows))
        of_run = {
            run_id: {**m, "machine": {**GPU_MACHINE, "eager_operator_us": int(run_id[-1])}}
            for run_id, m in run.manifests.items()
        }
        run = replace(run, manifests=of_run)
        return METRICS["speedup_spread"](run, system="a", baseline="b")

    spread = measured(on(1, "20", 30.0), on(2, "25", 90.0), on(1, "40", 33.0))
    assert spread.value == pytest.approx(1.1) and spread.interval is None
    assert spread.judged == (pytest.approx(1.1), math.inf)  # at 25 it may differ more
    assert "3.00 to 3.30 over 2 capacities, on machine 1, of 3 that were run" in spread.remark
    with pytest.raises(NotMeasured, match="no machine ran b and a at two capacities"):
        measured(on(1, "20", 30.0), on(2, "25", 90.0))


def test_runtime_is_that_of_one_repeat():
    rows = [served("a", [500.0, 1500.0 + 1000 * r], repeat=r) for r in (0, 1)]
    assert measure("runtime_s", pd.concat(rows), system="a").value == 2.5


def test_a_trace_that_was_not_served_whole_has_no_runtime():
    rows = served("a", [500.0, 1500.0])
    rows = pd.concat([rows.iloc[:1], failed(rows.iloc[1:], "oom", "out of memory")])
    with pytest.raises(NotMeasured, match="a never served 1 requests"):
        measure("runtime_s", rows, system="a")


def test_of_several_systems_the_best_is_compared_with():
    rows = pd.concat(
        [served(name, times) for name, times in
         (("a", [9.0, 9.0, 1.0]), ("b", [8.0, 8.0, 20.0]), ("djinn", [2.0, 2.0, 2.0]))]
    )  # fmt: skip
    median = measure("statistic_ratio", rows, system=["a", "b"], to="djinn", statistic="p50")
    assert (median.value, median.remark) == (4.0, "against b")
    mean = measure("statistic_ratio", rows, system=["a", "b", "c"], to="djinn", statistic="mean")
    assert mean.value == pytest.approx(19 / 6)
    assert mean.remark == "against a; not compared, as no machine ran it with djinn: c"
    assert mean.interval and mean.interval[0] <= mean.value <= mean.interval[1]
    with pytest.raises(NotMeasured, match="no rows of system 'c'"):
        measure("statistic_ratio", rows, system=["c", "d"], to="djinn", statistic="p50")


def test_the_cost_of_a_switch_leaves_out_first_touches_and_repetitions():
    models = ["x", "x", "y", "x", "y", "y"]  # switches back: requests 3 and 4
    fast = served("djinn", [9.0] * 6, model=models, switch_ms=[90, 1, 80, 2.0, 4.0, 3])
    slow = served("slow", [900.0] * 6, model=models, switch_ms=[0, 0, 0, 30.0, 60.0, 0])
    slower = served("slower", [900.0] * 6, model=models, switch_ms=[0, 0, 0, 90.0, 60.0, 0])
    rows = pd.concat([fast, slow, slower, fast.assign(repeat=1)])
    cost = measure("switch_cost_ratio", rows, system=["slower", "slow", "none"], to="djinn")
    assert (cost.value, cost.n) == (15.0, 2)
    assert cost.remark == (
        "slow: 45.0 ms, djinn: 3.00 ms; not compared, as no machine ran it with djinn: none"
    )
    broken = failed(fast.iloc[[2]], "oom", "out of memory")
    rows = pd.concat([fast.iloc[:2], broken, fast.iloc[3:], slow])  # failed, yet asked for
    assert measure("switch_cost_ratio", rows, system="slow", to="djinn").value == 15.0
    with pytest.raises(NotMeasured, match="changes back"):
        measure("switch_cost_ratio", rows[rows["request"] < 3], system="slow", to="djinn")


def test_of_several_systems_the_lowest_ratio_of_switches_counts():
    """The one with the cheapest switch may have served only those that are cheap in both."""
    models = ["x", "y", "x", "y"]  # switches back: requests 2 and 3
    djinn = served("djinn", [9.0] * 4, model=models, switch_ms=[0, 0, 1.0, 10.0])
    a = served("a", [900.0] * 4, model=models, switch_ms=[0, 0, 20.0, 0])
    b = served("b", [900.0] * 4, model=models, switch_ms=[0, 0, 0, 30.0])
    late, early = (failed(rows, "oom", "out of memory") for rows in (a.iloc[3:], b.iloc[2:3]))
    rows = pd.concat([djinn, a.iloc[:3], late, b.iloc[:2], early, b.iloc[3:]])
    cost = measure("switch_cost_ratio", rows, system=["a", "b"], to="djinn")
    assert cost.value == 3.0 and cost.remark.startswith("b: 30.0 ms")


def test_the_maximum_is_compared_with_the_least_of_all_baselines():
    rows = [served("djinn", [1.0, 6.0]), served("djinn_whole", [1.0, 1.0])]
    rows += [served("b", [1.0, 9.0]), served("c", [3.0, 4.0])]
    least = measure("maximum_to_least", pd.concat(rows), system="djinn")
    assert (least.value, least.n, least.interval) == (1.5, 2, None)
    assert least.remark == "against c, the nearest of 2 baselines, each on its machine"
    with pytest.raises(NotMeasured, match="no baseline served"):
        measure("maximum_to_least", pd.concat(rows[:2]), system="djinn")


def test_the_maximum_is_judged_by_the_worst_repeat_of_any_baseline():
    """The nearest baseline is slower in every repeat, another one is faster in one."""
    rows = [served("djinn", [1.0, 8.0], repeat=k) for k in (0, 1)]
    rows += [served("near", [1.0, 9.0], repeat=k) for k in (0, 1)]
    rows += [served("far", [1.0, ms], repeat=k) for k, ms in enumerate((5.0, 20.0))]
    found = measure("maximum_to_least", pd.concat(rows), system="djinn")
    assert (found.value, found.span) == (pytest.approx(8 / 9), (pytest.approx(8 / 9), 8 / 5))


def test_maxima_are_of_the_requests_that_both_served():
    """A system that failed its slowest request is not faster for it."""
    slow = served("slow", [2.0, 3.0, 90.0])
    slow = pd.concat([slow.iloc[:2], failed(slow.iloc[2:], "oom", "out of memory")])
    rows = pd.concat([slow, served("fast", [1.0, 1.5, 30.0])])
    for statistic in ("max", "p99"):
        found = measure("statistic_ratio", rows, system="slow", to="fast", statistic=statistic)
        assert (found.value, found.span, found.n) == (2.0, (2.0, 2.0), 2)
    apart = pd.concat([slow.iloc[2:], served("fast", [1.0, 1.5]), served("slow", [1.0] * 4)[3:]])
    with pytest.raises(NotMeasured, match="no request was served by both slow and fast"):
        measure("statistic_ratio", apart, system="slow", to="fast", statistic="p50")


def test_no_verdict_rests_on_a_single_request():
    rows = pd.concat([served("a", [9.0]), served("b", [2.0])])
    claim = claim_of({"low": 2, "unit": "x"}, metric="median_ratio",
                     arguments={"system": "a", "to": "b"})  # fmt: skip
    (verdict,) = judge([claim], run_of(rows))
    assert (verdict.measured, verdict.n, verdict.verdict) == (4.5, 1, "unresolved")


def test_bytes_at_the_worst_capacity():
    rows = pd.concat([cell_rows("djinn", label) for label in ("20", "25", "40")])
    worst = measure("worst_bytes_to_optimum", rows, system="djinn")
    each = [
        measure("bytes_to_optimum", rows, system="djinn", capacity_label=label).value
        for label in ("20", "25", "40")
    ]
    assert worst.value == max(each)
    assert worst.remark.count(" at ") == 3 and worst.n == 30
    with pytest.raises(NotMeasured, match=r"rows of one capacity only \(25\)"):
        measure("worst_bytes_to_optimum", cell_rows("djinn"), system="djinn")


def test_shares_are_of_all_requests_that_were_sent():
    """A failed request has loaded nothing and switched in no time, and is no hit."""
    rows = served("a", [5.0] * 4, loaded_bytes=[0, 7, 0, 0], switch_ms=[0.1, 50.0, 0.1, 0.1])
    rows = pd.concat([rows.iloc[:3], failed(rows.iloc[3:], "oom", "out of memory")])
    measured = measure("zero_load_share", rows, system="a")
    assert (measured.value, measured.n, measured.remark) == (0.5, 4, "2 of 4 requests")
    assert measured.interval is None and measured.judged == (0.5, 0.5)
    assert measure("switch_share", rows, system="a", low_ms=0, high_ms=10).value == 0.5
    classes = [[0, 10, 0.5], [10, 100, 0.25]]
    assert measure("switch_distance", rows, system="a", classes=classes).value == 0.0


def test_a_count_that_differs_between_repeats_is_judged_by_all_of_them():
    rows = served("a", [5.0] * 4, loaded_bytes=[0, 7, 0, 0])
    rows = pd.concat([rows, rows.assign(repeat=1, loaded_bytes=0)])
    measured = measure("zero_load_share", rows, system="a")
    assert (measured.value, measured.n, measured.span) == (0.875, 4, (0.75, 1.0))
    assert measured.remark == "3.5 of 4 requests; 75% to 100% in the repeats"
    (verdict,) = judge([claim_of({"low": 0.9}, arguments={"system": "a"})], run_of(rows))
    assert verdict.verdict == "unresolved"


def test_completed_and_failed_shares():
    rows = cell_rows("vllm_recreate")
    failures = measure("failure_share", rows, system="vllm_recreate")
    assert failures.value == pytest.approx(8 / 30) and failures.remark == "8 of 30 attempts failed"
    complete = measure("completion_share", rows, system="vllm_recreate")
    assert complete.value == pytest.approx(22 / 30) and complete.remark == "22 of 30 attempts"
    everything = measure(
        "completion_share", run_rows(), system=None, trace=None, capacity_label=None
    )
    assert everything.n == 30 and everything.remark.endswith("of 630 attempts")  # not vllm_sleep
    assert everything.value == pytest.approx(1 - 8 / (21 * 30))


def test_capacity_and_size():
    gpu = run_of(cell_rows("djinn"))
    assert METRICS["total_gib"](gpu).value == pytest.approx(TOTAL_BYTES / 2**30)
    with pytest.raises(NotMeasured, match="small models stand for"):
        METRICS["total_gib"](replace(gpu, machine=MACHINE))
    share = METRICS["capacity_share"](gpu, capacity_label="25")
    assert share.value == pytest.approx(25 / 31.3, abs=1e-6) and share.n == 3
    with pytest.raises(NotMeasured, match="no rows of"):
        METRICS["capacity_share"](gpu, capacity_label="20")


def test_popularity():
    run = run_of(cell_rows("djinn"))
    assert METRICS["popularity_ratio"](run, trace="paper").value == 1.0  # 40/40/20
    traces = {"zipf": zipf_trace(5, 1.0, ["a", "b"], 1, 1.0)}
    for name in ("zipf", "paper"):
        with pytest.raises(NotMeasured, match=f"no trace '{name}' with known probabilities"):
            METRICS["popularity_ratio"](replace(run, traces=traces), trace=name)


def test_bytes_against_the_optimum_and_against_another():
    rows = pd.concat([cell_rows("djinn", repeats=2), cell_rows("pytorch_lru")])
    to_optimum = measure("bytes_to_optimum", rows, system="djinn", capacity_label="25")
    assert 1.0 < to_optimum.value < 1.1 and to_optimum.n == 30
    whole = measure("bytes_to_optimum", rows, system="pytorch_lru", capacity_label="25")
    ratio = measure("bytes_ratio", rows, system="djinn", to="pytorch_lru")
    assert ratio.value == pytest.approx(to_optimum.value / whole.value) and ratio.n == 30
    assert ratio.value < 0.5
    own = rows["system"] == "djinn"
    late = own & (rows["repeat"] == rows.loc[own, "repeat"].max()) & (rows["request"] > 20)
    broken = pd.concat([rows[~late], failed(rows[late], "oom", "out of memory")])
    with pytest.raises(NotMeasured, match="djinn did not serve all of 'paper'"):
        measure("bytes_to_optimum", broken, system="djinn", capacity_label="25")
    no_traces = replace(run_of(rows), traces={})
    with pytest.raises(NotMeasured, match="no trace 'paper'"):
        METRICS["bytes_to_optimum"](no_traces, system="djinn", capacity_label="25")


def test_bytes_are_compared_for_the_requests_that_both_served():
    """A system does not load less because it failed."""
    a = served("a", [5.0] * 3, loaded_bytes=[4, 4, 90])
    a = pd.concat([a.iloc[:2], failed(a.iloc[2:], "oom", "out of memory")])
    rows = pd.concat([a, served("b", [5.0] * 3, loaded_bytes=[2, 2, 50])])
    found = measure("bytes_ratio", rows, system="a", to="b")
    assert (found.value, found.n) == (2.0, 2)


def test_bytes_written_back():
    rows = pd.concat([cell_rows("djinn"), cell_rows("djinn", "20"), cell_rows("pytorch_pinned")])
    nothing = measure("writeback_bytes", rows, system="djinn")
    assert (nothing.value, nothing.n) == (0.0, 30)
    back = measure("writeback_bytes", rows, system="pytorch_pinned")
    assert back.value == sum(SIZES[model] for model in cell_rows("djinn")["model"])
    elsewhere = {"mode": "concurrent", "start": "warm"}
    for column, value in elsewhere.items():
        other = served("djinn", [5.0], writeback_bytes=[7]).assign(**{column: value})
        assert measure("writeback_bytes", pd.concat([rows, other]), system="djinn").value == 7


def test_hits_from_the_papers_start_are_the_papers():
    """Computed: 16 of 30 where two large models do not fit together, all where everything does."""
    rows = pd.concat([cell_rows("djinn", label) for label in CAPACITIES])
    for label, cold, warm in (("20", 15, 16), ("25", 15, 16), ("32", 27, 30), ("40", 27, 30)):
        for start, hits in (("cold", cold), ("warm", warm)):
            found = measure("computed_hit_share", rows, capacity_label=label, eviction="models",
                            start=start)  # fmt: skip
            assert found.value == pytest.approx(hits / 30) and "not measured" in found.remark


def test_the_distance_of_distributions():
    rows = served("a", [9e4] * 4, switch_ms=[1.0, 2000.0, 5000.0, 20_000.0])
    classes = [[0, 10, 0.25], [1000, 4000, 0.5], [10_000, math.inf, 0.25]]
    found = measure("switch_distance", rows, system="a", classes=classes)
    assert found.value == 0.25 and found.remark.startswith("25%, 25%, 25%, 25%")
    same = rows.assign(switch_ms=[1.0, 2000.0, 3000.0, 20_000.0])
    assert measure("switch_distance", same, system="a", classes=classes).value == 0.0
    apart = rows.assign(switch_ms=500.0)
    assert measure("switch_distance", apart, system="a", classes=classes).value == 1.0
    both = pd.concat([same, apart.assign(repeat=1)])
    assert measure("switch_distance", both, system="a", classes=classes).span == (0.0, 1.0)


def test_the_first_request_for_a_model_may_be_the_slowest():
    rows = pd.concat([served("a", [1.0, 9.0, 2.0], model=[*"xyy"], repeat=0),
                      served("a", [9.5, 9.0, 2.0], model=[*"xyy"], repeat=1)])  # fmt: skip
    found = measure("first_request_share", rows, system="a", model="y")
    assert (found.value, found.judged) == (0.5, (0.0, 1.0))
    with pytest.raises(NotMeasured, match="no request for z"):
        measure("first_request_share", rows, system="a", model="z")


def test_the_highest_rate_is_the_last_before_requests_are_late():
    def at(rate: float, late: int, n: int = 60) -> pd.DataFrame:
        times = [100.0] * (n - late) + [9000.0] * late
        where = {"trace": f"load_{rate:g}", "mode": "concurrent", "run_id": f"a{rate}"}
        parts = [served("a", times[k : k + 30], **where).assign(request=range(k, min(k + 30, n)))
                 for k in range(0, n, 30)]  # fmt: skip
        return pd.concat(parts)

    def highest(*rows: pd.DataFrame, system: str = "a") -> Measurement:
        traces = {f"load_{rate}": zipf_trace(30, 1.0, ["x", "y"], 1, rate) for rate in (1, 2, 4, 8)}
        run = replace(run_of(pd.concat(rows)), traces=traces)
        return METRICS["highest_rate"](run, system=system, target_ms=2000)

    found = highest(at(1, 0), at(2, 0), at(4, 40), at(8, 0, n=20))
    assert (found.value, found.n, found.span) == (2.0, 60, (2.0, 2.0))  # n: those at 2/s
    assert found.remark == "100% at 1/s, 100% at 2/s, 33% at 4/s, 100% at 8/s"
    with pytest.raises(NotMeasured, match="b got no requests at given rates"):
        highest(at(1, 0), system="b")
    unsure = highest(at(1, 0), at(2, 6), at(4, 40), at(8, 0))
    assert unsure.judged == (1.0, 2.0)  # 90% of 60 requests: the interval crosses 90%
    few = highest(at(1, 0, n=20))
    assert (few.value, few.judged) == (1.0, (0.0, 1.0))  # 20 of 20 can be by chance: 83% or more
    late = highest(at(1, 20, n=20), at(2, 60))
    assert (late.value, late.n, late.judged) == (0.0, 20, (0.0, 0.0))


def test_rows_of_engines_that_were_fed_one_by_one_are_not_compared():
    rows = [served(name, [5.0] * 3, mode="concurrent") for name in ("vllm_sleep", "djinn")]
    with pytest.raises(NotMeasured, match="vllm_sleep could not batch"):
        measure("completion_share", pd.concat(rows), system="vllm_sleep", mode="concurrent")
    run = run_of(pd.concat(rows))
    batched = {**run.manifests["vllm_sleep"], "batches": True}
    run = replace(run, manifests={**run.manifests, "vllm_sleep": batched})
    measured = METRICS["completion_share"](run, system="vllm_sleep", mode="concurrent")
    assert measured.value == 1.0


def test_token_agreement():
    same = pd.concat([served(s, [5.0] * 4, token_sha=list("wxyz")) for s in "ab"])
    agreed = measure("token_agreement", same)
    assert (agreed.value, agreed.n, agreed.remark) == (1.0, 4, "2 systems, 4 different requests")
    other = served("c", [5.0] * 4, token_sha=list("wxy?"))
    assert measure("token_agreement", pd.concat([same, other])).value == 0.75
    faster = pd.concat([same, other.assign(system="vllm_c")])  # other steps than transformers'
    assert measure("token_agreement", faster).value == 1.0
    crashed = failed(served("c", [5.0] * 4), "oom", "out of memory")
    assert measure("token_agreement", pd.concat([same, crashed])).value == 1.0
    with pytest.raises(NotMeasured, match="fewer than two systems"):
        measure("token_agreement", same[same["system"] == "a"])


def test_token_agreement_of_one_system():
    rows = [
        served("ours", [5.0] * 4, token_sha=list("wxy?")),
        served("a", [5.0] * 4, token_sha=list("wxyz")),
        served("b", [5.0] * 4, token_sha=list("w?yz")),
    ]
    found = measure("token_agreement_of", pd.concat(rows), system="ours")
    assert (found.value, found.n, found.interval) == (0.5, 4, None)
    assert found.remark == "2 of 4 requests, 2 other systems"
    again = served("ours", [5.0] * 4, token_sha=list("?xy?")).assign(repeat=1)
    found = measure("token_agreement_of", pd.concat([*rows, again]), system="ours")
    assert found.value == 0.25  # the same in every repeat
    short = [rows[0], rows[1].iloc[:2], rows[2].assign(system="vllm_b")]
    found = measure("token_agreement_of", pd.concat(short), system="ours")
    assert (found.value, found.n) == (1.0, 2)  # vLLM's steps are not transformers'
    with pytest.raises(NotMeasured, match="no other system with transformers' own steps"):
        measure("token_agreement_of", rows[0], system="ours")


def test_token_repeatability():
    once = served("a", [5.0] * 4, token_sha=list("wxyz"))
    with pytest.raises(NotMeasured, match="no request twice"):
        measure("token_repeatability", once, system="a")
    again = once.assign(repeat=1)
    beside = served("b", [5.0] * 4, token_sha=list("????"))
    found = measure("token_repeatability", pd.concat([once, again, beside]), system="a")
    assert (found.value, found.n, found.remark) == (1.0, 4, "4 different requests, 8 served")
    for elsewhere in ({"capacity_label": "20"}, {"start": "warm"}):
        other = once.assign(token_sha=list("wx?z"), **elsewhere)
        found = measure("token_repeatability", pd.concat([once, again, other]), system="a")
        assert (found.value, found.n) == (0.75, 4)


def test_tokens_are_repeated_on_one_machine():
    """Each machine tunes its kernels, which may round otherwise."""
    rows, manifests = [], {}
    for machine, tokens in enumerate(["wxyz", "wx?z"]):
        cell = served("a", [5.0] * 4, token_sha=list(tokens), run_id=str(machine))
        rows += [cell, cell.assign(repeat=1)]
        manifests[str(machine)] = {
            **next(iter(run_of(cell).manifests.values())), "run_id": str(machine),
            "gpu_uuid": f"GPU-{machine}",
        }  # fmt: skip
    run = replace(run_of(pd.concat(rows)), manifests=manifests)
    found = METRICS["token_repeatability"](run, system="a")
    assert (found.value, found.n) == (1.0, 4)
    assert found.remark.endswith("16 served; on 2 machines, which differ in 1 of 4 requests")
    older = replace(run, rows=pd.concat(rows[:2]), replicates=pd.concat(rows[2:]))
    assert METRICS["token_repeatability"](older, system="a") == found  # replicates count
    rows[1]["token_sha"] = list("wxy?")
    found = METRICS["token_repeatability"](replace(run, rows=pd.concat(rows)), system="a")
    assert found.value == 0.75 and "which differ in 1 of 4 requests" in found.remark


def test_token_agreement_lead():
    rows = pd.concat(
        [
            served("plain", [5.0] * 4, token_sha=list("wxyz")),
            served("ours", [5.0] * 4, token_sha=list("wxy?")),
            served("ours", [5.0] * 4, token_sha=list("wxy?")).assign(repeat=1),  # not counted twice
            served("theirs", [5.0] * 4, token_sha=list("wx??")),
        ]
    )
    asked = {"system": "ours", "to": "theirs", "reference": "plain"}
    found = measure("token_agreement_lead", rows, **asked)
    assert (found.value, found.n) == (0.25, 4)
    assert found.interval and found.interval[0] <= 0.25 < found.interval[1]
    assert found.remark == "ours 75%, theirs 50% of the requests have the tokens of plain"
    nobody = rows[(rows["system"] != "theirs") | (rows["request"] > 3)]
    with pytest.raises(NotMeasured, match="no rows of system 'theirs'"):
        measure("token_agreement_lead", nobody, **asked)


ABSENT = {
    "system": "a", "to": "b", "baseline": "b", "reference": "c", "model": "b", "statistic": "p50",
    "capacity_label": "33", "eviction": "models", "low_ms": 0, "classes": [[0, 10, 1.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted(METRICS.keys() - {"total_gib", "popularity_ratio", "model_gib", "highest_rate"})
)
def test_what_was_not_run_is_not_measured(name):
    _, *parameters = inspect.signature(METRICS[name]).parameters.values()
    arguments = {p.name: ABSENT[p.name] for p in parameters if p.name in ABSENT}
    with pytest.raises(NotMeasured, match=r"no rows of .*('[ab]'|'33')|fewer than two|no base"):
        measure(name, cell_rows("djinn"), **arguments)


def test_a_system_that_served_nothing_is_not_timed_but_counted():
    rows = failed(served("a", [5.0] * 3), "oom", "out of memory")
    with pytest.raises(NotMeasured, match="a served no request: out of memory"):
        measure("latency", rows, system="a", statistic="p50")
    assert measure("failure_share", rows, system="a").value == 1.0


# -- verdicts --------------------------------------------------------------------------------


def expect(**fields: Any) -> Expected:
    return Expected.model_validate({"unit": "x", "better": "higher", **fields})


@pytest.mark.parametrize(
    ("expected", "tolerance", "measured", "judgement"),
    [
        (expect(value=10), 0.1, 9.0, "reproduced"),
        (expect(value=10), 0.1, 8.99, "not reproduced"),
        (expect(value=10), 0.1, 11.01, "exceeded"),
        (expect(value=10, better="lower"), 0.1, 8.99, "exceeded"),
        (expect(value=10, better="lower"), 0.1, 11.01, "not reproduced"),
        (expect(value=10, better="equal"), 0.1, 11.01, "not reproduced"),
        (expect(value=0, better="equal"), 0.5, 0.001, "not reproduced"),
        (expect(value=-10), 0.1, -11.1, "not reproduced"),
        (expect(low=3.07, high=3.13), 0.0, 3.13, "reproduced"),
        (expect(low=3.07, high=3.13), 0.0, 3.14, "exceeded"),
        (expect(low=3.07, high=3.13), 0.05, 2.95, "reproduced"),
        (expect(high=1.1, better="lower"), 0.0, 1.1, "reproduced"),
        (expect(high=1.1, better="lower"), 0.0, 1.1001, "not reproduced"),
        (expect(low=1.2), 0.0, 1.2, "reproduced"),
    ],
    ids=str,
)
def test_comparing(expected, tolerance, measured, judgement):
    assert compare((measured, measured), expected, tolerance)[0] == judgement


@pytest.mark.parametrize(
    ("expected", "tolerance", "measured", "judgement"),
    [
        (expect(low=10), 0.0, (9.9, 30), "unresolved"),
        (expect(low=10), 0.0, (10.1, 30), "reproduced"),
        (expect(high=10, better="lower"), 0.0, (1, 10.1), "unresolved"),
        (expect(high=10, better="lower"), 0.0, (10.1, 12), "not reproduced"),
        (expect(value=10), 0.1, (9.5, 20), "reproduced"),  # all of it on the good side
        (expect(value=10), 0.1, (11.5, 20), "exceeded"),
        (expect(value=10), 0.1, (8, 20), "unresolved"),
        (expect(value=10, better="lower"), 0.1, (1, 11.5), "unresolved"),
        (expect(value=10, better="equal"), 0.1, (9.5, 11.5), "unresolved"),
        (expect(value=10, better="equal"), 0.1, (11.5, 12), "not reproduced"),
    ],
    ids=str,
)
def test_the_whole_interval_is_compared(expected, tolerance, measured, judgement):
    assert compare(measured, expected, tolerance)[0] == judgement


def test_a_verdict_on_counts_is_given_on_any_machine():
    rows = served("djinn", [5.0] * 4, loaded_bytes=[0, 7, 0, 0])
    for machine in (MACHINE, GPU_MACHINE):
        (verdict,) = judge([claim_of({"value": 0.5})], run_of(rows, machine))
        assert (verdict.verdict, verdict.measured, verdict.n) == ("exceeded", 0.75, 4)
        assert verdict.why == "better than expected (more); 3 of 4 requests"
        assert (verdict.low, verdict.high) == (None, None)


def test_a_verdict_on_times_is_given_on_a_gpu_only():
    claim = claim_of({"value": 5, "unit": "ms"}, metric="latency",
                     arguments={"system": "djinn", "statistic": "p50"})  # fmt: skip
    rows = served("djinn", [5.0] * 4)
    (on_gpu,) = judge([claim], run_of(rows))
    assert (on_gpu.verdict, on_gpu.measured) == ("reproduced", 5.0)
    (on_cpu,) = judge([claim], run_of(rows, MACHINE))
    assert (on_cpu.verdict, on_cpu.why) == ("not judged", CPU_CLOCKS)
    assert (on_cpu.measured, on_cpu.low, on_cpu.high, on_cpu.n) == (5.0, 5.0, 5.0, 4)


def test_an_unavailable_system_is_not_judged_and_its_row_says_why():
    claim = claim_of({"value": 0.5}, arguments={"system": "vllm_sleep"})
    (verdict,) = judge([claim], run_of(cell_rows("vllm_sleep")))
    assert verdict.verdict == "not judged"
    assert verdict.why == "sleep mode needs CUDA, and this machine has no GPU"
    assert (verdict.measured, verdict.low, verdict.high, verdict.n) == (None, None, None, 0)


@pytest.fixture(scope="module")
def verdicts(claims) -> list[Verdict]:
    """Of rows as from a GPU, on a machine without one."""
    return judge(claims, run_of(run_rows(gpu=True), MACHINE))


def test_a_whole_run_is_judged(claims, verdicts):
    on_gpu = {v.id: v for v in judge(claims, run_of(run_rows(gpu=True)))}
    on_cpu = {v.id: v for v in verdicts}
    assert list(on_gpu) == list(on_cpu) == [claim.id for claim in claims]
    for name, verdict in {
        "paper-vllm-fails": "reproduced",
        "paper-zipfian": "not reproduced",
        "paper-p50-djinn": "exceeded",
        "ours-near-optimal": "reproduced",
        "ours-switch-vs-sleep": "unresolved",  # few switches, wide interval
    }.items():
        assert on_gpu[name].verdict == verdict, name
    withdrawn = {claim.id for claim in claims if claim.withdrawn}
    assert all(judged[i].verdict == "withdrawn" for judged in (on_gpu, on_cpu) for i in withdrawn)
    unmeasured = {i for i in on_gpu if on_gpu[i].verdict == "not judged"}  # not in these rows
    assert len(unmeasured) < 0.7 * len(claims)
    assert all(on_gpu[i].measured is None and on_gpu[i].why for i in unmeasured)
    timed = {claim.id for claim in claims if claim.metric in TIMED} - unmeasured - withdrawn
    assert all(on_cpu[i].verdict == "not judged" for i in timed)
    assert all(on_cpu[i].measured == on_gpu[i].measured is not None for i in timed)
    counted = on_cpu.keys() - timed - {"paper-total-size"}
    assert all(on_cpu[i].verdict == on_gpu[i].verdict for i in counted)


# -- what is written -------------------------------------------------------------------------

VERDICT = Verdict(
    id="a-claim", source="paper", quote="a | b", expected="53%", measured=0.5, low=0.3,
    high=0.7, n=30, verdict="reproduced", why="as expected", unit="share", notebook="04_figures",
    figure=None,
)  # fmt: skip
NOTHING = replace(
    VERDICT, id="another", measured=None, low=None, high=None, n=0, verdict="not judged", why="no"
)


def test_verdicts_come_back_from_their_file(tmp_path, claims, verdicts):
    path = tmp_path / "run" / "claims.json"
    write_claims(verdicts, path)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    assert read_claims(path) == verdicts
    assert [file.name for file in path.parent.iterdir()] == ["claims.json"]
    counts = verdict_counts(verdicts)
    assert counts.loc["all", "all"] == len(verdicts)
    assert counts.loc["withdrawn", "all"] == sum(claim.withdrawn is not None for claim in claims)


@pytest.mark.parametrize("content", [None, "", "[", '[{"id": "x"}]'])
def test_verdicts_that_cannot_be_read_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "claims.json").write_text(content)
    with pytest.raises(RecordError, match="run notebook 05_claims again"):
        read_claims(tmp_path / "claims.json")


def test_the_table_for_people():
    table = claims_table([VERDICT, NOTHING, replace(VERDICT, id="exact", low=None, high=None)])
    assert list(table.index) == ["a-claim", "another", "exact"]
    row = table.loc["a-claim"]
    assert (row["measured"], row["95% interval"], row["n"]) == ("50%", "30% to 70%", 30)
    assert list(table["verdict"]) == ["reproduced", "not judged", "reproduced"]
    assert list(table["measured"]) == ["50%", "", "50%"]
    assert list(table["95% interval"]) == ["30% to 70%", "", ""]
    assert list(claims_table([VERDICT, NOTHING], "not judged").index) == ["another"]
    assert claims_table([VERDICT], "withdrawn").empty
    assert colored(table).to_html().count(">not judged<") == 1


def beside(rows: pd.DataFrame, **columns: Any) -> pd.DataFrame:
    """The same rows as if their requests had been sent as they arrived."""
    return rows.assign(mode="concurrent", **columns)


def test_what_is_exposed_counts_no_first_touch():
    rows = beside(cell_rows("djinn"))
    first = rows["request"].isin(rows.groupby("model").request.min())
    rows.loc[first, "switch_ms"] = 500.0
    rows.loc[~first, "switch_ms"] = 3.0
    run = run_of(pd.concat([cell_rows("djinn"), rows]))
    found = METRICS["exposed_switch_ms"](run, system="djinn", mode="concurrent")
    assert (found.value, found.n) == (3.0, 27)
    with pytest.raises(NotMeasured, match="'concurrent'"):
        METRICS["exposed_switch_ms"](run_of(cell_rows("djinn")), system="djinn", mode="concurrent")


def test_tokens_beside_others_are_compared_with_those_alone():
    alone, together = cell_rows("djinn"), beside(cell_rows("djinn"))
    metric = METRICS["token_agreement_when_concurrent"]
    assert metric(run_of(pd.concat([alone, together])), system="djinn").value == 1.0
    together.loc[together["request"] == 4, "token_sha"] = "other"
    found = metric(run_of(pd.concat([alone, together])), system="djinn")
    assert found.value == pytest.approx(29 / 30)
    with pytest.raises(NotMeasured):
        metric(run_of(alone), system="djinn")


def test_a_ratio_is_that_of_the_newest_machine_that_ran_both():
    def measured_on(system: str, machine: int, total_ms: float) -> pd.DataFrame:
        return served(system, [total_ms] * 8, run_id=f"{system}{machine}")

    def run(rows: list[pd.DataFrame], again: list[pd.DataFrame]) -> Run:
        """A run whose run ids end in the number of a machine."""
        made, kept = run_of(pd.concat(rows)), run_of(pd.concat(again)) if again else None
        manifests, more = ({
            run_id: {**m, "machine": {**GPU_MACHINE, "eager_operator_us": int(run_id[-1])},
                     "started_at_utc": f"2026-11-2{run_id[-1]}"}
            for run_id, m in (of.manifests.items() if of else ())
        } for of in (made, kept))  # fmt: skip
        more_rows = kept.rows if kept else made.rows.iloc[:0]
        return replace(made, manifests=manifests, replicates=more_rows, replicate_manifests=more)

    newest = [measured_on("a", 2, 20.0), measured_on("b", 1, 30.0)]
    again = [measured_on("a", 1, 10.0), measured_on("b", 2, 50.0)]
    for replicates, ratio, where in (
        (again[:1], 3.0, "on machine 1"),
        (again, 2.5, "on machine 2"),
    ):
        found = METRICS["median_ratio"](run(newest, replicates), system="b", to="a")
        assert (found.value, found.n, found.remark) == (ratio, 8, where)
    with pytest.raises(NotMeasured, match=r"no machine ran all of b, a: on the machines 1 and 2"):
        METRICS["median_ratio"](run(newest, []), system="b", to="a")
    switches = METRICS["switch_cost_ratio"](run(newest, again), system="b", to="a")
    assert switches.remark.endswith("on machine 2") and switches.value == 1.0


def test_concurrent_rows_never_mix_into_sequential_ones():
    systems = ("djinn", "pytorch_lru", "pytorch_pinned")
    rows = pd.concat([*map(cell_rows, systems), cell_rows("djinn", "20")])
    late = cell_rows("djinn").assign(mode="concurrent", total_ms=1e6, loaded_bytes=7, token_sha="?")
    for name, arguments in {
        "latency": {"system": "djinn", "statistic": "max"},
        "switch_cost_ratio": {"system": "pytorch_lru", "to": "djinn"},
        "maximum_to_least": {"system": "djinn"},
        "bytes_to_optimum": {"system": "djinn", "capacity_label": "25"},
        "worst_bytes_to_optimum": {"system": "djinn"},
        "token_agreement": {},
        "token_agreement_of": {"system": "djinn"},
    }.items():
        alone = measure(name, rows, **arguments)
        assert measure(name, pd.concat([rows, late]), **arguments) == alone, name
