"""Read a run's folder into one object, for figures, claims and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.errors import RecordError
from djinn_lib.experiment.manifest import read_manifest
from djinn_lib.metrics import sequential
from djinn_lib.paths import REPO, user_path
from djinn_lib.rows import no_rows, read_cells, read_run
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.trace import Trace, read_trace

PAPER = REPO / "data" / "paper" / "results.json"
REPLICATES = "replicates"  # the folder of cells that were measured more than once
SHARED = " (shared)"  # marks the names of machines of which another GPU was in use
Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The results of a run.

    Attributes:
        folder: folder of the run.
        rows: one row for each request of every cell.
        machine: facts of `machine.json`: names, sizes, versions, measured rates.
        traces: by name.
        manifests: by cell id; the origin of each cell's rows.
        replicates: rows of the same cells, measured on other machines or at other times. They show
            how much a result depends on the machine, and allow comparisons on one machine.
        replicate_manifests: manifests of the replicates, by run id.
        listed_machines: entries of "machines" in machine.json, which name the machines of a run
            that was merged from parts.
    """

    folder: Path
    rows: pd.DataFrame
    machine: Mapping[str, Any]
    traces: Mapping[str, Trace]
    manifests: Mapping[str, Manifest]
    replicates: pd.DataFrame = field(default_factory=no_rows)
    replicate_manifests: Mapping[str, Manifest] = field(default_factory=dict)
    listed_machines: Sequence[Mapping[str, Any]] = ()

    @property
    def has_clocks(self) -> bool:
        """Whether times can be judged; on a shared CPU they are too noisy."""
        return self.machine.get("device") != "cpu"

    # -- weights -----------------------------------------------------------------------------

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the weights of each model.

        Raises:
            RecordError: cells were run with different weights, so their rows cannot be compared.
        """
        sizes: dict[str, int] = {}
        for cell, manifest in self.manifests.items():
            for model, facts in manifest["models"].items():
                if sizes.setdefault(model, int(facts["bytes"])) != facts["bytes"]:
                    raise RecordError(
                        f"expected every cell to use {sizes[model]} bytes of weights of {model!r}, "
                        f"got {facts['bytes']} in {cell}: run the cells again with one profile"
                    )
        return sizes

    @cached_property
    def device_sizes(self) -> dict[str, dict[str, int]]:
        """Bytes of each model on the device when it is completely loaded, by system."""
        return {
            system: {
                model: int(facts.get("device_bytes", facts["bytes"]))
                for model, facts in manifest["models"].items()
            }
            for system, manifest in self._of_systems
        }

    @cached_property
    def needed_sizes(self) -> dict[str, int]:
        """Bytes of each model that any system needs on the device: the least of all."""
        every = [self.sizes, *filter(None, self.device_sizes.values())]
        return {model: min(sizes[model] for sizes in every) for model in self.sizes}

    def least_bytes(self, trace: str, capacity_label: str) -> int:
        """Return the least bytes that any system must load for a trace at a capacity.

        Raises:
            RecordError: there are no rows of that trace and capacity.
        """
        capacity_bytes = int(self.cells(trace, capacity_label)["capacity_bytes"].iloc[0])
        return optimal_bytes(self.traces[trace], self.needed_sizes, capacity_bytes)

    def compulsory_bytes(self, trace: str) -> int:
        """Return the bytes of all models of a trace, each counted once."""
        return sum(self.needed_sizes[model] for model in self.traces[trace].models)

    # -- systems and machines ----------------------------------------------------------------

    @cached_property
    def other_steps(self) -> frozenset[str]:
        """Labels of the systems that decode by other steps than transformers' own.

        Their arithmetic rounds differently, so they sometimes choose another token.
        """
        return self._labels(_has_other_steps)

    @cached_property
    def other_processes(self) -> frozenset[str]:
        """Labels of the systems that decode in processes of their own, not in the cell's."""
        return self._labels(lambda m: m["system"] == "ray_actors" or _runs_vllm(m))

    def _labels(self, which: Callable[[Manifest], bool]) -> frozenset[str]:
        return frozenset(system for system, manifest in self._of_systems if which(manifest))

    @cached_property
    def _of_systems(self) -> list[tuple[str, Manifest]]:
        """The label and the manifest of every cell."""
        of_run = {manifest["run_id"]: manifest for manifest in self.manifests.values()}
        cells = self.rows.drop_duplicates("run_id")
        return [(str(system), of_run[run_id])
                for run_id, system in zip(cells["run_id"], cells["system"], strict=True)
                if run_id in of_run]  # fmt: skip

    @property
    def all_manifests(self) -> dict[str, Manifest]:
        """Manifests of the cells, by cell id, and of their replicates, by run id."""
        return {**self.manifests, **self.replicate_manifests}

    @cached_property
    def machine_numbers(self) -> dict[str, int]:
        """Number of the machine of each run id, from 1 on, in the order of their first cells.

        Machines of one kind are distinguished by the UUID of their GPU; in older rows, by the rates
        of their set-ups. Merged runs have several machines.
        """
        numbers: dict[str, int] = {}
        in_order = sorted(self.all_manifests.values(), key=lambda m: m["started_at_utc"])
        return {m["run_id"]: numbers.setdefault(_identity(m), len(numbers) + 1) for m in in_order}

    @cached_property
    def shared_machines(self) -> set[int]:
        """Numbers of the machines that ran a cell while another GPU of their host was in use."""
        return {self.machine_numbers[m["run_id"]] for m in self.all_manifests.values()
                if m.get("busy_neighbours")}  # fmt: skip

    @cached_property
    def machine_names(self) -> dict[int, str]:
        """Names of machines, by number: the UUID of the GPU if it is known.

        Otherwise they are the names in machine.json, if it lists them. Shared ones are marked.
        """
        parts: dict[str, str] = {}
        for entry in self.listed_machines:
            parts.setdefault(_facts(entry["machine"]), str(entry["part"]))
        return {
            number: (
                (m.get("gpu_uuid") or "")[:12]  # "GPU-" and eight digits
                or parts.get(_facts(m["machine"]), str(number))
            )
            + SHARED * (number in self.shared_machines)
            for m in self.all_manifests.values()
            for number in [self.machine_numbers[m["run_id"]]]
        }

    def machines_of(self, rows: pd.DataFrame) -> str:
        """Return the names of the machines that served rows; "0" if unknown."""
        numbers = sorted({self.machine_numbers.get(str(i), 0) for i in rows["run_id"].unique()})
        return ", ".join(self.machine_names.get(number, str(number)) for number in numbers)

    def placed(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return rows with a column `place`: the name of the machine of each, for captions."""
        names = {run_id: self.machine_names[number]
                 for run_id, number in self.machine_numbers.items()}  # fmt: skip
        return rows.assign(place=rows["run_id"].map(names).fillna("unknown"))

    # -- rows --------------------------------------------------------------------------------

    @cached_property
    def every_row(self) -> pd.DataFrame:
        """All rows, including replicates."""
        if self.replicates.empty:
            return self.rows
        return pd.concat([self.rows, self.replicates], ignore_index=True)

    @property
    def failures(self) -> pd.DataFrame:
        """The failed requests, without those of systems that cannot run on this machine."""
        return self.rows[~self.rows["ok"] & (self.rows["error_kind"] != "unavailable")]

    def cells(self, trace: str = "paper", capacity_label: str | None = None) -> pd.DataFrame:
        """Return the rows of one trace from a cold start, at one capacity or all, in sequence.

        Raises:
            RecordError: there are none.
        """
        rows = self.other_cells(trace, capacity_label)
        if rows.empty:
            found = sorted(set(zip(self.rows["trace"], self.rows["capacity_label"], strict=True)))
            raise RecordError(
                f"expected rows of trace {trace!r} at capacity {capacity_label or 'any'}, "
                f"got rows of {found}: run those cells, or choose one of these"
            )
        return rows

    def other_cells(self, trace: str, capacity_label: str | None = None) -> pd.DataFrame:
        """Like `cells`, but return an empty table instead of an error."""
        rows = sequential(self.rows)
        rows = rows[(rows["trace"] == trace) & (rows["start"] == "cold")]
        return rows if capacity_label is None else rows[rows["capacity_label"] == capacity_label]

    def concurrent_cells(self, trace: str = "paper", capacity_label: str = "25") -> pd.DataFrame:
        """Return the rows of one trace and capacity whose requests were sent as they arrived.

        The table is empty if there are none.
        """
        rows = self.rows[(self.rows["mode"] == "concurrent") & (self.rows["start"] == "cold")]
        return rows[(rows["trace"] == trace) & (rows["capacity_label"] == capacity_label)]

    def link_floor(self) -> pd.DataFrame:
        """One row a model: its size, and the least milliseconds that loading it whole can take."""
        rate = self.machine["link_rate_bytes_per_s"]
        sizes = pd.Series(self.sizes).rename_axis("model")
        return pd.DataFrame(
            {"size (GiB)": sizes / 2**30, "at the link rate (ms)": sizes / rate * 1e3}
        )


def _has_other_steps(manifest: Manifest) -> bool:
    """Whether a cell did not decode by transformers' own steps."""
    if _runs_vllm(manifest):
        return True
    if manifest["system"] != "djinn":
        return manifest["options"].get("decode", "eager") != "eager"  # a baseline with our decoder
    default = "compiled" if manifest["machine"]["device"] == "cuda" else "eager"
    return manifest["options"].get("decode", default) != "eager"


def _runs_vllm(manifest: Manifest) -> bool:
    return "vllm" in manifest["system"]


def _identity(manifest: Manifest) -> str:
    return manifest.get("gpu_uuid") or _facts(manifest["machine"])


def _facts(machine: Mapping[str, Any]) -> str:
    """Return the facts that identify a machine, as text, without package versions."""
    facts = {name: value for name, value in machine.items() if name != "versions"}
    return json.dumps(facts, sort_keys=True)


def load_run(run_dir: Path | str) -> Run:
    """Read a run's folder and check everything in it.

    Raises:
        RecordError: rows, manifests or the machine's facts are missing or broken.
        TraceError: a trace is broken.
    """
    folder = user_path(run_dir).resolve()
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder}: check the path of the run")
    rows = read_run(folder)
    manifests = {
        path.name.removesuffix(".manifest.json"): read_manifest(path)
        for path in sorted((folder / "requests").glob("*.manifest.json"))
    }
    traces = {path.stem: read_trace(path) for path in sorted((folder / "traces").glob("*.jsonl"))}
    again = {path: read_manifest(path.with_suffix(".manifest.json"))
             for path in sorted((folder / REPLICATES).glob("*.parquet"))}  # fmt: skip
    machine = read_machine(folder)
    return Run(
        folder, rows, machine["machine"], traces, manifests,
        read_cells(list(again)) if again else no_rows(),
        {manifest["run_id"]: manifest for manifest in again.values()},
        machine.get("machines", []),
    )  # fmt: skip


def read_machine(run_dir: Path) -> dict[str, Any]:
    """Return machine.json: "machine", "models", and "machines" where parts were merged.

    Raises:
        RecordError: the set-up has not been run, or its file is broken.
    """
    path = run_dir / "machine.json"
    if not path.exists():
        raise RecordError(
            f"{path.parent} has no set-up ({path.name}): check the path, or run notebook 00_setup "
            "first"
        )
    try:
        state = json.loads(path.read_text())
        return {**state, "machine": state["machine"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"expected the machine's facts in {path}, got {error!r}: run notebook 00_setup again"
        ) from error


def published() -> dict[str, Any]:
    """Return the paper's published numbers."""
    return json.loads(PAPER.read_text())
