"""Execute the notebooks of a run that are not cells, when their inputs change.

A notebook is executed again if one of its inputs has changed, or if one of its output files is
missing. The executed copy keeps the digests of the inputs and the list of outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from djinn_lib.experiment.cells.cell_runs import report
from djinn_lib.experiment.cells.inputs import (
    LIBRARY,
    changed,
    digest,
    digest_files,
    duration,
    recorded_digests,
)
from djinn_lib.experiment.manifest import Status, keep_status, read_status
from djinn_lib.experiment.profile import Profile
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.experiment.setup.integrity import files_are_as_set_up
from djinn_lib.fleet import environment
from djinn_lib.paths import NOTEBOOKS, REFERENCE, REPO, STUDY

_DRAWING = ("analysis", "simulator", "metrics.py", "rows.py", "trace.py", "units.py")
_PAPER = REPO / "data" / "paper"
_MEASURED = ("requests", "replicates", "traces", "machine.json")


@dataclass(frozen=True)
class Step:
    """A notebook that a run executes once.

    Args:
        notebook: name of the notebook.
        code: files and folders of djinn_lib that it runs.
        data: files and folders of the repository that it reads.
        reads: files and folders of the run that it reads.
        gives: names of the parameters that it gets; see `parameters`.
        profile: fields of the profile that it depends on.
        measures: whether it runs models on their weights. If not, it may run at the same time as
            others.
        with_vllm: whether it does something else where vLLM is installed.
    """

    notebook: str
    code: tuple[str, ...]
    data: tuple[Path, ...] = ()
    reads: tuple[str, ...] = ()
    gives: tuple[str, ...] = ("run_dir",)
    profile: tuple[str, ...] = ()
    measures: bool = False
    with_vllm: bool = False

    @property
    def name(self) -> str:
        """Name of the step on the command line: "figures" for 04_figures."""
        return self.notebook.lstrip("0123456789_")

    def parameters(self, run: RunFolder, profile: Profile) -> dict[str, Any]:
        """Return the values of the notebook's parameters."""
        known = {
            "profile": profile.given,
            "run_dir": str(run.path),
            "figures_dir": str(run.figures),
        }
        return {name: known[name] for name in self.gives}

    def inputs(self, run: RunFolder, profile: Profile) -> dict[str, str]:
        """Return digests of all inputs of the notebook."""
        vllm = {"vLLM": digest(environment.unavailable())} if self.with_vllm else {}
        return {
            **vllm,
            "notebook": digest_files([NOTEBOOKS / f"{self.notebook}.ipynb"]),
            "code": digest_files(LIBRARY / part for part in self.code),
            "data": digest_files([*self.data, *(run.path / part for part in self.reads)], run.path),
            "profile": digest(profile.model_dump(include=set(self.profile))),
            "weights": digest(recorded_digests(run.machine) if self.measures else None),
        }

    def is_current(self, run: RunFolder, profile: Profile) -> bool:
        """Whether the executed copy is up to date."""
        status = read_status(run.notebook(self.notebook))
        return (
            status is not None
            and status.settled
            and all((run.path / name).exists() for name in status.left)
            and status.begun_with == self.inputs(run, profile)
        )


SETUP = Step(
    "00_setup",
    code=("experiment/bench.py", "experiment/setup/machine.py", "experiment/setup/weights.py",
          "engine/models/packing.py", "engine/models/checkpoint.py"),
    gives=("profile", "run_dir"),
    profile=("device", "dtype", "page", "models", "capacities"),
)  # fmt: skip
TRACE = Step(
    "01_trace",
    code=("trace.py", "experiment/bench.py", "analysis/plots/timeline.py"),
    gives=("profile", "run_dir"),
    profile=("models", "traces"),
)
START = Step(
    "00_start_here",
    code=("engine", "analysis/ring_view.py", "analysis/plots/style.py"),
    gives=(),
)  # fmt: skip
READING = (  # the longest first
    Step("08_fleet", ("engine", "fleet", "analysis/plots", "experiment/fleet_demo.py"),
         gives=("profile", "run_dir"), measures=True, with_vllm=True,
         profile=("device", "dtype", "page", "prompt_tokens", "models")),
    Step("07_large_models", ("engine", "analysis/plots", "experiment/large_models.py",
                             "experiment/large_results.py", "systems/accelerate.py"),
         gives=("profile", "run_dir"), measures=True,
         profile=("device", "dtype", "page", "prompt_tokens", "models", "large")),
    Step("06_policies", (*_DRAWING, "engine/memory/policies.py", "experiment/study.py"),
         (REFERENCE / "requests", REFERENCE / "engine.json", STUDY)),
    Step("04_figures", _DRAWING, (_PAPER,), _MEASURED),
    Step("05_claims", _DRAWING, (_PAPER, REPO / "claims.yml"), _MEASURED),
    Step("03_sensitivity", _DRAWING, (_PAPER,), _MEASURED),
    Step("explore", (*_DRAWING, "engine/memory/policies.py"), (REFERENCE / "engine.json",),
         gives=("figures_dir",)),
    START,
)  # fmt: skip
STEPS = (SETUP, TRACE, *READING)


def set_up(run: RunFolder, profile: Profile) -> list[Status]:
    """Execute the set-up and the traces unless they are current; return their statuses.

    The set-up is also executed again if a model's file has changed since. If the set-up fails, the
    traces are not executed.
    """
    ended = []
    if not (SETUP.is_current(run, profile) and files_are_as_set_up(run.machine)):
        ended.append(run_step(SETUP, run, profile))
    if not (ended and not ended[0].settled) and not TRACE.is_current(run, profile):
        ended.append(run_step(TRACE, run, profile))
    return ended


def run_step(step: Step, run: RunFolder, profile: Profile) -> Status:
    """Execute a notebook into the run folder, and keep the status in the executed copy."""
    if fork := profile.device == "cpu" or not step.measures:
        from djinn_lib.experiment.execution.kernels import import_ahead

        import_ahead()
    # It imports papermill, which takes seconds.
    from djinn_lib.experiment.execution.notebooks import execute

    before = read_status(run.notebook(step.notebook))
    took_s = before.seconds if before and before.settled else None
    print(f"{step.notebook} ({duration(took_s)}) ...", flush=True)
    begun, begin_s = step.inputs(run, profile), time.time()
    output, parameters = run.notebook(step.notebook), step.parameters(run, profile)
    status = execute(step.notebook, output, parameters, fork=fork)
    status = replace(status, begun_with=begun, left=_written_since(begin_s, run))
    with suppress(OSError, ValueError):  # on a full disk; without a status it runs again
        keep_status(status, output)
    report(status, changed(begun, step.inputs(run, profile)))
    return status


def run_steps(steps: Sequence[Step], run: RunFolder, profile: Profile) -> Iterator[Status]:
    """Execute the notebooks that are not current.

    Notebooks that measure run alone, the others in parallel. Yield the status of each when it ends.
    """
    stale = [step for step in steps if not step.is_current(run, profile)]
    for step in [step for step in stale if step.measures]:
        yield run_step(step, run, profile)
    if not (reading := [step for step in stale if not step.measures]):
        return
    from djinn_lib.experiment.execution.notebooks import side_by_side  # see `run_step`

    yield from side_by_side({s.notebook: partial(run_step, s, run, profile) for s in reading})


def _written_since(begin_s: float, run: RunFolder) -> list[str]:
    """List files of the run, except executed notebooks, written since `begin_s`.

    If notebooks run in parallel, the list may have files of another one. If such a file is deleted,
    both run again. Files that are not complete yet are left out, because they get another name.
    """
    places = [*run.path.glob("*.*"), *run.figures.glob("*"), *run.traces.glob("*")]
    complete = [p for p in places if p.name[0] != "." and p.suffix != ".partial" and p.is_file()]
    written = [p for p in complete if p.stat().st_mtime >= begin_s]
    return sorted(str(p.relative_to(run.path)) for p in written)
