"""Figures drawn again: of the reference run into another folder, or of a run in place."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from run_factory import write_large_rows, write_run

from djinn_lib.errors import RecordError
from djinn_lib.experiment.execution import notebooks
from djinn_lib.experiment.execution.notebooks import check_parameters
from djinn_lib.experiment.manifest import Status, read_statuses
from djinn_lib.paths import REFERENCE, REPO
from djinn_lib.publishing import redraw
from djinn_lib.publishing.redraw import READING, copy_figures, read_again, redraw_published


class Papermill:
    """Stands for the execution of notebooks: leaves a figure and a copy, and remembers."""

    def __init__(self, failing: str = "") -> None:
        self.given: dict[str, dict[str, Any]] = {}
        self.failing = failing

    def __call__(self, name: str, output: Path, parameters: dict[str, Any]) -> Status:
        check_parameters(REPO / "notebooks" / f"{name}.ipynb", parameters)
        self.given[name] = parameters
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(parameters))
        folder = Path(parameters.get("run_dir", output.parent.parent)) / "figures"
        (folder / f"{name}.pdf").write_bytes(b"%PDF")
        (folder / f"{name}.png").write_bytes(b"PNG")
        failed = name == self.failing
        return Status(name, "failed" if failed else "ok", 1.0, *("other", "boom")[: 2 * failed])


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what stands for papermill be called here, where it can be looked at."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(notebooks, "_pool", ThreadPoolExecutor)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "reference", gpu=True)
    (folder / "figures" / "old.png").write_bytes(b"PNG")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_reading_notebook_runs_into_the_run_s_folder(reference, tmp_path, monkeypatch):
    papermill = Papermill()
    monkeypatch.setattr(redraw, "execute", papermill)
    statuses = read_again(reference, tmp_path / "other")
    assert set(papermill.given) == set(READING)
    assert sorted(status.task for status in statuses) == sorted(READING)
    assert papermill.given["05_claims"] == {"run_dir": str(reference)}
    assert papermill.given["06_policies"]["reference_dir"] == str(tmp_path / "other")
    assert {f"{name}.ipynb" for name in READING} <= names(reference / "notebooks")
    kept = {status.task for status in read_statuses(reference)}
    assert set(READING) <= kept


def test_published_figures_are_drawn_from_the_reference_and_leave_it_alone(
    reference, tmp_path, monkeypatch
):
    papermill = Papermill()
    monkeypatch.setattr(redraw, "execute", papermill)
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}
    assert redraw_published(reference, tmp_path / "figures") == []
    assert {f"{name}.{end}" for name in READING for end in ("pdf", "png")} == names(
        tmp_path / "figures"
    )
    assert {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()} == before
    scratch = Path(papermill.given["04_figures"]["run_dir"])
    assert scratch != reference and not scratch.exists()


def test_models_larger_than_the_ring_are_drawn_from_their_rows(reference, tmp_path, monkeypatch):
    write_large_rows(reference)
    papermill = Papermill()
    monkeypatch.setattr(redraw, "execute", papermill)
    assert redraw_published(reference, tmp_path / "figures") == []
    given = papermill.given["07_large_models"]
    assert (given["profile"], given["measure"]) == ("gpu", False)
    assert {"07_large_models.pdf", "07_large_models.png"} <= names(tmp_path / "figures")


def test_a_notebook_that_fails_leaves_the_published_figures_as_they_were(
    reference, tmp_path, monkeypatch
):
    monkeypatch.setattr(redraw, "execute", Papermill(failing="04_figures"))
    (failed,) = redraw_published(reference, tmp_path / "figures")
    assert failed.task == "04_figures" and not (tmp_path / "figures").exists()


def test_who_interrupts_waits_for_no_other_notebook(reference, tmp_path, monkeypatch):
    begun = []

    def interrupted(name: str, *_: Any) -> Status:
        begun.append(name)
        if len(begun) > 1:
            time.sleep(2)  # one may have begun before the interrupt is noticed
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "_pool", lambda n: ThreadPoolExecutor(1))
    monkeypatch.setattr(redraw, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        redraw_published(reference, tmp_path / "figures")
    assert len(begun) < len(READING)


def test_a_folder_without_figures_is_refused(tmp_path):
    with pytest.raises(RecordError, match="got none: draw them first"):
        copy_figures(tmp_path, tmp_path / "to")


@pytest.mark.slow
def test_what_only_reads_rows_needs_no_torch():
    found = (path for wing in ("analysis", "publishing", "simulator")
             for path in (REPO / "djinn_lib" / wing).rglob("[a-z]*.py"))  # fmt: skip
    names = sorted(".".join(path.relative_to(REPO).with_suffix("").parts) for path in found)
    assert len(names) > 20
    code = (
        f"import sys, {', '.join(names)}; "
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_published_figures_are_those_of_the_notebooks(tmp_path, monkeypatch):
    """Of two notebooks: a whole run executes them all."""
    monkeypatch.setattr(redraw, "READING", ("03_sensitivity", "06_policies"))
    assert redraw_published(REFERENCE, tmp_path / "figures") == []
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.pdf")}
    assert {"sensitivity", "simulator_validation"} <= drawn
