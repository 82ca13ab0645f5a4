"""Write files atomically: under a temporary name first, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from djinn_lib.errors import ConfigError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, sync it to disk, and rename it.

    Parent folders are created. A failure keeps the previous file and leaves nothing else.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text (UTF-8) atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as strict JSON, atomically.

    Raises:
        ValueError: a number is not finite, which JSON cannot represent.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def path_below(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder or below it.

    Raises:
        ConfigError: the name is invalid or leads out of the folder.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ConfigError(f"expected the name of a file below {folder}, got {name!r}")
    return folder / name


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
            "choose another run_dir or correct its permissions"
        ) from error
