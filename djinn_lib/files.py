"""Write files and replace folders as a whole: under a temporary name first, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from djinn_lib.errors import ConfigError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, sync it to disk, and rename it.

    Parent folders are created. A failure keeps the previous file and leaves nothing else.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. The message names `path`.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _about(path, error) from error


def _about(path: Path, error: OSError) -> OSError:
    """Return an error of the same class and number whose message names a path and a remedy."""
    if type(error).__module__ != "builtins":  # of a library: its class may need other arguments
        return error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free space on its disk" if full else "choose another path or correct its permissions"
    said = type(error)(f"{path} cannot be written ({error.strerror or error}): {remedy}")
    said.errno = error.errno  # without strerror and filename, Python prints the message alone
    return said


def write_text(path: Path, text: str) -> None:
    """Write text (UTF-8) atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as strict JSON, atomically.

    Raises:
        ValueError: a number is not finite, which JSON cannot represent.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def ensure_writable(folder: Path) -> None:
    """Create a folder if necessary, and check that files can be written there.

    Raises:
        ConfigError: they cannot.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"expected a folder that can be written to, got {folder} ({error.strerror}): "
            "choose another folder or correct its permissions"
        ) from error


def replace_folders(made: Mapping[Path, Path]) -> None:
    """Move new folders to their targets, all or none; what they replace is deleted.

    After a kill, an old folder may remain as ``.<name>.before`` next to its target.

    Args:
        made: the new folder for each target, on the same file system. A target need not exist.

    Raises:
        OSError: a folder cannot be moved; all targets are as before.
    """
    with ExitStack() as undo:
        for target, new in made.items():
            before = target.with_name(f".{target.name}.before")
            if target.exists():
                shutil.rmtree(before, ignore_errors=True)
                os.rename(target, before)
                undo.callback(os.rename, before, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(new, target)
            undo.callback(os.rename, target, new)
        undo.pop_all()
    for target in made:
        shutil.rmtree(target.with_name(f".{target.name}.before"), ignore_errors=True)
