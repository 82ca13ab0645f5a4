"""Folders replaced as one: wherever it ends, all are old or all are new, and none is half."""

from __future__ import annotations

import itertools
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from djinn_lib import replacing
from djinn_lib.replacing import recover, replace_folders


def fill(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(text)
    return folder


def state(folder: Path) -> str:
    """What all files of a folder hold; "absent" without one."""
    if not folder.exists():
        return "absent"
    texts = {(folder / name).read_text() for name in ("a", "inner/b")}
    return texts.pop() if len(texts) == 1 else "mixed"


@pytest.fixture
def places(tmp_path: Path) -> dict[Path, Path]:
    """Two targets with old folders, and new ones for them."""
    made = {}
    for name in ("one", "two"):
        target = fill(tmp_path / "places" / name, "old")
        made[target] = fill(tmp_path / f"new-{name}", "new")
    return made


def states(places: dict[Path, Path]) -> set[str]:
    return {state(target) for target in places}


def names(places: dict[Path, Path]) -> set[str]:
    return {path.name for path in next(iter(places)).parent.iterdir()}


def test_old_folders_go_when_new_ones_are_there(places):
    replace_folders(places)
    assert states(places) == {"new"} and names(places) == {"one", "two"}


def test_a_target_need_not_be_there(tmp_path):
    replace_folders({tmp_path / "deep" / "one": fill(tmp_path / "made", "new")})
    assert state(tmp_path / "deep" / "one") == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one"]


@pytest.mark.parametrize("error", [OSError("refused"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", range(4))
def test_an_error_leaves_everything_as_it_was(places, monkeypatch, step, error):
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == step + 1:
            raise error
        real(source, target)

    monkeypatch.setattr(replacing.os, "rename", rename)
    with pytest.raises(type(error)):
        replace_folders(places)
    assert states(places) == {"old"} and names(places) == {"one", "two"}
    assert {state(new) for new in places.values()} == {"new"}
    monkeypatch.undo()
    replace_folders(places)
    assert states(places) == {"new"}


def die_at(step: int, places: dict[Path, Path]) -> None:
    """Replace folders in a process that ends before its call number `step`."""
    left = itertools.count(step, -1)

    def dying(function):
        return lambda *args, **options: function(*args, **options) if next(left) else os._exit(9)

    for module, name in ((os, "rename"), (os, "rmdir"), (os, "sync"), (replacing.shutil, "rmtree")):
        setattr(module, name, dying(getattr(module, name)))
    replace_folders(places)


def killed_at(step: int, places: dict[Path, Path]) -> int | None:
    """The exit status of a process that replaces folders and dies at a step."""
    process = get_context("fork").Process(target=die_at, args=(step, places))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("absent", [False, True], ids=["both old", "one absent"])
def test_a_kill_at_any_point_is_put_right_by_the_next_run(tmp_path, absent):
    """Each step in turn, until there is none left at which to die."""
    seen = []
    for step in range(30):
        root = tmp_path / str(step)
        places = {root / "places" / name: fill(root / f"new-{name}", "new") for name in "ab"}
        for target in places:
            fill(target, "old") if not (absent and target.name == "b") else None
        status = killed_at(step, places)
        recover(*places)
        found = (state(root / "places" / "a"), state(root / "places" / "b"))
        assert found in (("new", "new"), ("old", "absent" if absent else "old")), step
        assert names(places) <= {"a", "b"}, step
        seen.append(found[0])
        if status == 0:
            break
    assert status == 0 and seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)


def test_nothing_to_recover_changes_nothing(places):
    recover(*places)
    recover(next(iter(places)).with_name("absent"))
    assert states(places) == {"old"} and names(places) == {"one", "two"}
