"""Prepare and read what all cells of a run share: models, facts of the machine, traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.profile import REPO, Profile
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.experiment.setup.machine import describe_machine
from djinn_lib.experiment.setup.weights import prepare_models
from djinn_lib.files import ensure_writable, write_json
from djinn_lib.systems.base import ModelFiles
from djinn_lib.trace import Trace, check_models, write_trace
from djinn_lib.units import format_bytes, parse_bytes, parse_capacity

MODELS_DIR = REPO / "data" / "models"


@dataclass(frozen=True)
class Bench:
    """What all cells of a run share: its profile and folder, the models' files by name, and the
    facts of the machine that the set-up ran on.
    """

    profile: Profile
    run: RunFolder
    models: dict[str, ModelFiles]
    machine: dict[str, Any]

    @classmethod
    def open(cls, profile: Profile, run_dir: Path) -> Bench:
        """Read the results of the set-up notebook from the run folder.

        Raises:
            ConfigError: the set-up has not been run there, or was run with other models.
        """
        path = RunFolder(run_dir).machine
        if not path.exists():
            raise ConfigError(
                f"{run_dir} has no set-up ({path.name}): run notebook 00_setup first, or name the "
                "run_dir and profile of a run that has one"
            )
        try:
            state = json.loads(path.read_text())
            models = {name: ModelFiles(**{**files, "folder": Path(files["folder"])})
                      for name, files in state["models"].items()}  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"expected {path} from the set-up, got {error!r}: run notebook 00_setup again"
            ) from error
        if list(models) != list(profile.models):
            raise ConfigError(
                f"expected a set-up of the models {list(profile.models)} in {path}, got "
                f"{list(models)}: run notebook 00_setup again"
            )
        return cls(profile, RunFolder(run_dir), models, state["machine"])

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.run.path

    @property
    def total_bytes(self) -> int:
        """Bytes of all models together."""
        return sum(files.n_bytes for files in self.models.values())

    def capacity_bytes(self, label: str) -> int:
        """Capacity of a label in bytes."""
        return parse_capacity(self.profile.capacities[label], self.total_bytes)

    def models_table(self) -> pd.DataFrame:
        """One row a model: what it stands for, its size, its share of all weights."""
        return pd.DataFrame(
            {
                "model": name,
                "stands for": self.profile.models[name].stands_for,
                "dtype": files.dtype,
                "size": format_bytes(files.n_bytes),
                "share of all weights (%)": round(100 * files.n_bytes / self.total_bytes, 1),
            }
            for name, files in self.models.items()
        ).set_index("model")

    def capacities_table(self) -> pd.DataFrame:
        """One row a capacity label: size, frames, and the share of all weights that fits."""
        page_bytes = parse_bytes(self.profile.page)
        sizes = {label: self.capacity_bytes(label) for label in self.profile.capacities}
        return pd.DataFrame(
            {
                "label": label,
                "as written in the profile": self.profile.capacities[label],
                "size": format_bytes(n_bytes),
                "frames": n_bytes // page_bytes,
                "share of all weights (%)": round(100 * n_bytes / self.total_bytes, 1),
            }
            for label, n_bytes in sizes.items()
        ).set_index("label")

    def write_traces(self) -> dict[str, Trace]:
        """Generate and write every trace of the profile; return them by name."""
        traces = {name: self.profile.make_trace(name) for name in self.profile.traces}
        self.run.traces.mkdir(parents=True, exist_ok=True)
        for name, trace in traces.items():
            check_models(trace, self.models)
            write_trace(trace, self.run.trace(name))
        return traces


def set_up(
    profile: Profile,
    run_dir: Path,
    models_dir: Path = MODELS_DIR,
    progress: Callable[[str], None] = print,
) -> Bench:
    """Make the run folder, measure the machine and prepare the weights.

    Raises:
        ConfigError: the run folder cannot be written to.
        CheckpointError: a model's source is missing or broken.
    """
    ensure_writable(run_dir)
    progress("measuring this machine")
    facts = describe_machine(profile.device)
    files = prepare_models(profile, models_dir, progress)
    state = {
        "machine": facts,
        "models": {
            name: {**asdict(f), "folder": str(f.folder.resolve())} for name, f in files.items()
        },
    }
    run = RunFolder(run_dir)
    write_json(run.machine, state)
    return Bench(profile, run, files, facts)
