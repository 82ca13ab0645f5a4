"""Every papermill call of a run as a doit task, so that a rerun does only what changed.

    python -m djinn_lib.reproduce --profile cpu     # what `make reproduce` calls
    doit list --all                                 # the tasks, for those who know doit

The profile and the run's folder come from the environment: DJINN_PROFILE, DJINN_RUN_DIR.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from doit.tools import config_changed

from djinn_lib import large_results
from djinn_lib.arguments import user_path
from djinn_lib.paths import REFERENCE, REPO, STUDY
from djinn_lib.profile import Cell, load_profile
from djinn_lib.report import build_report
from djinn_lib.source_files import imported_files
from djinn_lib.systems import SYSTEMS
from djinn_lib.tasks import (
    CellOutcome,
    is_settled,
    keep_outcome,
    kernel_for,
    run_cell_notebook,
    run_notebook,
)

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
BASIC = {"profile": PROFILE.name, "run_dir": str(RUN_DIR)}


def notebook_task(notebook: str, file_dep: list[Path], targets: list[Path], **task: Any) -> dict:
    """A task that executes one notebook of its own name.

    It depends on the notebook, on all of the library that it imports, and on `file_dep`.
    """
    parameters = task.pop("parameters", BASIC)
    source = REPO / "notebooks" / f"{notebook}.ipynb"
    return {
        "actions": [(run_notebook, [notebook, RUN_DIR, parameters])],
        "file_dep": [source, PARAMS, *imported_files(source), *file_dep],
        "targets": [RUN_DIR / "notebooks" / f"{notebook}.ipynb", *targets],
        "uptodate": [lambda: is_settled(RUN_DIR, notebook)],
        **task,
    }


def task_setup() -> dict:
    """00_setup: measure this machine, prepare the weights."""
    return notebook_task("00_setup", [], [MACHINE])


def task_trace() -> dict:
    """01_trace: write the request traces."""
    return notebook_task("01_trace", [], TRACES, task_dep=["setup"])


def task_cell() -> Iterator[dict]:
    """02_run_system: one system on one trace at one capacity, a row a request.

    A cell depends on what its own system imports: an edit of the ring leaves PyTorch's rows alone,
    and one of a plot leaves all rows alone.
    """
    for i, (cell, rows) in enumerate(zip(CELLS, ROWS, strict=True), start=1):
        name = f"02_run_system.{cell.id}"
        entry = PROFILE.systems[cell.system]
        system = LIB / "systems" / f"{SYSTEMS[entry.system][0]}.py"
        yield {
            "name": cell.id,
            "actions": [cell_action(cell, f"cell {i} of {len(CELLS)}")],
            "file_dep": [
                REPO / "notebooks" / "02_run_system.ipynb",
                RUN_DIR / "traces" / f"{cell.trace}.jsonl",
                *imported_files(LIB / "cell.py", system),
            ],
            "targets": [rows, RUN_DIR / "notebooks" / f"{name}.ipynb"],
            "uptodate": [
                config_changed(
                    {
                        "cell": cell.model_dump(),
                        "system": entry.model_dump(),
                        "profile": PROFILE.model_dump(exclude={"cells", "systems"}),
                        "kernel": kernel_for(PROFILE, cell),
                    }
                ),
                lambda name=name, cell=cell: cell.id in TRIED or is_settled(RUN_DIR, name),
            ],
            "task_dep": ["setup", "trace"],
        }


def cell_action(cell: Cell, place: str) -> tuple[Callable[..., bool], list[Any]]:
    """Run a cell here, or keep what it gave elsewhere."""
    if outcome := OUTCOMES.get(cell.id):
        return keep_outcome, [outcome, RUN_DIR]
    return run_cell_notebook, [PROFILE, cell, RUN_DIR, place]


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
    return notebook_task("07_large_models", [], targets, task_dep=["setup"])


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
                 "06_policies", "07_large_models", "explore"]  # fmt: skip
    notebooks += [f"02_run_system.{cell.id}" for cell in CELLS]
    return {
        "actions": [(report, [])],
        "file_dep": [
            RUN_DIR / "claims.json",
            *imported_files(LIB / "report.py"),
            *(LIB / "templates").iterdir(),
            *[RUN_DIR / "notebooks" / f"{name}.ipynb" for name in notebooks],
        ],
        "targets": [RUN_DIR / "index.html"],
        "task_dep": ["sensitivity", "figures", "claims", "policies", "large_models", "explore"],
    }


def report() -> None:
    """Write the HTML pages."""
    print("index.html ...", flush=True)
    build_report(RUN_DIR)
