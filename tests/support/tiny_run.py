"""A run folder of tiny models after set-up and traces, one for each test to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

from profile_factory import tiny_profile

from djinn_lib.experiment.bench import Bench, set_up
from djinn_lib.experiment.profile import Cell

SYSTEMS = ("djinn", "pytorch_pinned", "pytorch_lru", "serverless", "vllm_sleep")


def prepare(root: Path) -> Bench:
    """Set up a run in a folder: six requests for two models, five systems."""
    profile = tiny_profile(
        systems={name: {"system": name} for name in SYSTEMS},
        capacities={"half": "1/2", "most": "3/4", "all": "64MiB"},
    )
    bench = set_up(profile, root / "run", root / "models", progress=lambda step: None)
    bench.write_traces()
    return bench


def copied(bench: Bench, to: Path) -> Bench:
    """A copy of what `prepare` made, models included."""
    root = bench.run_dir.parent
    shutil.copytree(root, to)
    machine = to / "run" / "machine.json"
    machine.write_text(machine.read_text().replace(str(root), str(to)))
    return Bench.open(bench.profile, to / "run")


def cell_of(bench: Bench, system: str, label: str = "all") -> Cell:
    """The cell of a system."""
    return bench.profile.cell("zipf", label, system)
