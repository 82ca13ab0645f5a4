"""Run a comparison or sweep that is described by a few options instead of a profile.

The options become a profile in the output folder, which `reproduce` runs with the usual notebooks,
rows and manifests. Results are also written in the form of the paper's scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import yaml

from djinn_lib.errors import ConfigError
from djinn_lib.experiment import paper_form
from djinn_lib.experiment.profile import Profile, checked, load_profile
from djinn_lib.experiment.reproduce import reproduce
from djinn_lib.experiment.run_folder import RunFolder
from djinn_lib.files import ensure_writable, write_text
from djinn_lib.rows import read_rows
from djinn_lib.trace import read_trace

Modes = Literal["sequential", "concurrent", "both"]
PAPER_GIB = 31.3  # of the paper's three models, of which a capacity without a GPU is a share
TRACE = "paper"  # label of the trace in the profile, by which notebooks find it


def compare(profile: Profile, output_dir: Path, executor: str = "local") -> int:
    """Run a profile from `describe`; return `reproduce`'s exit status.

    Args:
        profile: the systems, capacities and trace.
        output_dir: folder of the results; a second call continues there.
        executor: where cells run, "local" or "ray".

    Raises:
        ConfigError: the folder cannot be written to, or see `reproduce`.
        TraceError: the trace cannot be used.
    """
    ensure_writable(output_dir)
    path = (output_dir / f"{profile.name}.yml").resolve()
    fields = profile.model_dump(exclude={"name"}, exclude_none=True)
    plain = {key: value for key, value in fields.items() if value != {}}
    write_text(path, yaml.safe_dump(plain, sort_keys=False))
    profile = load_profile(str(path))
    profile.make_trace(TRACE)  # refused before anything runs
    cells = [f"cell:{cell.id}" for cell in profile.all_cells()]
    drawn = ["figures", *(["sensitivity"] if len(profile.capacities) > 1 else [])]
    if all(cell.mode == "concurrent" for cell in profile.all_cells()):
        drawn = []
        print("no figures: they compare requests one after another; --mode both has both")
    code = reproduce(str(path), output_dir, executor, [*cells, *drawn, "page"])
    write_paper_form(RunFolder(output_dir.resolve()), profile)
    return code


def describe(
    config: str,
    buffers_gb: Sequence[float],
    baselines: Sequence[str],
    mode: Modes = "sequential",
    trace_file: Path | None = None,
    repeats: int = 1,
    speed: float = 1.0,
) -> Profile:
    """Return the profile of a comparison of some systems on one trace.

    Args:
        config: a profile's name or file, or a configuration of the paper's scripts.
        buffers_gb: capacities in GiB; without a GPU, shares of `PAPER_GIB`.
        baselines: labels of the profile's systems, or the paper's names; "all" for those of its
            five that the profile has.
        mode: requests one after another, at their arrival, or both in turn.
        trace_file: in our form (.jsonl) or the paper's (.json); default is the paper's trace.
        repeats: how often each system serves the trace.
        speed: factor by which arrivals are faster in mode "concurrent".

    Raises:
        ConfigError: an option is invalid; the message says which.
    """
    base = _base(config)
    capacities = dict(_capacity(base, gb) for gb in buffers_gb)
    names = [name.strip() for name in baselines if name.strip()]
    if not names:
        raise ConfigError("no baseline is named; name one or more, or 'all'")
    if names == ["all"]:
        names = [name for name in paper_form.BASELINES if _known_label(base, name)]
    labels = [_label(base, name) for name in names]
    _check_speed(speed, mode)
    trace = {"kind": "file", "path": str(trace_file.resolve())} if trace_file else {"kind": "paper"}
    modes = ("sequential", "concurrent") if mode == "both" else (mode,)
    fields = {
        **base.model_dump(exclude={"cells", "large"}),
        "repeats": repeats,
        "capacities": capacities,
        "traces": {TRACE: trace},
        "systems": {label: base.systems[label] for label in labels},
        "cells": [
            {
                "traces": [TRACE],
                "capacities": list(capacities),
                "systems": labels,
                "mode": each,
                "speed": speed if each == "concurrent" else 1.0,
            }
            for each in modes
        ],
    }
    return checked(fields)


def write_paper_form(run: RunFolder, profile: Profile) -> None:
    """Write results of cells in the form of the paper's scripts.

    With several capacities each has a folder of its own.
    """
    cells = [run.cell(cell.id).rows for cell in profile.all_cells()]
    if found := [read_rows(path) for path in cells if path.exists()]:
        rows, labels = pd.concat(found), list(profile.capacities)
        for label in labels:
            folder = run.path if len(labels) == 1 else run.path / f"{label}gb"
            paper_form.write_results(paper_form.results_of(rows, TRACE, label), folder)
    if run.trace(TRACE).exists():
        trace = read_trace(run.trace(TRACE))
        paper_form.save_trace(trace, run.path / f"trace_n{len(trace)}.json")


def _base(config: str) -> Profile:
    """Return a profile; for a configuration of the paper's scripts, one with its models."""
    if not config.endswith((".yml", ".yaml")):
        return load_profile(config)
    try:
        fields = yaml.safe_load(Path(config).read_text())
        models = fields["models"]
        theirs = {name: entry["model_id"] for name, entry in models.items()}
    except OSError as error:
        raise ConfigError(
            f"{config!r} cannot be read ({error.strerror}): check the path"
        ) from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return load_profile(config)  # which says what is wrong with it
    base = load_profile("gpu")
    if unknown := [name for name in theirs if name not in base.models]:
        raise ConfigError(
            f"{config}: the models {unknown} have no counterpart in the paper; write a profile "
            f"like params/gpu.yml, or name models out of {list(base.models)}"
        )
    tokens = fields.get("experiment", {}).get("max_tokens", base.new_tokens)
    named = {name: {"stands_for": name, "hub_id": hub_id} for name, hub_id in theirs.items()}
    fields = base.model_dump(exclude={"traces", "cells", "large"})  # those name models of the base
    cell = {"traces": [TRACE], "capacities": [next(iter(base.capacities))], "systems": ["djinn"]}
    paper = {"traces": {TRACE: {"kind": "paper"}}, "cells": [cell]}
    return checked({**fields, **paper, "models": named, "new_tokens": tokens})


def _capacity(base: Profile, gb: float) -> tuple[str, str]:
    """Return label and size of a capacity: those of the profile if it has the label."""
    if not 0 < gb < 1 << 20:
        raise ConfigError(f"a buffer of {gb:g} GiB has no meaning: give a size above 0")
    label = f"{gb:g}"
    if label in base.capacities:
        return label, base.capacities[label]
    return label, f"{label}GiB" if base.device == "cuda" else f"{label}/{PAPER_GIB}"


def _label(base: Profile, name: str) -> str:
    """Return the label of the profile's system for a name."""
    if label := _known_label(base, name):
        return label
    theirs = [name for name in paper_form.BASELINES if _known_label(base, name)]
    own = [label for label in base.systems if label not in theirs]
    raise ConfigError(
        f"profile {base.name!r} has no baseline {name!r}: choose from {', '.join([*theirs, *own])}"
    )


def _known_label(base: Profile, name: str) -> str | None:
    labels = (paper_form.BASELINES.get(name, name), name)
    return next((label for label in labels if label in base.systems), None)


def _check_speed(speed: float, mode: Modes) -> None:
    if not speed > 0:
        raise ConfigError(f"expected a speed above 0, got {speed:g}")
    if mode == "sequential" and speed != 1:
        raise ConfigError(
            f"a speed of {speed:g} needs requests that arrive on their own: add --mode concurrent, "
            "or leave --speed out"
        )


def parse_sizes(text: str) -> list[float]:
    """Return sizes in GB from text such as "20,25,32,40".

    Raises:
        ConfigError: one of them is not a number.
    """
    parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
    try:
        return [float(part) for part in parts]
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of sizes; write for example 20,25,32,40") from error
