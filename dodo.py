"""Every papermill call of a run as a doit task, so that a rerun does only what changed.

    python -m djinn_lib.experiment.reproduce --profile cpu     # what `make reproduce` calls
    doit list --all                                 # the tasks, for those who know doit

The profile and the run's folder come from the environment: DJINN_PROFILE, DJINN_RUN_DIR.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from djinn_lib.experiment import large_results
from djinn_lib.experiment.begun import Begun, Inputs, file_inputs, value_input
from djinn_lib.experiment.integrity import files_are_as_set_up, recorded_digests
from djinn_lib.experiment.profile import Cell, Profile, load_profile
from djinn_lib.experiment.source_files import imported_files
from djinn_lib.experiment.tasks import (
    CellOutcome,
    is_settled,
    keep_outcome,
    kernel_for,
    notebook_of,
    run_cell_notebook,
    run_notebook,
)
from djinn_lib.paths import REFERENCE, REPO, STUDY, user_path
from djinn_lib.publishing.report import build_report
from djinn_lib.systems import SYSTEMS

PROFILE = load_profile(os.environ.get("DJINN_PROFILE", "cpu"))
RUN_DIR = user_path(
    os.environ.get("DJINN_RUN_DIR", REPO / "data" / "runs" / PROFILE.name), "DJINN_RUN_DIR"
).resolve()
DOIT_CONFIG = {"dep_file": str(RUN_DIR / ".doit.db"), "verbosity": 2}

LIB = REPO / "djinn_lib"
PARAMS = REPO / "params" / f"{PROFILE.name}.yml"
MACHINE = RUN_DIR / "machine.json"
TRACES = [RUN_DIR / "traces" / f"{name}.jsonl" for name in PROFILE.traces]
CELLS = PROFILE.all_cells()
ROWS = [RUN_DIR / "requests" / f"{cell.id}.parquet" for cell in CELLS]
# What this process has had run elsewhere, by the cell's id: its task only puts that in place.
OUTCOMES: dict[str, CellOutcome] = {}
# Cells that this process has run: it does not run them twice, whatever came of them.
TRIED: set[str] = set()
# What tasks are begun with, so that an edit while one runs does not pass for what it ran.
BEGUN = Begun()
LOADED = file_inputs(imported_files(LIB / "publishing" / "report.py"))
BASIC = {"profile": PROFILE.name, "run_dir": str(RUN_DIR)}


def notebook_task(notebook: str, file_dep: list[Path], targets: list[Path], **task: Any) -> dict:
    """A task that executes one notebook of its own name.

    It depends on the notebook, on all of the library that it imports, and on `file_dep`; with
    `reads_weights` also on the weights that the set-up saw.
    """
    parameters, checks = task.pop("parameters", BASIC), task.pop("uptodate", [])
    read = with_weights if task.pop("reads_weights", False) else file_inputs
    source = REPO / "notebooks" / f"{notebook}.ipynb"
    files = [source, PARAMS, *imported_files(source), *file_dep]
    inputs = partial(read, files)
    return {
        "actions": [(BEGUN.action(run_notebook, inputs), [notebook, RUN_DIR, parameters])],
        "file_dep": files,
        "targets": [RUN_DIR / "notebooks" / f"{notebook}.ipynb", *targets],
        "uptodate": [lambda: is_settled(RUN_DIR, notebook), BEGUN.still(inputs), *checks],
        **task,
    }


def with_weights(files: list[Path]) -> Inputs:
    """Return what a task is begun with that reads files and the models' weights."""
    return {**file_inputs(files), "weights": value_input(recorded_digests(MACHINE))}


def task_setup() -> dict:
    """00_setup: measure this machine, prepare the weights."""
    return notebook_task("00_setup", [], [MACHINE], uptodate=[lambda: files_are_as_set_up(MACHINE)])


def task_trace() -> dict:
    """01_trace: write the request traces."""
    return notebook_task("01_trace", [], TRACES, task_dep=["setup"])


def task_cell() -> Iterator[dict]:
    """02_run_system: one system on one trace at one capacity, a row a request.

    A cell depends on what its own system imports: an edit of the ring leaves PyTorch's rows alone,
    and one of a plot leaves all rows alone.
    """
    for i, (cell, rows) in enumerate(zip(CELLS, ROWS, strict=True), start=1):
        name = notebook_of(cell)
        yield {
            "name": cell.id,
            "actions": [cell_action(cell, f"cell {i} of {len(CELLS)}")],
            "file_dep": cell_files(cell),
            "targets": [rows, RUN_DIR / "notebooks" / f"{name}.ipynb"],
            "uptodate": [
                BEGUN.still(partial(inputs_of, cell, PROFILE)),
                lambda name=name, cell=cell: cell.id in TRIED or is_settled(RUN_DIR, name),
            ],
            "task_dep": ["setup", "trace"],
        }


def cell_files(cell: Cell) -> list[Path]:
    """The files that make a cell's rows, but for those of the profile and of the weights."""
    system = LIB / "systems" / f"{SYSTEMS[PROFILE.systems[cell.system].system][0]}.py"
    return [
        REPO / "notebooks" / "02_run_system.ipynb",
        RUN_DIR / "traces" / f"{cell.trace}.jsonl",
        *imported_files(LIB / "experiment" / "cell.py", system),
    ]


def inputs_of(cell: Cell, profile: Profile | None = None) -> Inputs:
    """Return what a cell is begun with: its files, its part of the profile, and the weights.

    The cell's process reads the profile's file itself, so the default is what that says now.
    """
    inputs = with_weights(cell_files(cell))
    try:
        profile = profile or load_profile(PROFILE.name)
        inputs[str(PARAMS)] = value_input(
            {
                "cell": profile.cell(
                    cell.trace, cell.capacity_label, cell.system, cell.mode
                ).model_dump(),
                "system": profile.systems[cell.system].model_dump(),
                "profile": profile.model_dump(exclude={"cells", "systems"}),
                "kernel": kernel_for(profile, cell),
            }
        )
    except (OSError, ValueError) as error:  # which the cell's process finds out as well
        inputs[str(PARAMS)] = str(error)
    return inputs


def cell_action(cell: Cell, place: str) -> tuple[Callable[..., Any], list[Any]]:
    """Run a cell here, or keep what it gave elsewhere."""
    act, arguments = run_cell_notebook, [PROFILE, cell, RUN_DIR, place]
    if outcome := OUTCOMES.get(cell.id):
        act, arguments = keep_outcome, [outcome, RUN_DIR]
    return BEGUN.action(act, partial(inputs_of, cell)), arguments


def task_sensitivity() -> dict:
    """03_sensitivity: speed-up and hit share against the capacity."""
    targets = [RUN_DIR / "figures" / f"sensitivity.{ending}" for ending in ("pdf", "png")]
    return read_only("03_sensitivity", targets)


def task_figures() -> dict:
    """04_figures: every other figure, from rows alone."""
    names = (
        "latency_cdf", "latency_breakdown", "decode_pace", "residency_over_time", "bytes_loaded",
        "zipf", "concurrent",
    )  # fmt: skip
    targets = [
        RUN_DIR / "figures" / f"{name}.{ending}" for name in names for ending in ("pdf", "png")
    ]
    return read_only("04_figures", targets)


def task_claims() -> dict:
    """05_claims: a verdict on every claim."""
    targets = [RUN_DIR / "claims.json", RUN_DIR / "comparison_summary.json"]
    return read_only("05_claims", targets, [REPO / "claims.yml"])


def task_policies() -> dict:
    """06_policies: the simulator beside measured rows, and policies beside the optimum."""
    names = ("simulator_validation", "policies_distance", "policies_capacity", "policies_queue")
    targets = [
        RUN_DIR / "figures" / f"{name}.{ending}" for name in names for ending in ("pdf", "png")
    ]
    file_dep = [REFERENCE / "engine.json", STUDY / "points.parquet"]
    return notebook_task("06_policies", file_dep, targets, parameters={"run_dir": str(RUN_DIR)})


def task_large_models() -> dict:
    """07_large_models: a model in a ring that is too small for it."""
    targets = [RUN_DIR / name for name in large_results.FILES]
    targets += [RUN_DIR / "figures" / f"large_models.{ending}" for ending in ("pdf", "png")]
    return notebook_task("07_large_models", [], targets, task_dep=["setup"], reads_weights=True)


def task_fleet() -> dict:
    """08_fleet: all models at once on one ring under vLLM, where there is vLLM."""
    targets = [RUN_DIR / "fleet.json"]
    targets += [RUN_DIR / "figures" / f"fleet.{ending}" for ending in ("pdf", "png")]
    return notebook_task("08_fleet", [], targets, task_dep=["setup"], reads_weights=True)


def task_explore() -> dict:
    """explore: the widgets, and the picture that they begin with."""
    parameters = {"figures_dir": str(RUN_DIR / "figures")}
    return notebook_task("explore", [REFERENCE / "engine.json"], [], parameters=parameters)


def read_only(notebook: str, targets: list[Path], extra: list[Path] | None = None) -> dict:
    """A task that reads rows and draws or judges."""
    file_dep = [*ROWS, REPO / "data" / "paper" / "results.json", *(extra or [])]
    return notebook_task(notebook, file_dep, targets, parameters={"run_dir": str(RUN_DIR)})


def task_report() -> dict:
    """index.html and the notebooks as HTML."""
    notebooks = ["00_setup", "01_trace", "03_sensitivity", "04_figures", "05_claims",
                 "06_policies", "07_large_models", "08_fleet", "explore"]  # fmt: skip
    notebooks += [notebook_of(cell) for cell in CELLS]
    files = [
        RUN_DIR / "claims.json",
        *imported_files(LIB / "publishing" / "report.py"),
        *(LIB / "publishing" / "templates").iterdir(),
        *[RUN_DIR / "notebooks" / f"{name}.ipynb" for name in notebooks],
    ]

    def loaded() -> Inputs:
        return {**file_inputs(files), **LOADED}

    return {
        "actions": [(BEGUN.action(report, loaded), [])],
        "file_dep": files,
        "targets": [RUN_DIR / "index.html"],
        "task_dep": [
            "sensitivity",
            "figures",
            "claims",
            "policies",
            "large_models",
            "fleet",
            "explore",
        ],
        "uptodate": [BEGUN.still(lambda: file_inputs(files))],
    }


def report() -> None:
    """Write the HTML pages."""
    print("index.html ...", flush=True)
    build_report(RUN_DIR)
