"""What headline comparisons rest on: the sentences follow the rows, and say what is unfair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from row_factory import SIZES, cell_rows
from run_factory import GPU_MACHINE, on_another_machine, write_run

from djinn_lib.analysis.claims import judge, load_claims
from djinn_lib.analysis.comparisons import fairness, gain, like_for_like, other_tokens
from djinn_lib.analysis.explanations import explanations
from djinn_lib.analysis.run import Run, load_run, published
from djinn_lib.rows import no_rows

PAPER = published()


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("gpu"), gpu=True))


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("cpu")))


def median_ms(system: str) -> float:
    return cell_rows(system, gpu=True)["total_ms"].median()


def changed(run: Run, system: str, **columns: object) -> Run:
    """The run with columns of one system's main cell set."""
    rows = run.rows.copy()
    own = (rows["system"] == system) & (rows["capacity_label"] == "25")
    for name, values in columns.items():
        rows.loc[own, name] = values
    return replace(run, rows=rows)


# -- sleep mode ------------------------------------------------------------------------------


def test_sleep_mode_is_compared_by_rows(gpu: Run):
    said = fairness(gpu, PAPER)
    ratio = median_ms("vllm_sleep") / median_ms("djinn")
    assert f"{ratio:.2f}x (median)" in said and "13.1x" in said
    assert f"In vLLM 0.24.0 the median with it is {median_ms('vllm_sleep'):,.0f} ms" in said
    assert "the fair comparison is with sleep mode" in said


def test_the_same_sentences_follow_other_rows(gpu: Run):
    said = fairness(changed(gpu, "vllm_recreate", total_ms=400.0), PAPER)
    assert "no unfair stand-in" in said


def test_each_statistic_is_compared_with_the_form_that_is_best_in_it(gpu: Run):
    djinn = cell_rows("djinn", gpu=True)["total_ms"]
    slow_at_times = [100.0] * 27 + [9000.0] * 3
    run = changed(gpu, "vllm_sleep", total_ms=slow_at_times)
    run = changed(run, "vllm_sleep_naive", total_ms=[800.0] * 30)
    said = fairness(run, PAPER)
    assert f"{100 / djinn.median():.2f}x (median)" in said
    assert f"{800 / djinn.mean():.2f}x (mean)" in said
    assert f"{800 / djinn.quantile(0.9):.2f}x (P90)" in said
    assert f"{800 / djinn.max():.2f}x (max)" in said
    listed = {claim.id: claim for claim in load_claims()}
    of_claims = judge([listed[f"ours-{name}-vs-sleep"] for name in ("p50", "mean", "p90")],
                      run.evidence)  # fmt: skip
    for verdict, label in zip(of_claims, ("median", "mean", "P90"), strict=True):
        assert f"{verdict.measured:.2f}x ({label})" in said  # one thing, one number


def test_what_favours_djinn_is_said(gpu: Run):
    assert "copies the weights back" not in fairness(gpu, PAPER)  # made-up rows copy nothing back
    run = changed(gpu, "vllm_sleep", writeback_bytes=60_000_000, switch_ms=30.0)
    said = fairness(run, PAPER)
    assert "takes 10 ms of its mean switch of 30 ms" in said  # at 6 GB/s
    assert "a sleep mode without it was not measured" in said
    one, other = sorted(SIZES.values())[-2:]
    missing = one + other - int(run.cells("paper", "25")["capacity_bytes"].iloc[0])
    assert f"miss fitting together by {missing / 2**30:.2f} GiB" in said
    swept = cell_rows("vllm_sleep", "40", gpu=True)
    swept = replace(run, rows=pd.concat([run.rows, swept], ignore_index=True))
    assert "miss fitting" not in fairness(swept, PAPER)


def test_systems_are_compared_on_a_machine_that_ran_both(gpu: Run):
    elsewhere = on_another_machine(gpu, "djinn", total_ms=lambda ms: ms / 2)
    assert fairness(elsewhere, PAPER) == fairness(gpu, PAPER)  # where vllm_sleep ran
    forgotten = replace(elsewhere, replicates=no_rows(), replicate_manifests={})
    assert fairness(forgotten, PAPER) != fairness(gpu, PAPER)


# -- like for like ---------------------------------------------------------------------------


def test_the_headline_is_judged_where_both_sides_decode_alike(gpu: Run):
    said = like_for_like(gpu, PAPER)
    assert said in explanations(gpu, PAPER)
    ratio = median_ms("pytorch_pinned") / median_ms("djinn_eager")
    assert f"median is {ratio:.2f}x lower" in said and "3.1x lower" in said
    assert said.startswith("**Is the paper's headline reproduced?** Yes, like for like.") == (
        ratio >= 4302 / 1392
    )
    slower = changed(gpu, "djinn_eager", total_ms=2 * median_ms("pytorch_pinned"))
    assert "0.50x lower" in like_for_like(slower, PAPER)
    assert "No, not like for like." in like_for_like(slower, PAPER)
    much_faster = changed(gpu, "djinn_eager", total_ms=median_ms("pytorch_pinned") / 4)
    assert "Yes, like for like." in like_for_like(much_faster, PAPER)


def test_the_gain_is_taken_apart(gpu: Run):
    said = gain(gpu, PAPER)
    assert said in explanations(gpu, PAPER)
    rows = {name: cell_rows(name, gpu=True) for name in ("djinn", "pytorch_pinned", "djinn_eager")}
    mean_ms = {name: part["total_ms"].mean() for name, part in rows.items()}
    switch_ms = {name: part["switch_ms"].mean() for name, part in rows.items()}
    gain_ms = mean_ms["pytorch_pinned"] - mean_ms["djinn"]
    assert f"takes {gain_ms:,.0f} ms less" in said
    share = (switch_ms["pytorch_pinned"] - switch_ms["djinn"]) / gain_ms
    assert f"So {share:.0%} of the gain is how weights move" in said
    assert f"{1 - share:.0%} of that gain is faster computing" in like_for_like(gpu, PAPER)
    eager = mean_ms["pytorch_pinned"] / mean_ms["djinn_eager"]
    assert f"{eager:.2f}x less than PyTorch pinned" in said
    assert "machine" not in said.partition("own steps")[2]
    slower = {**GPU_MACHINE, "eager_operator_us": 9.0}
    manifest = {**gpu.manifests["paper-25-djinn_eager"], "machine": slower}
    apart = replace(gpu, manifests={**gpu.manifests, "paper-25-djinn_eager": manifest})
    assert "decoded, on the machines 1 and 2, in" in gain(apart, PAPER)
    listed = [{"part": "monday", "machine": GPU_MACHINE}, {"part": "tuesday", "machine": slower}]
    named = replace(apart, listed_machines=listed)
    assert "decoded, on the machines monday and tuesday, in" in gain(named, PAPER)
    without = gpu.rows[gpu.rows["system"] != "djinn_eager"]
    assert "own steps" not in gain(replace(gpu, rows=without), PAPER)


# -- tokens ----------------------------------------------------------------------------------


def test_requests_with_other_tokens_are_counted(gpu: Run):
    said = other_tokens(gpu, PAPER)
    assert said in explanations(gpu, PAPER)
    assert "On the trace `paper` 0% of the requests (0 of 30) get other tokens from Djinn" in said
    assert "different repeats" not in said
    shas = cell_rows("djinn", gpu=True)["token_sha"].tolist()
    run = changed(gpu, "djinn", token_sha=["other"] * 13 + shas[13:])
    run = changed(run, "vllm_sleep", token_sha=["another"] * 15 + shas[15:])
    said = other_tokens(run, PAPER)
    assert "43% of the requests (13 of 30) get other tokens from Djinn" in said
    assert "and 50% (15 of 30) from vLLM's sleep mode" in said
    again = cell_rows("djinn_graph", gpu=True).assign(repeat=1)
    again.loc[:3, "token_sha"] = "changed"
    unsteady = replace(run, rows=pd.concat([run.rows, again], ignore_index=True))
    assert "`djinn_graph` gave 4 of 30 requests different tokens" in other_tokens(unsteady, PAPER)


def test_steps_of_transformers_give_their_tokens(cpu: Run):
    assert "Yes: on this machine" in other_tokens(cpu, PAPER)


def test_without_a_gpu_nothing_is_said_of_times(cpu: Run):
    assert "Nothing can be said here: sleep mode needs CUDA" in fairness(cpu, PAPER)
    assert "Nothing can be said here: no rows of system 'djinn_eager'" in like_for_like(cpu, PAPER)
    assert "Nothing can be said here: times on a shared CPU" in gain(cpu, PAPER)


def test_what_is_not_there_is_not_compared(gpu: Run):
    nothing = replace(gpu, rows=gpu.rows[gpu.rows["system"] == "pytorch_lru"])
    for tell in (fairness, like_for_like, other_tokens, gain):
        assert "Nothing can be said here: no rows of system" in tell(nothing, PAPER)
    no_vllm = replace(gpu, rows=gpu.rows[~gpu.rows["system"].str.startswith("vllm")])
    assert "no trace was served by djinn" in other_tokens(no_vllm, PAPER)


def test_the_folder_of_a_run_names_its_machines(tmp_path: Path):
    run = load_run(write_run(tmp_path / "alone", gpu=True))
    assert set(run.machine_names.values()) == {"1"} and not run.listed_machines
