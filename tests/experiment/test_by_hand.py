"""A cell that is run by hand says what it renews and what it does not."""

from __future__ import annotations

from pathlib import Path

from profile_factory import tiny_profile
from tqdm import auto, notebook, std

from djinn_lib.experiment.execution.by_hand import executing, progress_bar, what_is_renewed
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.paths import REPO

CELL = tiny_profile().all_cells()[0]


def test_by_hand_it_says_what_is_new_and_the_command_for_the_rest(tmp_path):
    said = what_is_renewed(RunFolder(tmp_path), CELL).data
    assert f"{tmp_path}/requests/{CELL.id}.parquet" in said
    assert f"make figures FROM={tmp_path}`" in said and "executed copy" in said
    inside = RunFolder(REPO / "notebooks" / ".." / "data" / "runs" / "cpu")
    assert "make figures FROM=data/runs/cpu`" in what_is_renewed(inside, CELL).data


def test_in_a_run_it_says_nothing(tmp_path):
    run = RunFolder(tmp_path)
    with executing(run.cell(CELL.id).notebook.resolve().parent):
        assert what_is_renewed(run, CELL) is None
        assert what_is_renewed(RunFolder(tmp_path / "other"), CELL) is not None
    with executing(Path("somewhere")):
        assert what_is_renewed(run, CELL) is not None
    assert what_is_renewed(run, CELL) is not None  # the block is over


def test_a_bar_is_a_widget_by_hand_and_text_in_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(auto, "tqdm", notebook.tqdm)  # as in a kernel
    with progress_bar(total=1) as bar:
        assert isinstance(bar, notebook.tqdm)
    with executing(tmp_path), progress_bar(total=1, desc="cell") as bar:
        assert type(bar) is std.tqdm
    assert "cell:   0%" in capfd.readouterr().err
