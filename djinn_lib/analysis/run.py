"""A run's folder as one object: everything that figures, claims and the report read of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib.analysis.claim_metrics import Evidence
from djinn_lib.analysis.evidence import machines_of, side_by_side
from djinn_lib.analysis.replicates import read_replicates
from djinn_lib.analysis.tables import machine_names, machine_numbers
from djinn_lib.engine.decode.modes import default_decode
from djinn_lib.errors import RecordError
from djinn_lib.metrics import sequential
from djinn_lib.paths import REPO, user_path
from djinn_lib.rows import no_rows, read_manifest, read_run
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.trace import Trace, read_trace

PUBLISHED = REPO / "data" / "paper" / "results.json"


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        folder: of the run.
        rows: one row a request, of every cell.
        machine: facts of `machine.json`: names, sizes, versions, measured rates.
        traces: by name.
        manifests: by cell id; where each cell's rows come from.
        replicates: rows of what else was measured of the same cells; often none.
        replicate_manifests: of these, by run id.
        listed_machines: entries of "machines" in machine.json, which name the machines of a run
            that was merged from parts.
    """

    folder: Path
    rows: pd.DataFrame
    machine: Mapping[str, Any]
    traces: Mapping[str, Trace]
    manifests: Mapping[str, Mapping[str, Any]]
    replicates: pd.DataFrame = field(default_factory=no_rows)
    replicate_manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    listed_machines: Sequence[Mapping[str, Any]] = ()

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
        """Bytes of each model that are on the device when nothing of it is missing, by system."""
        of_run = {manifest["run_id"]: manifest["models"] for manifest in self.manifests.values()}
        systems = self.rows.drop_duplicates("run_id").set_index("run_id")["system"]
        return {
            str(system): {
                model: int(facts.get("device_bytes", facts["bytes"]))
                for model, facts in of_run.get(run_id, {}).items()
            }
            for run_id, system in systems.items()
        }

    @cached_property
    def other_steps(self) -> frozenset[str]:
        """Systems that decode by other steps than transformers' own, by their label."""
        return self._labels(_has_other_steps)

    @cached_property
    def other_processes(self) -> frozenset[str]:
        """Systems that decode in processes of their own, not in the cell's, by their label."""
        return self._labels(_has_other_processes)

    def _labels(self, which: Callable[[Mapping[str, Any]], bool]) -> frozenset[str]:
        """Labels of the systems of which a cell's manifest is as asked for."""
        cells = {manifest["run_id"]: manifest for manifest in self.manifests.values()}
        systems = self.rows.drop_duplicates("run_id").set_index("run_id")["system"]
        return frozenset(
            str(label) for run_id, label in systems.items()
            if run_id in cells and which(cells[run_id])
        )  # fmt: skip

    @cached_property
    def needed_sizes(self) -> dict[str, int]:
        """Bytes of each model that any system needs on the device: the least of all."""
        every = [self.sizes, *filter(None, self.device_sizes.values())]
        return {model: min(sizes[model] for sizes in every) for model in self.sizes}

    @cached_property
    def page_bytes(self) -> int:
        """Size of a page of the ring; of the cells of the system "djinn" if there are any."""
        by_system = {cell.rpartition("-")[2]: m for cell, m in self.manifests.items()}
        manifest = by_system.get("djinn") or next(iter(self.manifests.values()), None)
        if manifest is None:
            raise RecordError(f"expected manifests in {self.folder / 'requests'}, got none")
        return int(manifest["parameters"]["page_bytes"])

    @property
    def all_manifests(self) -> dict[str, Mapping[str, Any]]:
        """Manifests of the cells, by cell id, and of their replicates, by run id."""
        return {**self.manifests, **self.replicate_manifests}

    @cached_property
    def machine_numbers(self) -> dict[str, int]:
        """Which machine ran what, by the keys of `all_manifests`, from 1 on.

        There is more than one where parts were merged.
        """
        return machine_numbers(self.all_manifests)

    @cached_property
    def machine_names(self) -> dict[int, str]:
        """What the machines are called, by number: as in machine.json, if it lists them."""
        return machine_names(self.all_manifests, self.listed_machines)

    @property
    def failures(self) -> pd.DataFrame:
        """The failed requests, without those of systems that cannot run on this machine."""
        return self.rows[~self.rows["ok"] & (self.rows["error_kind"] != "unavailable")]

    def cells(self, trace: str = "paper", capacity_label: str | None = None) -> pd.DataFrame:
        """Return the rows of one trace, at one capacity or at all of them, served in sequence.

        Raises:
            RecordError: there are none.
        """
        rows = self.other_cells(trace, capacity_label)
        if rows.empty:
            found = sorted(set(zip(self.rows["trace"], self.rows["capacity_label"], strict=True)))
            raise RecordError(
                f"expected rows of trace {trace!r} at capacity {capacity_label or 'any'}, "
                f"got rows of {found}"
            )
        return rows

    def other_cells(self, trace: str, capacity_label: str | None = None) -> pd.DataFrame:
        """Return what `cells` does, but no rows where a run has none instead of an error."""
        rows = sequential(self.rows)
        rows = rows[rows["trace"] == trace]
        return rows if capacity_label is None else rows[rows["capacity_label"] == capacity_label]

    def concurrent_cells(self, trace: str = "paper", capacity_label: str = "25") -> pd.DataFrame:
        """Return the rows of one trace at one capacity whose requests were sent as they arrived.

        They are empty where a run has none.
        """
        rows = self.rows[self.rows["mode"] == "concurrent"]
        return rows[(rows["trace"] == trace) & (rows["capacity_label"] == capacity_label)]

    def sweep(self, trace: str = "paper", baseline: str = "pytorch_pinned") -> pd.DataFrame:
        """Return the rows of the systems that were run at more than one capacity, if any were.

        The baseline is among them wherever it was run, so that an unfinished run can be looked at.
        At each capacity they are rows of one machine, where one ran all that were run there.

        Raises:
            RecordError: there are none.
        """
        rows = self.cells(trace)
        swept = rows.groupby("system")["capacity_label"].transform("nunique") > 1
        rows = rows[swept | (rows["system"] == baseline)] if swept.any() else rows
        return pd.concat([self._beside(rows[rows["capacity_label"] == label], trace, str(label))
                          for label in rows["capacity_label"].unique()])  # fmt: skip

    def _beside(self, rows: pd.DataFrame, trace: str, label: str) -> pd.DataFrame:
        """Rows of one capacity, those that some machine served for all systems where there are."""
        unavailable = rows["error_kind"] == "unavailable"
        systems = [str(name) for name in rows.loc[~unavailable, "system"].unique()]
        found = side_by_side(self.evidence, systems, trace=trace, capacity_label=label)
        return pd.concat([*found.values(), rows[unavailable]])

    def machines_of(self, rows: pd.DataFrame) -> str:
        """Say which machines served rows, by their names; "0" where it is not known."""
        numbers = machines_of(self.evidence, rows)
        return ", ".join(self.machine_names.get(number, str(number)) for number in numbers)

    def least_bytes(self, trace: str, capacity_label: str) -> int:
        """Return the least bytes that any system must load for a trace at a capacity.

        Raises:
            RecordError: there are no rows of that trace and capacity.
        """
        capacity_bytes = int(self.cells(trace, capacity_label)["capacity_bytes"].iloc[0])
        return optimal_bytes(self.traces[trace], self.needed_sizes, capacity_bytes)

    def compulsory_bytes(self, trace: str) -> int:
        """Return the bytes that are needed of every model that a trace asks for, each once."""
        return sum(self.needed_sizes[model] for model in self.traces[trace].models)

    @property
    def evidence(self) -> Evidence:
        """What claims are judged by."""
        return Evidence(
            self.rows, self.machine, self.sizes, self.page_bytes, self.traces, self.device_sizes,
            self.other_steps, self.replicates,
            {m["run_id"]: self.machine_numbers[key] for key, m in self.all_manifests.items()},
            self.machine_names,
        )  # fmt: skip

    def link_floor(self) -> pd.DataFrame:
        """One row a model: its size, and the least milliseconds that loading it whole can take."""
        rate = self.machine["link_rate_bytes_per_s"]
        table = pd.DataFrame({"bytes": self.sizes})
        table["ms_at_link_rate"] = table["bytes"] / rate * 1e3
        return table.rename_axis("model")


def _has_other_processes(manifest: Mapping[str, Any]) -> bool:
    """Whether a cell's system starts a process for each model."""
    return manifest["system"] == "ray_actors" or manifest["system"].startswith("vllm")


def _has_other_steps(manifest: Mapping[str, Any]) -> bool:
    """Whether a cell did not decode by transformers' own steps."""
    if manifest["system"] != "djinn":
        return manifest["system"].startswith("vllm")
    default = default_decode(manifest["machine"]["device"])
    return manifest["options"].get("decode", default) != "eager"


def load_run(run_dir: Path | str) -> Run:
    """Read a run's folder and check everything in it.

    Raises:
        RecordError: rows, manifests or the machine's facts are missing or broken.
        TraceError: a trace is broken.
    """
    folder = user_path(run_dir).resolve()
    rows = read_run(folder)
    requests = folder / "requests"
    manifests = {
        path.name.removesuffix(".manifest.json"): read_manifest(path)
        for path in sorted(requests.glob("*.manifest.json"))
    }
    traces = {path.stem: read_trace(path) for path in sorted((folder / "traces").glob("*.jsonl"))}
    machine, listed = _read_machines(folder)
    return Run(folder, rows, machine, traces, manifests, *read_replicates(folder), listed)


def read_machine(run_dir: Path) -> dict[str, Any]:
    """Return the facts that the set-up noted of the machine.

    Raises:
        RecordError: the set-up has not been run, or its file is broken.
    """
    return _read_machines(run_dir)[0]


def _read_machines(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the facts of machine.json, and the machines that it lists: none if not merged."""
    path = run_dir / "machine.json"
    try:
        state = json.loads(path.read_text())
        return state["machine"], state.get("machines", [])
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(
            f"expected the machine's facts in {path}, got {error!r}: run notebook 00_setup first"
        ) from error


def published(path: Path = PUBLISHED) -> dict[str, Any]:
    """Return the paper's published numbers.

    Raises:
        RecordError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(
            f"expected the paper's numbers in {path}, got {error}: restore the file from the "
            "repository"
        ) from error
