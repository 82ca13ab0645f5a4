"""Read and write traces and results in the form of the paper's scripts.

Their trace is a JSON object whose ``agents`` have an ``agent_id``, a ``model`` and an
``arrival_time`` in seconds. Their result is an object with ``stats`` and ``results``, one for each
agent. Their agents also have prompts and think times, which our requests do not have.

Source: https://github.com/jaewan/Djinn, OSDI_Evaluation/exp1_semantic_scheduler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.errors import ConfigError, TraceError
from djinn_lib.files import write_json
from djinn_lib.metrics import attempted, by_request, latency, served
from djinn_lib.trace import Request, Trace, read_trace, write_trace

# Our systems, and the names of their baselines that do the same.
BASELINES = {
    "djinn": "djinn",
    "pytorch_pinned": "pytorch_pinned",
    "pytorch_pageable": "pytorch_pageable",
    "serverless": "serverless_warm",
    "vllm": "vllm_recreate",
}
_TRACE = "paper"
_THEIRS = {ours: theirs for theirs, ours in BASELINES.items()}


def load_trace(path: Path) -> Trace:
    """Read a trace in our form (``.jsonl``) or in theirs (``.json``).

    Raises:
        TraceError: the file is missing or is not a trace; the message says where.
    """
    if path.suffix != ".json":
        return read_trace(path)
    try:
        agents = json.loads(path.read_text())["agents"]
        asked = [(float(agent["arrival_time"]), str(agent["model"])) for agent in agents]
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(
            f"{path} is not a trace in the paper's form ({type(error).__name__}: {error}): give it "
            "'agents', each with an 'arrival_time' and a 'model'"
        ) from error
    if not asked or not all(math.isfinite(at_s) and at_s >= 0 and model for at_s, model in asked):
        raise TraceError(
            f"{path} needs one or more agents, each with a finite arrival time >= 0 and a model"
        )
    asked.sort(key=lambda pair: pair[0])
    requests = tuple(Request(i, at_s, model) for i, (at_s, model) in enumerate(asked))
    return Trace("file", {"file": path.name, "n": len(requests)}, requests)


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace: in ours if `path` ends in ``.jsonl``, in their form if it ends in ``.json``.

    Raises:
        ConfigError: it ends in something else.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{path} is no .jsonl or .json file; choose one of these endings")
    if path.suffix == ".jsonl":
        write_trace(trace, path)
        return
    agents = [
        {"agent_id": r.request, "model": r.model, "arrival_time": r.arrival_s}
        for r in trace.requests
    ]
    known = {key: value for key, value in trace.params.items() if key not in ("n", "models")}
    write_json(path, {"n_agents": len(agents), **known, "agents": agents})


def result(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the rows of one cell in the form of ``<system>_<mode>_results.json``.

    ``results`` has the requests of the first repeat. ``stats`` uses the mean over the repeats for
    each request.
    """
    ok = served(rows)
    first, n_repeats = rows[rows["repeat"] == 0], rows["repeat"].nunique()
    system = str(rows["system"].iloc[0])
    name = f"{_THEIRS.get(system, system)}_{rows['mode'].iloc[0]}"
    stats: dict[str, Any] = {
        "baseline": name,
        "completed": round(len(ok) / n_repeats),
        "failed": round((len(rows) - len(ok)) / n_repeats),
        "repeats": n_repeats,
    }
    for column in ("total_ms", "switch_ms") if len(ok) else ():
        found = latency(by_request(ok, column))
        stats |= {f"{key}_{column}": round(found[key], 3) for key in ("p50", "p99", "mean")}
    return {"stats": stats, "results": [_agent(row) for row in first.to_dict("records")]}


def _agent(row: dict[str, Any]) -> dict[str, Any]:
    agent = {"agent_id": row["request"], "model": row["model"], "success": row["ok"]}
    if not row["ok"]:
        return {**agent, "error": row["error"]}
    times = {key: round(row[key], 3) for key in ("switch_ms", "ttft_ms", "decode_ms", "total_ms")}
    return {**agent, **times, "output_tokens": row["n_tokens"]}


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return results by name in the form of ``comparison_summary.json``."""
    fields = ("p50_total_ms", "p99_total_ms", "mean_total_ms")
    return {
        name: {
            **{field: round(found["stats"][field]) for field in fields if field in found["stats"]},
            "completed": found["stats"]["completed"],
        }
        for name, found in results.items()
    }


def results_of(rows: pd.DataFrame, trace: str, capacity_label: str) -> dict[str, dict[str, Any]]:
    """Return the results of the cells of a trace and capacity, by their names.

    Only cells that start cold are included. Systems that cannot run on this machine have no result.
    """
    chosen = (rows["trace"] == trace) & (rows["capacity_label"] == capacity_label)
    cells = attempted(rows[chosen & (rows["start"] == "cold")])
    cells = cells.groupby(["system", "mode"], sort=False)
    results = [result(group) for _, group in cells]
    return {found["stats"]["baseline"]: found for found in results}


def write_run(
    rows: pd.DataFrame, traces: Mapping[str, Trace], capacity_label: str, folder: Path
) -> pd.DataFrame:
    """Write a run's results on the paper's trace at a capacity, and the trace, in the paper's form.

    ``comparison_summary.json`` goes to the folder, the rest to ``paper_form`` in it. Without the
    paper's trace there are no results.

    Returns:
        The content of ``comparison_summary.json``: one row for each system and mode.
    """
    found = results_of(rows, _TRACE, capacity_label)
    write_results(found, folder / "paper_form")
    if _TRACE in traces:
        save_trace(traces[_TRACE], folder / "paper_form" / "trace.json")
    write_json(folder / "comparison_summary.json", summary(found))
    return pd.DataFrame(summary(found)).T


def write_results(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write ``comparison_summary.json`` and a ``<system>_<mode>_results.json`` for each result."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in results.items():
        write_json(folder / f"{name}_results.json", found)
    write_json(folder / "comparison_summary.json", summary(results))
