"""Where things are in this repository, and paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from djinn_lib.errors import ConfigError, shown

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO / "data" / "reference" / "h100"  # rows of our own run
NOTEBOOKS = REPO / "notebooks"
FIGURES = REPO / "figures"  # as published
STUDY = REPO / "data" / "reference" / "study"  # points of the study of policies
SOAKS = {  # kept results of benchmarks/soak.py
    "2 cores": REPO / "data" / "reference" / "cpu" / "soak.json",
    "one H100": REFERENCE / "soak.json",
}


def user_path(value: object, what: str = "a path") -> Path:
    """Return a path as a user writes it, with ``~`` as the home folder.

    Raises:
        ConfigError: it is no text or path, is empty, or names the home of nobody.
    """
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ConfigError(f"expected {what} as text or Path, got {shown(value)}")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"expected {what}, got {shown(value)}: {error}") from error


def python_path() -> str:
    """Return the PYTHONPATH by which other processes find this package, and all they found before.

    They are to inherit it. What is handed to Ray as a worker's environment is expanded there, so
    that a folder called `${X}` would not arrive.
    """
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(REPO), *filter(None, before)]))
