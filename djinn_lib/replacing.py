"""Folders replaced as one: the old are put aside, the new in place, and then the old are deleted.

Whatever ends this on its way, an error or a kill, either all old folders or all new ones are whole.
An error is undone at once; what a kill left is put right by `recover`, which the next run calls.
The rule that tells both cases apart: nothing is deleted before every target is there again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path


def replace_folders(made: Mapping[Path, Path]) -> None:
    """Put new folders in the places of others, all or none.

    Args:
        made: the new folder for each target, on the same file system. A target need not exist.

    Raises:
        OSError: a folder cannot be moved; all targets are as they were, and so are the new ones.
    """
    recover(*made)
    try:
        for target in made:
            _put_aside(target)
        for target, new in made.items():
            os.rename(new, target)
    except BaseException:
        _undo(made)
        raise
    os.sync()  # the old ones go when the new ones are on the disk
    _forget(made)


def recover(*targets: Path) -> None:
    """Put right what a process left that was killed while it replaced these folders together."""
    _empty_trash(targets)
    if any(_aside(target).exists() for target in targets):
        if all(target.exists() for target in targets):
            _forget(targets)
        else:
            _undo(dict.fromkeys(targets))
            _empty_trash(targets)


def _put_aside(target: Path) -> None:
    if target.exists():
        os.rename(target, _aside(target))
    else:
        _aside(target).mkdir(parents=True)  # stands for a folder that was not there


def _undo(made: Mapping[Path, Path | None]) -> None:
    """Put back what was put aside; new folders go back where they were, or to be deleted.

    First they all go: as long as a target is missing, whoever comes next knows what to do.
    """
    aside = [target for target in made if _aside(target).exists()]
    for target in aside:
        if target.exists():
            os.rename(target, made[target] or _trash(target))
    for target in aside:
        if any(_aside(target).iterdir()):
            os.rename(_aside(target), target)
        else:
            _aside(target).rmdir()


def _forget(targets: Iterable[Path]) -> None:
    """Delete what was put aside. Renamed first: half of a folder must not pass for a whole one."""
    for target in targets:
        if _aside(target).exists():
            os.rename(_aside(target), _trash(target))
    _empty_trash(targets)


def _empty_trash(targets: Iterable[Path]) -> None:
    for target in targets:
        shutil.rmtree(_trash(target), ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.before")


def _trash(target: Path) -> Path:
    return target.with_name(f".{target.name}.trash")
