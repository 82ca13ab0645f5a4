"""Folders replaced as one: wherever it ends, all are old or all are new, and none is half."""

from __future__ import annotations

import os
import subprocess
import sys
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


KILLED = """
import os, sys
from pathlib import Path
from djinn_lib import replacing
step, *paths = sys.argv[1:]
left = [int(step)]
def dying(function):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return function(*arguments, **options)
    return call
for module, name in ((os, "rename"), (os, "rmdir"), (os, "sync"), (replacing.shutil, "rmtree")):
    setattr(module, name, dying(getattr(module, name)))
made = {Path(target): Path(new) for target, new in zip(paths[::2], paths[1::2])}
replacing.replace_folders(made)
"""


def killed_at(step: int, places: dict[Path, Path]) -> int:
    """Replace folders in a process that dies before its call number `step`; returns its status."""
    paths = [str(path) for pair in places.items() for path in pair]
    return subprocess.run([sys.executable, "-c", KILLED, str(step), *paths]).returncode


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
