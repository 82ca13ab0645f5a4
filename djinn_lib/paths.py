"""Where things are in this repository."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO / "data" / "reference" / "h100"  # rows of our own run
FIGURES = REPO / "figures"  # as published
STUDY = REPO / "data" / "reference" / "study"  # points of the study of policies
SOAKS = {  # kept results of benchmarks/soak.py
    "2 cores": REPO / "data" / "reference" / "cpu" / "soak.json",
    "one H100": REFERENCE / "soak.json",
}
