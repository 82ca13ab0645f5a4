"""Results of a run as short tables of text: systems, capacities, steps of the ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from djinn_lib.analysis.decomposition import decomposition
from djinn_lib.analysis.plots.sensitivity import speedup_table
from djinn_lib.analysis.plots.style import order_systems, split_unavailable, system_look
from djinn_lib.analysis.run import Run
from djinn_lib.experiment.large_results import shares
from djinn_lib.metrics import (
    decode_spread,
    difference_of_means,
    mean_before_decode_ms,
    served,
    summarise,
)
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.units import three_digits

_GIB = 2**30
# From whole models to Djinn, one thing at a time: system, and what it adds to the one before.
STEPS = (
    ("djinn_whole", "whole models, nothing else"),
    ("djinn_partial_no_overlap", "partial residency"),
    ("djinn_eager", "loading behind the prefill"),
    ("djinn_graph", "decoding from CUDA graphs"),
    ("djinn_compiled", "a compiled step"),
    ("djinn", "lookup tables in the host"),
)
_OTHER_MACHINE = " †"
_ACROSS_MACHINES = (
    "The step before ran on another machine of the kind: part of the difference may be the "
    "machine's."
)


@dataclass(frozen=True)
class Table:
    """Texts in rows under a head; `notes` stand below."""

    head: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table in Markdown, its notes below it; without rows its notes alone."""
        if not self.rows:
            return "\n".join(f"{note}\n" for note in self.notes)
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        text = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
        return text + "".join(f"\n{note}\n" for note in self.notes)


def systems_table(
    run: Run, paper: Mapping[str, Any], trace: str = "paper", capacity_label: str = "25"
) -> Table:
    """One line a system: requests served, latencies, switches, bytes, and the share of physics.

    Raises:
        RecordError: there are no rows of that trace and capacity.
    """
    rows, unavailable = split_unavailable(run.cells(trace, capacity_label))
    cells = summaries(rows)
    parts = decomposition(run, paper, trace, capacity_label)
    lines = []
    for system, cell in cells.items():
        part = parts.loc[system] if system in parts.index else None
        lines.append(
            [
                system_look(system).label,
                served_text(cell),
                *(three_digits(cell[f"{name}_total_ms"]) for name in ("p50", "p90", "max", "mean")),
                three_digits(cell["mean_switch_ms"]),
                three_digits(cell["loaded_bytes"] / _GIB),
                _percent(float("nan") if part is None else _link_share(part)),
                _percent(float("nan") if part is None else part["reached"] / 100),
                run.machines_of(rows[rows["system"] == system]),
            ]
        )
    head = ["system", "served", "P50, ms", "P90, ms", "max, ms", "mean, ms", "mean switch, ms",
            "GiB loaded", "link share", "ceiling reached", "machine"]  # fmt: skip
    notes = tuple(
        f"Not run: {system_look(name).label} ({why})." for name, why in unavailable.items()
    )
    return _without_one_machine(Table(head, lines, notes))


def _without_one_machine(table: Table) -> Table:
    """The table without its last column, which numbers machines, if that says nothing."""
    if len({line[-1] for line in table.rows}) > 1:
        return table
    return Table(table.head[:-1], [line[:-1] for line in table.rows], table.notes)


def _link_share(part: pd.Series) -> float:
    """Time that the moved bytes need at the link's rates, as a share of the time of switches."""
    moving = part["copy_ms"] + part["writeback_ms"]
    switch = moving + part["rest_ms"]
    return moving / switch if switch > 0 else float("nan")


def sweep_table(run: Run, baseline: str = "pytorch_pinned", trace: str = "paper") -> Table:
    """One line a capacity and system: speed-up, requests that loaded nothing, bytes to the optimum.

    A column tells the machines apart where there are several.

    Raises:
        RecordError: there are no rows of that trace.
    """
    rows, _ = split_unavailable(run.sweep(trace, baseline))
    gains = speedup_table(rows, baseline).set_index(["capacity_label", "system"])
    lines = []
    sizes = rows.groupby("capacity_label")["capacity_bytes"].max().sort_values()
    for label, n_bytes in sizes.items():
        for system, cell in summaries(rows[rows["capacity_label"] == label]).items():
            own_sizes = run.device_sizes.get(system) or run.sizes
            least = optimal_bytes(run.traces[trace], own_sizes, int(n_bytes))
            gain = gains.loc[(label, system)] if (label, system) in gains.index else None
            own = rows[(rows["system"] == system) & (rows["capacity_label"] == label)]
            lines.append(
                [
                    f"{n_bytes / _GIB:.4g} GiB",
                    system_look(system).label,
                    served_text(cell),
                    three_digits(cell["p50_total_ms"]),
                    "1" if system == baseline else "-" if gain is None else
                    f"{gain['speedup']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})",
                    three_digits(mean_before_decode_ms(served(own))),
                    _percent(cell["zero_load_share"]),
                    f"{cell['loaded_bytes'] / least:.2f}",
                    run.machines_of(own),
                ]
            )  # fmt: skip
    head = ["capacity", "system", "served", "P50, ms", "speed-up of the P50 (95%)",
            "up to decoding, ms", "loaded nothing", "bytes / optimum", "machine"]  # fmt: skip
    return _without_one_machine(Table(head, lines))


def ablation_table(run: Run, trace: str = "paper", capacity_label: str = "25") -> Table:
    """One line a step from whole models to Djinn, and what it takes off the mean latency.

    Steps that were not measured are counted with the next one that was. A difference between two
    machines is marked, for it need not be that of the step.

    Raises:
        RecordError: there are no rows of that trace and capacity.
    """
    rows, _ = split_unavailable(run.cells(trace, capacity_label))
    cells = summaries(rows)
    lines, whats = [], []
    before: tuple[pd.DataFrame, str] | None = None
    for system, what in STEPS:
        whats.append(what)
        if system not in cells:
            continue
        cell, own = cells[system], rows[rows["system"] == system]
        machine, own = run.machines_of(own), served(own)
        lines.append(
            [
                f"{what if before is None else ' '.join(f'+ {w}' for w in whats)} (`{system}`)",
                served_text(cell),
                three_digits(cell["mean_total_ms"]),
                three_digits(mean_before_decode_ms(own)),
                three_digits(cell["mean_switch_ms"]),
                three_digits(cell["loaded_bytes"] / _GIB),
                "-" if before is None else
                f"{_saved(before[0], own)}{'' if before[1] == machine else _OTHER_MACHINE}",
                machine,
            ]
        )  # fmt: skip
        before, whats = (own, machine), []
    head = ["step", "served", "mean, ms", "up to decoding, ms", "mean switch, ms", "GiB loaded",
            "mean saved, ms (95%)", "machine"]  # fmt: skip
    marked = any(_OTHER_MACHINE in cell for line in lines for cell in line)
    notes = (f"{_OTHER_MACHINE.strip()} {_ACROSS_MACHINES}",) if marked else ()
    return _without_one_machine(Table(head, lines, notes))


def _saved(before: pd.DataFrame, after: pd.DataFrame) -> str:
    saved, low, high = difference_of_means(before["total_ms"], after["total_ms"])
    return f"{saved:+,.0f} ({low:+,.0f} to {high:+,.0f})"


def replicates_table(run: Run) -> Table:
    """One line a measurement of each cell that was measured more than once, oldest machine first.

    The last column but one is the slowest over the fastest decode of one model's requests.
    """
    again = {manifest["cell"] for manifest in run.replicate_manifests.values()}
    own = {m["run_id"]: cell for cell, m in run.manifests.items() if cell in again}
    frames = [run.rows[run.rows["run_id"].isin(own)], run.replicates]
    measured = {str(run_id): rows for frame in frames for run_id, rows in frame.groupby("run_id")}
    places = {m["run_id"]: (m["cell"], run.machine_numbers[key])
              for key, m in run.all_manifests.items()}  # fmt: skip
    names = order_systems(rows["system"].iloc[0] for rows in measured.values())
    lines = []
    for system in names:
        of_system = [i for i, rows in measured.items() if rows["system"].iloc[0] == system]
        for run_id in sorted(of_system, key=lambda i: places[i]):
            rows, (cell_id, machine) = measured[run_id], places[run_id]
            (cell,) = summaries(rows).values()
            lines.append(
                [
                    f"{system_look(system).label} (`{cell_id}`)",
                    run.machine_names[machine],
                    served_text(cell),
                    three_digits(cell["p50_total_ms"]),
                    three_digits(cell["mean_total_ms"]),
                    three_digits(cell["mean_switch_ms"]),
                    three_digits(served(rows)["decode_ms"].mean()),
                    f"{decode_spread(rows):.2f}x",
                    three_digits(cell["loaded_bytes"] / _GIB),
                ]
            )
    head = ["cell", "machine", "served", "P50, ms", "mean, ms", "mean switch, ms",
            "mean decode, ms", "decode, slowest / fastest", "GiB loaded"]  # fmt: skip
    return Table(head, lines, () if lines else ("Every cell of this run was measured once.",))


def large_table(rows: pd.DataFrame) -> Table:
    """One line a model and system: what a token takes where the model is larger than the ring."""
    sizes = rows.groupby("model")[["model_bytes", "capacity_bytes"]].first()
    lines = []
    for row in shares(rows).itertuples():
        size = sizes.loc[row.model]
        failed = row.n == 0
        lines.append(
            [
                f"{row.model}: {size.model_bytes / _GIB:.3g} GiB in "
                f"{size.capacity_bytes / _GIB:.3g} GiB",
                str(row.system),
                str(row.n),
                f"failed: {row.error}" if failed else three_digits(row.ms_per_token),
                three_digits(row.gib_per_token),
                three_digits(row.link_ms),
                _percent(row.share_of_ceiling),
            ]
        )
    head = ["model and ring", "system", "n", "ms per token", "GiB per token",
            "these at the link's rate, ms", "share of the ceiling"]  # fmt: skip
    return Table(head, lines)


def summaries(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the summary of each system's cell, in the figures' order; rows are of one capacity."""
    if rows.empty:
        return {}
    table = summarise(rows).reset_index().set_index("system")
    return {system: table.loc[system] for system in order_systems(table.index)}


def served_text(cell: pd.Series) -> str:
    """How many requests a cell served of those attempted, and in how many repeats."""
    repeats = f" ({cell['repeats']} repeats)" if cell["repeats"] > 1 else ""
    return f"{cell['completed']} of {cell['n']}{repeats}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"
