"""A system that goes on running between the cells of one process."""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
from tiny_run import cell_of, copied, prepare

from djinn_lib.experiment.cells import cell_runs
from djinn_lib.experiment.cells.cell import run_cell
from djinn_lib.experiment.cells.cell_runs import run_cells, stale_cells
from djinn_lib.experiment.execution import notebooks
from djinn_lib.experiment.manifest import Status, read_manifest
from djinn_lib.systems.djinn import DjinnRing
from djinn_lib.systems.pytorch import PyTorchLRU, PyTorchPinned


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("running"))


@pytest.fixture
def bench(prepared, tmp_path):
    return copied(prepared, tmp_path / "copy")


@pytest.fixture
def calls(monkeypatch):
    """How often systems were started and closed."""
    counted = Counter()
    for system in (DjinnRing, PyTorchPinned, PyTorchLRU):
        for name in ("start", "close"):
            real = getattr(system, name)

            def call(self, *arguments, real=real, name=name):
                counted[name] += 1
                return real(self, *arguments)

            monkeypatch.setattr(system, name, call)
    return counted


def all_at_once(cell):
    return cell.model_copy(update={"mode": "concurrent", "speed": math.inf})


def manifest_of(bench, cell):
    return read_manifest(bench.run.cell(cell.id).manifest)


def tokens_of(rows):
    return rows.set_index(["repeat", "request"]).token_sha.sort_index()


def test_cells_of_one_system_start_it_once(bench, calls):
    system = "djinn"
    first = cell_of(bench, system)
    second = all_at_once(first)
    alone = run_cell(bench, first)
    assert calls == {"start": 1, "close": 1}
    one_by_one = run_cell(bench, first, keep_running=True)
    together = run_cell(bench, second, keep_running=False)
    assert calls == {"start": 2, "close": 2}
    for rows in (one_by_one, together):
        assert rows.ok.all()
        assert tokens_of(rows).equals(tokens_of(alone))
    # Each begins with nothing on the device, whatever the one before left there.
    assert one_by_one.loaded_bytes.tolist() == alone.loaded_bytes.tolist()
    assert together.loaded_bytes.sum() > 0
    assert manifest_of(bench, first)["running_since"] is None
    assert manifest_of(bench, second)["running_since"] == first.id
    assert manifest_of(bench, second)["setup_s"] == 0
    assert manifest_of(bench, second)["models"] == manifest_of(bench, first)["models"]


def test_another_system_closes_the_one_that_runs(bench, calls):
    run_cell(bench, cell_of(bench, "djinn"), keep_running=True)
    assert calls == {"start": 1}
    run_cell(bench, cell_of(bench, "pytorch_pinned"))
    assert calls == {"start": 2, "close": 2}


def test_a_system_that_can_change_its_capacity_serves_cells_of_all(bench, calls):
    least = cell_of(bench, "pytorch_lru", "most")
    alone = run_cell(bench, least)
    run_cell(bench, cell_of(bench, "pytorch_lru", "all"), keep_running=True)
    again = run_cell(bench, least)
    assert calls == {"start": 2, "close": 2}
    assert again["ok"].all() and tokens_of(again).equals(tokens_of(alone))
    assert again["loaded_bytes"].tolist() == alone["loaded_bytes"].tolist()
    assert (again["capacity_bytes"] == alone["capacity_bytes"]).all()
    assert manifest_of(bench, least)["running_since"] == cell_of(bench, "pytorch_lru", "all").id


def test_a_capacity_that_is_too_small_fails_as_it_does_alone(bench, calls):
    least = cell_of(bench, "pytorch_lru", "half")  # a model is larger
    alone = run_cell(bench, least)
    run_cell(bench, cell_of(bench, "pytorch_lru", "all"), keep_running=True)
    again = run_cell(bench, least)
    assert not alone["ok"].any() and again["error"].tolist() == alone["error"].tolist()
    assert calls["start"] == calls["close"] == 3


def test_a_ring_has_one_capacity(bench, calls):
    run_cell(bench, cell_of(bench, "djinn", "all"), keep_running=True)
    run_cell(bench, cell_of(bench, "djinn", "most"))
    assert calls == {"start": 2, "close": 2}


def test_cells_of_a_system_come_together_over_capacities_if_one_start_serves_all(bench):
    cells = [cell_of(bench, system, label) for label in ("all", "most")
             for system in ("djinn", "pytorch_lru", "pytorch_pinned")]  # fmt: skip
    order = [(cell.system, cell.capacity_label) for cell in
             stale_cells(bench.run, bench.profile, cells)]  # fmt: skip
    assert order == [
        ("djinn", "all"), ("pytorch_lru", "all"), ("pytorch_lru", "most"),
        ("pytorch_pinned", "all"), ("pytorch_pinned", "most"), ("djinn", "most"),
    ]  # fmt: skip


def test_a_system_that_failed_a_request_is_not_kept(bench, calls, monkeypatch):
    real, served = PyTorchPinned.serve, []

    def serve(self, *arguments):
        served.append(arguments)
        if len(served) == 5:  # after three models were warmed up
            raise MemoryError("no room")
        return real(self, *arguments)

    monkeypatch.setattr(PyTorchPinned, "serve", serve)
    cell = cell_of(bench, "pytorch_pinned")
    assert not run_cell(bench, cell, keep_running=True).ok.all()
    assert calls == {"start": 1, "close": 1}


def test_cells_of_a_series_share_a_kernel_until_one_fails(bench, monkeypatch):
    made, seen = [], []

    @contextmanager
    def one_kernel(name, fork):
        made.append(object())
        yield made[-1]

    def run(run, profile, cell, place, kernel, keep_running):
        seen.append((cell.mode, made.index(kernel), keep_running))
        failed = len(seen) == 2
        return Status(cell.id, "failed" if failed else "ok", 1.0, "kernel_died" * failed)

    monkeypatch.setattr(notebooks, "one_kernel", one_kernel)
    monkeypatch.setattr(cell_runs, "run_cell_notebook", run)
    cell = cell_of(bench, "djinn")
    modes = [cell.model_copy(update={"mode": mode}) for mode in ("a", "b", "c", "d")]
    other = cell_of(bench, "pytorch_pinned")
    ended = list(run_cells(bench.run, bench.profile, [*modes, other]))
    assert [status.state for status in ended] == ["ok", "failed", "ok", "ok", "ok"]
    assert seen == [
        ("a", 0, True),
        ("b", 0, True),
        ("c", 1, True),
        ("d", 1, False),
        (other.mode, 2, False),
    ]
