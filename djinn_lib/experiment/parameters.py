"""Check the parameters in the first cell of a notebook before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from djinn_lib.errors import ConfigError
from djinn_lib.paths import user_path


def folder(value: object, name: str = "run_dir", must_exist: bool = False) -> Path:
    """Return a parameter that names a folder as a path.

    Raises:
        ConfigError: the value is not text or a path, is empty, names something other than a folder,
            or a folder that `must_exist` and does not.
    """
    path = user_path(value, f"a folder as {name}")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"expected a folder as {name}, got the file {path}")
    if must_exist and not path.exists():
        raise ConfigError(f"expected a folder that exists as {name}, got {path}: check the path")
    return path


def one_of(value: object, known: Iterable[str], name: str) -> str:
    """Return a parameter that must be one of the known names.

    Raises:
        ConfigError: it is not one of them.
    """
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise ConfigError(f"expected {name} out of {names}, got {value!r}")
    return value


def label(value: object) -> str:
    """Return a label of a capacity as text; papermill's ``-p`` may have made it a number.

    Raises:
        ConfigError: it is neither text nor a number.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    raise ConfigError(f"expected a label of a capacity such as '25', got {value!r}")
