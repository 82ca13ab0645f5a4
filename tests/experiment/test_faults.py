"""Faults where they strike: each is a failed row with its cause or a clear error, and no more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import flip_a_bit
from tiny_run import cell_of, copied, prepare

from djinn_lib.errors import TraceError
from djinn_lib.experiment.bench import Bench
from djinn_lib.experiment.cells.cell import run_cell
from djinn_lib.systems.djinn import DjinnRing
from djinn_lib.systems.pytorch import PyTorchPinned
from djinn_lib.systems.serverless import Serverless
from djinn_lib.trace import Trace, write_trace


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Bench:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def bench(prepared, tmp_path) -> Bench:
    """A run folder and model folders of one's own, to be damaged."""
    return copied(prepared, tmp_path / "copy")


def weights_of(bench, model="llama"):
    return bench.models[model].folder / "model.safetensors"


# -- weights on the disk ---------------------------------------------------------------------

DAMAGES = {
    "flipped bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path, 1000),
    "deleted": Path.unlink,
    "replaced": lambda path: path.write_bytes(path.with_name("other").read_bytes()),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize(
    ("damage", "name"),
    [*((d, "model.safetensors") for d in DAMAGES), ("flipped bit", "config.json")],
)
def test_files_damaged_since_the_set_up_start_no_cell(bench, damage, name):
    path = weights_of(bench).with_name(name)
    path.with_name("other").write_bytes((weights_of(bench, "gpt2").with_name(name)).read_bytes())
    DAMAGES[damage](path)
    rows = run_cell(bench, cell_of(bench, "djinn"))
    assert len(rows) == 6 and set(rows["error_kind"]) == {"bad_input"}
    assert rows["error"].str.contains("could not start: ").all()
    assert rows["error"].str.contains(str(path.parent), regex=False).all()


def after_request(monkeypatch, system, number, then):
    """Let `then` happen once a request (after two to warm up) has been served."""
    serve, calls = system.serve, []

    def call(self, *arguments):
        served = serve(self, *arguments)
        calls.append(arguments[0])
        if len(calls) == 2 + number:
            then()
        return served

    monkeypatch.setattr(system, "serve", call)


@pytest.mark.parametrize("damage", ["truncated", "replaced"])
def test_files_that_change_while_a_system_reads_them(bench, monkeypatch, damage):
    path = weights_of(bench)
    path.with_name("other").write_bytes(path.read_bytes()[:-4] + b"else")  # that would load
    after_request(monkeypatch, Serverless, 2, lambda: DAMAGES[damage](path))
    rows = run_cell(bench, cell_of(bench, "serverless"))
    late = (rows["request"] >= 2) & (rows["model"] == "llama")
    assert late.any() and (rows["ok"] == ~late).all()
    assert set(rows.loc[late, "error_kind"]) == {"bad_input"}
    assert rows.loc[late, "error"].str.contains("llama").all()


def test_whole_folders_may_go_once_a_system_has_read_them(bench, monkeypatch):
    def go():
        for files in bench.models.values():
            files.folder.joinpath("model.safetensors").write_bytes(b"\xff" * 9)  # if it is mapped
            shutil.rmtree(files.folder)

    after_request(monkeypatch, DjinnRing, 1, go)
    assert run_cell(bench, cell_of(bench, "djinn"))["ok"].all()


# -- memory ------------------------------------------------------------------


def run_out(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_memory_that_a_failed_request_held_is_given_back(bench, monkeypatch):
    serve, calls, emptied = PyTorchPinned.serve, [], []

    def fail_once(self, *arguments):
        calls.append(arguments)
        return run_out() if len(calls) == 4 else serve(self, *arguments)

    monkeypatch.setattr(PyTorchPinned, "serve", fail_once)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(calls)))
    rows = run_cell(bench, cell_of(bench, "pytorch_pinned"))
    assert rows["error_kind"].tolist() == ["", "oom", "", "", "", ""]
    assert emptied == [4]  # between the request that failed and the next


# -- requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["serve", "reset"])
@pytest.mark.parametrize("error", [SystemExit(0), RuntimeError("expected peace")], ids=str)
def test_whatever_a_library_raises_fails_one_request(bench, monkeypatch, method, error):
    work, calls = getattr(PyTorchPinned, method), []

    def fail_once(self, *arguments):
        calls.append(arguments)
        if len(calls) == {"serve": 3, "reset": 1}[method]:  # two requests warm up
            raise error
        return work(self, *arguments)

    monkeypatch.setattr(PyTorchPinned, method, fail_once)
    rows = run_cell(bench, cell_of(bench, "pytorch_pinned"))
    assert rows["ok"].tolist() == [False, True, True, True, True, True]
    assert type(error).__name__ in rows["error"][0]


# -- traces and clocks -----------------------------------------------------------------------


def test_a_trace_without_requests(bench):
    write_trace(Trace("none", {}, ()), bench.run.trace("zipf"))
    cell = cell_of(bench, "djinn")
    with pytest.raises(TraceError, match=r"at least 1 request, .*generate the trace again"):
        run_cell(bench, cell)
    assert not bench.run.cell(cell.id).rows.exists()
