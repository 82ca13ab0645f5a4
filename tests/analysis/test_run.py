from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from row_factory import SIZES, TOTAL_BYTES, cell_rows
from run_factory import GPU_MACHINE, on_another_machine, write_cell

from djinn_lib.analysis.claim_metrics import METRICS
from djinn_lib.analysis.plots.sensitivity import sensitivity
from djinn_lib.analysis.run import Run, load_run
from djinn_lib.analysis.selection import sweep
from djinn_lib.analysis.sweeps import hit_table, speedup_table, sweep_table
from djinn_lib.errors import RecordError
from djinn_lib.rows import no_rows


def test_sweep_is_of_systems_at_several_capacities(cpu: Run):
    assert set(sweep(cpu)["system"]) == {"djinn", "pytorch_lru", "pytorch_pinned"}
    alone = replace(cpu, rows=cpu.rows[cpu.rows["capacity_label"] == "25"])
    assert set(sweep(alone)["capacity_label"]) == {"25"}  # all of it


def test_sweep_keeps_a_baseline_that_was_run_at_one_capacity(cpu: Run):
    swept = cpu.rows["system"].str.startswith("pytorch_") & (cpu.rows["capacity_label"] != "25")
    run = replace(cpu, rows=cpu.rows[~swept])
    assert set(sweep(run)["system"]) == {"djinn", "pytorch_pinned"}
    assert set(sweep(run, baseline="pytorch_lru")["system"]) == {"djinn", "pytorch_lru"}
    gains = speedup_table(sweep(run), "pytorch_pinned")
    assert gains["capacity_label"].to_list() == ["25"]
    sensitivity(sweep(run), "pytorch_pinned")


def test_concurrent_rows_are_in_no_cell_or_sweep(cpu: Run):
    queued = cell_rows("djinn").assign(system="djinn_queue", mode="concurrent")
    both = replace(cpu, rows=pd.concat([cpu.rows, queued]))
    for rows, same in ((both.cells("paper", "25"), cpu.cells("paper", "25")),
                       (sweep(both), sweep(cpu))):  # fmt: skip
        assert rows.reset_index(drop=True).equals(same.reset_index(drop=True))
    assert len(both.concurrent_cells()) == 30 and cpu.concurrent_cells().empty


def test_cells_that_were_not_run_are_refused(cpu: Run):
    with pytest.raises(RecordError, match=r"capacity 99, got rows of .*\('paper', '20'\)"):
        cpu.cells("paper", "99")


def test_bounds_on_bytes(cpu: Run):
    assert cpu.compulsory_bytes("paper") == TOTAL_BYTES
    assert cpu.least_bytes("paper", "40") == TOTAL_BYTES  # all of it fits
    assert TOTAL_BYTES < cpu.least_bytes("paper", "25") < cpu.least_bytes("paper", "20")


def test_bounds_count_what_must_be_on_the_device(cpu: Run):
    """Of a system that leaves tables in the host only the rest is bound to be loaded."""
    half = SIZES["phi-mini"] // 2
    models = {n: {"bytes": b, "device_bytes": b} for n, b in SIZES.items()}
    models["phi-mini"]["device_bytes"] = half
    manifests = {cell: {**m, "models": models} if m["system"] == "djinn" else m
                 for cell, m in cpu.manifests.items()}  # fmt: skip
    run = replace(cpu, manifests=manifests)
    assert run.sizes == cpu.sizes == cpu.needed_sizes == cpu.device_sizes["djinn"]
    assert run.needed_sizes == run.device_sizes["djinn"] == {**SIZES, "phi-mini": half}
    assert run.device_sizes["pytorch_lru"] == SIZES
    assert run.least_bytes("paper", "20") < cpu.least_bytes("paper", "20")
    assert run.compulsory_bytes("paper") == TOTAL_BYTES - half
    ratio = METRICS["bytes_to_optimum"]
    assert ratio(run, "djinn", "20").value > ratio(cpu, "djinn", "20").value
    assert ratio(run, "pytorch_lru", "20").value == ratio(cpu, "pytorch_lru", "20").value


def test_machines_are_numbered_by_their_first_cell_and_named_by_machine_json(gpu: Run):
    slower = {**GPU_MACHINE, "eager_operator_us": 9.0, "versions": {}}
    late = {"machine": slower, "started_at_utc": "2026-11-30T00:00:00+00:00"}
    cell = "paper-25-djinn"
    run = replace(gpu, manifests={**gpu.manifests, cell: {**gpu.manifests[cell], **late}})
    own = run.rows[run.rows["run_id"] == f"{cell}-test"]
    assert run.machine_numbers[f"{cell}-test"] == 2 and len({*run.machine_numbers.values()}) == 2
    assert run.machines_of(own) == "2" and run.machines_of(run.rows) == "1, 2"
    listed = [{"part": "tuesday", "machine": slower}, {"part": "tuesday again", "machine": slower}]
    named = replace(run, listed_machines=listed)
    assert named.machine_names == {1: "1", 2: "tuesday"}  # one is not in the list
    assert named.machines_of(own.assign(run_id="unknown")) == "0"
    assert set(named.placed(own)["place"]) == {"tuesday"}
    assert set(named.placed(own.assign(run_id="?"))["place"]) == {"unknown"}


def test_the_sweep_is_of_one_machine_where_one_ran_all(gpu: Run):
    slower = on_another_machine(gpu, "djinn", total_ms=lambda ms: 2 * ms)  # but run there before
    assert set(sweep(slower)["run_id"]) == set(sweep(gpu)["run_id"])
    forgotten = replace(slower, replicates=no_rows(), replicate_manifests={})
    assert "again-djinn" in set(sweep(forgotten)["run_id"])


def test_the_sweep_compares_with_the_baseline_where_no_machine_ran_all(gpu: Run):
    lru = on_another_machine(gpu, "pytorch_lru")
    elsewhere = replace(lru, replicates=no_rows(), replicate_manifests={})
    run = on_another_machine(elsewhere, "djinn")  # but run beside the baseline before
    at_25 = sweep(run)[lambda rows: rows["capacity_label"] == "25"]
    machines = at_25.groupby("system")["machine"].unique().map(list)
    assert machines["djinn"] == machines["pytorch_pinned"] != machines["pytorch_lru"]
    assert set(speedup_table(at_25, "pytorch_pinned")["system"]) == {"djinn"}


def test_each_system_of_a_sweep_is_compared_with_the_baseline_of_its_own_machine(gpu: Run):
    swept = gpu.rows[gpu.rows["system"].isin(["djinn", "pytorch_pinned", "pytorch_lru"])]
    pinned = swept[swept["system"] == "pytorch_pinned"]
    again = pinned.assign(run_id="b-" + pinned["run_id"], total_ms=3 * pinned["total_ms"])
    lru = swept["system"] == "pytorch_lru"
    rows = pd.concat([swept, again], ignore_index=True)
    manifests = {
        m["run_id"]: m for m in gpu.manifests.values() if m["run_id"] in {*swept["run_id"]}
    }
    on_b = {*again["run_id"], *swept.loc[lru, "run_id"]}
    old = {f"b-{run_id}": m for run_id, m in manifests.items() if run_id in {*pinned["run_id"]}}
    every = {run_id: {**m, "run_id": run_id, "gpu_uuid": f"GPU-{'b' if run_id in on_b else 'a'}"}
             for run_id, m in (manifests | old).items()}  # fmt: skip
    is_again = rows["run_id"].str.startswith("b-")
    run = replace(
        gpu,
        rows=rows[~is_again],
        manifests={m["cell"]: m for i, m in every.items() if not i.startswith("b-")},
        replicates=rows[is_again],
        replicate_manifests={i: m for i, m in every.items() if i.startswith("b-")},
    )
    found = sweep(run)
    assert found.loc[found["only_beside"], "system"].unique().tolist() == ["pytorch_pinned"]
    gains = speedup_table(found, "pytorch_pinned").set_index(["system", "capacity_label"])
    before = speedup_table(sweep(gpu), "pytorch_pinned").set_index(["system", "capacity_label"])
    assert len(gains) == len(before) == 8
    ratio = gains["speedup"] / before["speedup"]
    assert ratio["djinn"].tolist() == pytest.approx([1] * 4)
    assert ratio["pytorch_lru"].tolist() == pytest.approx([3] * 4)
    table = sweep_table(run)  # each system once a capacity
    assert len(table) == 12 and table.groupby("capacity (GiB)")["machine"].nunique().eq(2).all()
    assert (table["requests"] == 30).all() and (table["repeats"] == 1).all()
    assert len(hit_table(found)) == 12


def test_cells_of_different_weights_are_refused(cpu: Run):
    cell = "paper-40-djinn"
    models = {name: {"bytes": size + 1} for name, size in SIZES.items()}
    other = {**cpu.manifests[cell], "models": models}
    with pytest.raises(RecordError, match=r"weights of '.*'.*paper-40-djinn"):
        _ = replace(cpu, manifests={**cpu.manifests, cell: other}).sizes


def test_a_run_without_set_up_says_what_to_do(tmp_path: Path):
    (tmp_path / "status").mkdir()
    write_cell(tmp_path, cell_rows("djinn"))
    with pytest.raises(RecordError, match="run notebook 00_setup first"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("system", "options", "other_steps", "other_processes"),
    [
        ("pytorch_pinned", {}, False, False),
        ("pytorch_pinned", {"decode": "compiled"}, True, False),
        ("djinn", {}, True, False),
        ("djinn", {"decode": "eager"}, False, False),
        ("djinn_vllm", {}, True, True),
        ("vllm_sleep_readonly", {}, True, True),
        ("ray_actors", {}, False, True),
    ],
)
def test_who_decodes_by_other_steps_than_transformers(
    gpu: Run, system, options, other_steps, other_processes
):
    manifests = {
        name: {**manifest, "system": system, "options": options}
        for name, manifest in gpu.manifests.items()
    }
    run = replace(gpu, manifests=manifests)
    labels = set(run.rows["system"])
    assert run.other_steps == (labels if other_steps else set())
    assert run.other_processes == (labels if other_processes else set())
