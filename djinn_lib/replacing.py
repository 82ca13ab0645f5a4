"""Replace several folders as one: either all old ones or all new ones remain.

The old folders are moved aside, the new ones into place, and then the old ones are deleted. An
error is undone at once. After a kill, the next run calls `recover`. It can tell the two states
apart, because nothing is deleted before every target exists again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path


def replace_folders(made: Mapping[Path, Path]) -> None:
    """Move new folders to their targets, all or none.

    Args:
        made: the new folder for each target, on the same file system. A target need not exist.

    Raises:
        OSError: a folder cannot be moved; all targets and new folders are as before.
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
    os.sync()  # delete the old folders only after the new ones are on disk
    _forget(made)


def recover(*targets: Path) -> None:
    """Repair the folders that a killed process was replacing together."""
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
        _aside(target).mkdir(parents=True)  # an empty folder marks that there was none before


def _undo(made: Mapping[Path, Path | None]) -> None:
    """Restore the old folders; move new ones back, or to the trash.

    All new folders are moved first. While a target is missing, `recover` knows that it must undo.
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
    """Delete the old folders, renamed first: no partial folder may look complete."""
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
