"""Locations in this repository, and paths that users enter."""

from __future__ import annotations

import os
from pathlib import Path

from djinn_lib.errors import ConfigError, shown

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO / "data" / "reference" / "h100"  # rows of our published run
NOTEBOOKS = REPO / "notebooks"
RUNS = REPO / "data" / "runs"
FIGURES = REPO / "figures"  # the published figures
STUDY = REPO / "data" / "reference" / "study"  # points of the study of policies
SOAKS = {  # published results of benchmarks/soak.py
    "2 cores": REPO / "data" / "reference" / "cpu" / "soak.json",
    "one H100": REFERENCE / "soak.json",
}


def user_path(value: object, what: str = "a path") -> Path:
    """Return a path that a user entered, with ``~`` as the home folder.

    Raises:
        ConfigError: it is not a text or path, is empty, or names an unknown user's home.
    """
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ConfigError(f"expected {what} as text or Path, got {shown(value)}")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"expected {what}, got {shown(value)}: {error}") from error


def python_path() -> str:
    """Return a PYTHONPATH with this package, followed by the current entries.

    Set it in this process, so that others inherit it. Ray would expand variables in a worker's
    environment, which breaks a folder called `${X}`.
    """
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(REPO), *filter(None, before)]))
