"""What a task was begun with counts, not what its files hold when it ends."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from djinn_lib.experiment.begun import Begun, file_inputs, value_input
from doit.cmd_base import ModuleTaskLoader
from doit.doit_cmd import DoitMain


class Process:
    """One run of doit over a task that reads a file, in a folder with doit's own records."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source.py"
        self.begun, self.ran = Begun(), 0

    def __call__(self, edit: str | None = None, result: bool | None = None) -> int:
        """Run the task, if it is not up to date; with `edit` the file is written to meanwhile."""

        def act() -> bool | None:
            self.ran += 1
            if edit is not None:
                self.source.write_text(edit)
            return result

        def inputs() -> dict[str, str]:
            return file_inputs([self.source])

        def task_cell() -> dict[str, Any]:
            return {
                "actions": [(self.begun.action(act, inputs), [])],
                "file_dep": [self.source],
                "uptodate": [self.begun.still(inputs)],
            }

        tasks = ModuleType("tasks")
        tasks.task_cell = task_cell  # type: ignore[attr-defined]
        settings = {"dep_file": str(self.folder / ".doit.db"), "verbosity": 2}
        tasks.DOIT_CONFIG = settings  # type: ignore[attr-defined]
        return DoitMain(ModuleTaskLoader(tasks)).run(["run", "--reporter", "error-only"])


@pytest.fixture
def process(tmp_path: Path) -> Process:
    (tmp_path / "source.py").write_text("first")
    return Process(tmp_path)


def test_a_task_runs_once_and_again_when_its_file_changed(process):
    for text, ran in (("first", 1), ("first", 1), ("second", 2), ("second", 2)):
        process.source.write_text(text)
        process.begun = Begun()
        assert process() == 0 and process.ran == ran


def test_a_file_edited_while_a_task_runs_has_it_run_again_in_the_next_process(process, capsys):
    process(edit="second")
    assert "cell: source.py changed while it ran: the next run does it again" in (
        capsys.readouterr().out
    )
    process()
    assert process.ran == 1  # the same process is content with it
    process.begun = Begun()
    process()
    process.begun = Begun()
    process()
    assert process.ran == 2


def test_what_ran_elsewhere_counts_from_when_it_was_handed_out(process):
    process.begun.note("cell", file_inputs([process.source]))
    process.source.write_text("second")  # while a worker was busy with it
    process()
    process.begun = Begun()
    process()
    assert process.ran == 2


def test_a_task_that_failed_was_not_done(process):
    assert process(result=False) != 0
    process()
    process()
    assert process.ran == 2


def test_a_file_that_is_not_there_is_noted_as_such(tmp_path):
    absent = tmp_path / "absent"
    assert file_inputs([absent]) == {str(absent): "not read: No such file or directory"}
    before = value_input(file_inputs([absent]))
    absent.touch()
    assert value_input(file_inputs([absent])) != before
