"""A whole run: what is executed in which order, what is not executed again, and how it goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command import djinn
from profile_factory import tiny_profile
from row_factory import cell_rows
from run_factory import MACHINE, manifest_of

from djinn_lib.errors import ConfigError
from djinn_lib.experiment import reproduce, steps
from djinn_lib.experiment.cells import inputs
from djinn_lib.experiment.cells.kept_rows import keep
from djinn_lib.experiment.execution import notebooks
from djinn_lib.experiment.manifest import Status, read_statuses
from djinn_lib.experiment.profile import load_profile
from djinn_lib.experiment.reproduce import Work
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.publishing import report

LABELS = ("djinn", "pytorch_lru", "pytorch_pinned")
PROFILE = tiny_profile(
    systems={label: {"system": label} for label in LABELS},
    traces={"paper": {"kind": "zipf", "n": 6, "alpha": 1.0, "seed": 3, "rate_per_s": 2.0}},
    capacities={"25": "1/2"},
    cells=[{"traces": ["paper"], "capacities": ["25"], "systems": list(LABELS)}],
)
CELLS = [f"02_run_system.paper-25-{label}" for label in LABELS]
READING = [step.notebook for step in steps.READING]


class Kernels:
    """Stands for papermill and kernels: notes what is executed, and leaves what each would leave.

    What is in `during` is called while the notebook of that name is executed; a text that it
    returns fails the notebook.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.executed = run, list[str]()
        self.during: dict[str, Callable[[], str | None]] = {}

    def __call__(self, notebook: str, output: Path, parameters: dict[str, Any], **_: Any) -> Status:
        self.executed.append(output.stem)
        error = self.during.get(output.stem, lambda: None)()
        output.parent.mkdir(exist_ok=True)
        output.write_text('{"metadata": {}}')
        leave = getattr(self, f"_{notebook}", None)
        if leave and not error:
            leave(parameters)
        return Status(
            output.stem, "failed" if error else "ok", 1.0, "other" * bool(error), error or ""
        )

    def _00_setup(self, _: Any) -> None:
        self.run.machine.write_text(json.dumps({"machine": MACHINE, "models": {}}))

    def _01_trace(self, _: Any) -> None:
        self.run.traces.mkdir(exist_ok=True)
        self.run.trace("paper").write_text("a trace")

    def _02_run_system(self, parameters: dict[str, Any]) -> None:
        rows = cell_rows(parameters["system"])
        cell = self.run.cell(f"paper-25-{parameters['system']}")
        keep(cell, rows, manifest_of(cell.id, rows.iloc[0], MACHINE))

    def _04_figures(self, _: Any) -> None:
        self.run.figures.mkdir(exist_ok=True)
        (self.run.figures / "zipf.png").write_text("a figure")

    def since(self) -> list[str]:
        """What was executed since the last call."""
        executed, self.executed = self.executed, []
        return executed


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A djinn_lib of one's own to edit; its digest is what code is made from."""
    library = tmp_path / "djinn_lib"
    for name in ("engine/ring.py", "experiment/cells/cell.py", "analysis/claims.py",
                 "systems/djinn.py", "systems/pytorch.py"):  # fmt: skip
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    monkeypatch.setattr(inputs, "LIBRARY", library)
    monkeypatch.setattr(steps, "LIBRARY", library)
    return library


@pytest.fixture
def kernels(tmp_path, monkeypatch, library) -> Kernels:
    made = Kernels(RunFolder(tmp_path / "run"))
    monkeypatch.setattr(notebooks, "execute", made)
    monkeypatch.setattr(reproduce, "load_profile", lambda _: PROFILE)
    monkeypatch.setattr(notebooks, "_pool", lambda n: ThreadPoolExecutor(1))
    monkeypatch.setattr(report, "build_report", lambda path: (path / "index.html").write_text("x"))
    return made


@pytest.fixture
def run(kernels) -> Callable[..., tuple[int, list[str]]]:
    """Runs the command; returns its exit status and what was executed."""

    def command(*names: str) -> tuple[int, list[str]]:
        code = djinn("reproduce", "--profile", "tiny", "--run-dir", kernels.run.path, *names)
        return code, kernels.since()

    return command


def test_everything_runs_in_its_order_and_a_second_time_nothing(run, kernels, capsys):
    assert run() == (0, ["00_setup", "01_trace", *CELLS, *READING])
    said = capsys.readouterr().out
    assert "paper-25-djinn (cell 1 of 3, duration unknown) ..." in said
    assert said.splitlines()[-1].startswith("13 notebooks, 0 failed; results: ")
    before = {path: path.stat().st_mtime_ns for path in kernels.run.path.rglob("*.*")}
    assert run() == (0, [])
    after = {path: path.stat().st_mtime_ns for path in kernels.run.path.rglob("*.*")}
    assert {path for path in after if before.get(path) != after[path]} <= {kernels.run.lock}
    assert "..." not in capsys.readouterr().out
    states = {status.task: status.state for status in read_statuses(kernels.run.path)}
    assert states == dict.fromkeys(["00_setup", "01_trace", *CELLS, *READING], "ok")


def test_an_edit_runs_what_it_can_change(run, library):
    run()
    (library / "analysis" / "claims.py").write_text("another verdict")
    assert run() == (
        0,
        [n for n in READING if n not in ("00_start_here", "07_large_models", "08_fleet")],
    )
    (library / "systems" / "djinn.py").write_text("another system")
    executed = run()[1]
    assert executed[0] == CELLS[0] and not set(CELLS[1:]) & set(executed)
    (library / "engine" / "ring.py").write_text("another ring")
    assert set(CELLS) < set(run()[1])


def test_what_is_gone_is_made_again(run, kernels):
    run()
    cell = kernels.run.cell("paper-25-djinn")
    for path, again in (
        (cell.notebook, CELLS[0]),
        (cell.rows, CELLS[0]),
        (kernels.run.figures / "zipf.png", "04_figures"),
        (kernels.run.trace("paper"), "01_trace"),
    ):
        path.unlink()
        assert again in run()[1] and path.exists()
    kernels.run.page.unlink()
    assert run() == (0, []) and kernels.run.page.exists()


def test_a_page_that_finds_no_room_is_said_and_made_the_next_time(
    run, kernels, monkeypatch, capsys
):
    made = report.build_report

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path / "index.html"))

    monkeypatch.setattr(report, "build_report", full)
    assert run()[0] == 1
    said = capsys.readouterr().out.splitlines()
    (line,) = (line for line in said if line.startswith("index.html: failed"))
    assert "disk_full" in line and "make room, and run the same command again" in line
    assert said[-1] == f"14 notebooks, 1 failed; results: {kernels.run.path}"
    monkeypatch.setattr(report, "build_report", made)
    assert run() == (0, []) and kernels.run.page.exists()


def test_what_another_notebook_has_half_written_belongs_to_none(run, kernels):
    half = kernels.run.figures / ".zipf.partial.png"

    def write_half() -> None:
        half.parent.mkdir()
        half.write_text("half")

    kernels.during["04_figures"] = write_half
    run()
    half.unlink()
    assert run() == (0, [])


def test_a_file_edited_while_a_cell_runs_has_it_run_again_by_the_next_command(
    run, kernels, library, capsys
):
    run()
    kernels.during[CELLS[1]] = lambda: (
        (library / "systems" / "pytorch.py").write_text("new") and None
    )
    (library / "systems" / "pytorch.py").write_text("edited")
    assert run()[1][:2] == CELLS[1:]
    assert "code changed while it ran: the next run does it again" in capsys.readouterr().out
    del kernels.during[CELLS[1]]
    assert run()[1][:1] == [CELLS[1]]
    assert run() == (0, [])


def test_a_failure_costs_only_its_own_and_is_the_exit_status(run, kernels, capsys):
    kernels.during["04_figures"] = lambda: "no picture"
    code, executed = run()
    assert code == 1 and executed[-len(READING) :] == READING
    assert "04_figures: failed in 1.0 s (other: no picture)" in capsys.readouterr().out
    assert run() == (1, ["04_figures"])
    del kernels.during["04_figures"]
    assert run() == (0, ["04_figures"])


def test_without_a_set_up_nothing_else_runs(run, kernels):
    kernels.during["00_setup"] = lambda: "no weights"
    assert run() == (1, ["00_setup"])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_what_is_interrupted_goes_on_where_it_was(run, kernels, number, capsys, ctrl_c):
    kernels.during[CELLS[1]] = lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(signal.SIGTERM)
    assert run() == (130, ["00_setup", "01_trace", *CELLS[:2]])
    assert "the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    del kernels.during[CELLS[1]]
    assert run() == (0, [*CELLS[1:], *READING])
    assert not kernels.executed


def test_what_is_named_runs_alone_in_the_order_of_its_names(run, kernels):
    assert run("cell:paper-25-pytorch_lru", "cell:paper-25-djinn") == (
        0, ["00_setup", "01_trace", CELLS[1], CELLS[0]]
    )  # fmt: skip
    assert run("figures") == (0, ["04_figures"])
    assert not kernels.run.page.exists()
    assert run("page") == (0, []) and kernels.run.page.exists()
    assert run("04_figures", "cell:paper-25-djinn") == (0, [])


def test_what_there_is_not_cannot_be_named(run, capsys):
    assert run("cell:nonsense") == (2, [])
    said = capsys.readouterr().err
    assert "no 'cell:nonsense'" in said and "cell:paper-25-djinn" in said and "figures" in said


def test_every_name_stands_for_something():
    profile = load_profile("cpu")
    everything = Work.named(profile, [])
    assert [cell.id for cell in everything.cells] == [cell.id for cell in profile.all_cells()]
    for step in steps.STEPS:
        for name in (step.name, step.notebook):
            work = Work.named(profile, [name])
            assert not work.cells and (work.set_up or work.steps == [step])
    with pytest.raises(ConfigError):
        Work.named(profile, ["dodo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "nonsense"], "there is no profile 'nonsense'"),
        (["--profile", "../cpu"], "there is no profile '../cpu'"),
        (["--profile", "smoke", "--run-dir", "/proc/nowhere"], "written to"),
    ],
)
def test_bad_arguments_end_with_a_message_and_status_2(arguments, message, capsys):
    assert djinn("reproduce", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_gpu_profile_needs_a_gpu(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert djinn("reproduce", "--profile", "gpu") == 2
    assert "PROFILE=cpu" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_ends_a_run_before_the_set_up(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    smoke = ["--profile", "smoke", "--run-dir", str(tmp_path), "--executor", "ray"]
    assert djinn("reproduce", *smoke) == 2
    said = capsys.readouterr()
    assert "unset RAY_ADDRESS" in said.err and "00_setup" not in said.out
