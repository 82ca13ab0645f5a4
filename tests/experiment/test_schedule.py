"""Which cells begin within a limit of time, and from what their length is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from djinn_lib.experiment.schedule import (
    AROUND_S,
    Limit,
    estimate_s,
    left_over_lines,
    run_within,
    span,
)
from profile_factory import tiny_profile
from row_factory import SIZES

from djinn_lib.experiment.profile import Cell, Profile, load_profile
from djinn_lib.paths import REFERENCE
from djinn_lib.rows import read_manifest, write_manifest
from djinn_lib.trace import paper_trace, write_trace

CELLS = [Cell(trace="paper", capacity_label="25", system=name, repeats=1) for name in "abcd"]


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def within(seconds: float | None, takes: dict[str, float], told: dict[str, float | None]):
    """Run the four cells; returns which began and which were left over."""
    clock, begun = Clock(), []
    limit = Limit(seconds, clock)

    def begin(cell: Cell) -> None:
        begun.append(cell.system)
        clock.now_s += takes[cell.system]

    left = run_within(CELLS, begin, lambda cell: told.get(cell.system), limit)
    return "".join(begun), "".join(cell.system for cell in left)


def test_without_a_limit_every_cell_begins():
    assert within(None, dict.fromkeys("abcd", 1e6), {"a": 1e6}) == ("abcd", "")


def test_no_cell_begins_that_is_not_expected_to_end():
    takes = {"a": 50.0, "b": 60.0, "c": 20.0, "d": 20.0}
    assert within(100, takes, dict(takes)) == ("acd", "b")


def test_a_cell_of_unknown_length_begins_while_time_is_left():
    takes = {"a": 50.0, "b": 49.0, "c": 500.0, "d": 1.0}
    assert within(100, takes, {"a": 50.0}) == ("abc", "d")


def test_an_overrun_begins_nothing_more():
    assert within(100, dict.fromkeys("abcd", 150.0), {}) == ("a", "bcd")


def test_before_each_cell_it_is_said_what_is_ahead(capsys):
    within(600, dict.fromkeys("abcd", 30.0), {"a": 30.0, "b": 120.0, "c": 240.0})
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        "paper-25-a: about 30 s; after it 3 cells, about 6.0 min (1 of unknown length); "
        "10.0 min of the limit left"
    )
    assert second.startswith("paper-25-b: about 2.0 min; after it 2 cells, about 4.0 min")


def test_what_is_left_over_is_named_with_how_to_go_on():
    told = {"a": 30.0, "b": 700.0}
    lines = left_over_lines(CELLS[:3], lambda cell: told.get(cell.system), Limit(600, Clock()))
    assert "10.0 min" in lines[0] and "3 cells, about 12.2 min (1 of unknown length)" in lines[0]
    assert lines[1] == "  cell:paper-25-a  about 30 s"
    assert lines[2].startswith("  cell:paper-25-b") and "longer than the limit itself" in lines[2]
    assert "nobody knows" in lines[3] and "goes on from here" in lines[4]


def test_spans_for_people():
    assert [span(s) for s in (0.4, 89, 90, 605)] == ["0 s", "89 s", "1.5 min", "10.1 min"]


# -- what a cell is expected to take ---------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "requests").mkdir(parents=True)
    (tmp_path / "run" / "traces").mkdir()
    write_trace(paper_trace(tuple(SIZES)), tmp_path / "run" / "traces" / "paper.jsonl")
    return tmp_path / "run"


def profile_of(minutes: float | None = None) -> Profile:
    entry = {"traces": ["paper"], "capacities": ["all"], "systems": ["djinn"], "repeats": 4}
    return tiny_profile(traces={"paper": {"kind": "paper"}},
                        cells=[{**entry, "minutes": minutes}])  # fmt: skip


def note_manifest(folder: Path, profile: str = "tiny", **times: float) -> None:
    """A manifest of the cell as an earlier run of 2 repeats would have left it."""
    from run_factory import write_run

    source = write_run(folder.parent / "source") / "requests" / "paper-25-djinn.manifest.json"
    manifest = {**read_manifest(source), **times, "profile": profile}
    manifest["parameters"]["repeats"] = 2
    (folder / "requests").mkdir(parents=True, exist_ok=True)
    write_manifest(manifest, folder / "requests" / "paper-all-djinn.manifest.json")


def expected_s(run_dir: Path, profile: Profile | None = None) -> float | None:
    profile = profile or profile_of()
    (cell,) = profile.all_cells()
    return estimate_s(cell, profile, run_dir, reference=run_dir.parent / "reference")


def test_nothing_is_known_of_a_new_cell_without_a_hint(run_dir):
    assert expected_s(run_dir) is None
    assert expected_s(run_dir, profile_of(minutes=2.5)) == 150


def test_an_earlier_run_tells_and_repeats_count(run_dir):
    note_manifest(run_dir.parent / "reference", wall_s=50.0, setup_s=10.0)
    hinted = profile_of(minutes=9)
    assert expected_s(run_dir, hinted) == AROUND_S + 10 + 2 * 40
    note_manifest(run_dir, wall_s=20.0, setup_s=10.0)
    assert expected_s(run_dir, hinted) == AROUND_S + 10 + 2 * 10


def test_another_profile_tells_nothing(run_dir):
    note_manifest(run_dir.parent / "reference", profile="gpu", wall_s=50.0, setup_s=10.0)
    assert expected_s(run_dir) is None


def test_the_journal_of_a_cell_that_was_cut_off_tells_its_pace(run_dir):
    note_manifest(run_dir, wall_s=20.0, setup_s=10.0)
    rows = [{"start_s": 30.0 + i, "total_ms": 1000.0 if i else float("nan")} for i in range(60)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"start_s": 90.0, "tot'
    (run_dir / "requests" / "paper-all-djinn.journal.jsonl").write_text(text)
    assert expected_s(run_dir) == AROUND_S + 30 + 2 * 60  # 60 of 120 requests took 60 s


@pytest.mark.parametrize(
    "text", ["", "{", "12}", '{"start_s": 1.0}', '{"start_s": "a", "total_ms": 1.0}', "[]}"]
)
def test_a_journal_that_tells_nothing_leaves_it_to_the_manifest(run_dir, text):
    note_manifest(run_dir, wall_s=20.0, setup_s=10.0)
    by_manifest = expected_s(run_dir)
    (run_dir / "requests" / "paper-all-djinn.journal.jsonl").write_text(text)
    assert expected_s(run_dir) == by_manifest


def test_every_cell_of_the_gpu_profile_has_a_hint():
    profile = load_profile("gpu")
    nowhere = Path("/nonexistent")
    hints = [estimate_s(cell, profile, nowhere, nowhere) for cell in profile.all_cells()]
    assert all(hint and hint <= 540 for hint in hints)


def test_the_hints_of_the_gpu_profile_are_near_what_was_measured(tmp_path):
    profile = load_profile("gpu")
    for cell in profile.all_cells():
        manifest = read_manifest(REFERENCE / "requests" / f"{cell.id}.manifest.json")
        expected_s = estimate_s(cell, profile, tmp_path, tmp_path)
        assert expected_s is not None
        assert manifest["wall_s"] / 1.3 < expected_s < 2 * manifest["wall_s"], cell.id
