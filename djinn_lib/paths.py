"""Where things are in this repository."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO / "data" / "reference" / "h100"  # rows of our own run
FIGURES = REPO / "figures"  # as published
STUDY = REPO / "data" / "reference" / "study"  # points of the study of policies
SOAKS = {  # kept results of benchmarks/soak.py
    "2 cores": REPO / "data" / "reference" / "cpu" / "soak.json",
    "one H100": REFERENCE / "soak.json",
}


def python_path() -> str:
    """Return the PYTHONPATH by which other processes find this package, and all they found before.

    They are to inherit it. What is handed to Ray as a worker's environment is expanded there, so
    that a folder called `${X}` would not arrive.
    """
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(REPO), *filter(None, before)]))
