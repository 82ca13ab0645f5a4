"""What cells are expected to take, and which of them fit into a limit of time.

A cell that is not expected to end before the limit is not begun: it would be lost. What it took
before, in this run or in the reference run, is the best guess; a cell that was cut off left a
journal that tells its pace; else the profile may give a hint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from djinn_lib.errors import DjinnError
from djinn_lib.experiment.profile import Cell, Profile
from djinn_lib.paths import REFERENCE
from djinn_lib.rows import read_manifest
from djinn_lib.trace import read_trace

AROUND_S = 12.0  # a cell's kernel starts, imports and draws, which its manifest does not count
Estimate = Callable[[Cell], float | None]


class Limit:
    """A limit of time that begins now; without seconds there is none."""

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self._clock, self._begin_s = seconds, clock, clock()

    @property
    def left_s(self) -> float:
        """Seconds that are left; infinite without a limit."""
        if self.seconds is None:
            return math.inf
        return self.seconds - (self._clock() - self._begin_s)

    def allows(self, expected_s: float | None) -> bool:
        """Whether something may begin that takes so long; None: nobody knows how long."""
        return self.left_s > (expected_s or 0.0)


def estimate_s(
    cell: Cell, profile: Profile, run_dir: Path, reference: Path = REFERENCE
) -> float | None:
    """Return the seconds that a cell is expected to take, None where nothing is known of it."""
    stem = f"requests/{cell.id}"
    guesses = (
        lambda: _by_journal(run_dir / f"{stem}.journal.jsonl", cell, run_dir),
        lambda: _by_manifest(run_dir / f"{stem}.manifest.json", cell, profile),
        lambda: _by_manifest(reference / f"{stem}.manifest.json", cell, profile),
        lambda: _by_hint(cell, profile),
    )
    return next((found for guess in guesses if (found := guess()) is not None), None)


def _by_manifest(path: Path, cell: Cell, profile: Profile) -> float | None:
    """What it took before, for as many repeats as are asked for now."""
    try:
        manifest = read_manifest(path)
        repeats = int(manifest["parameters"]["repeats"])
    except (DjinnError, KeyError):
        return None
    if manifest["profile"] != profile.name:
        return None
    served_s = manifest["wall_s"] - manifest["setup_s"]
    return AROUND_S + manifest["setup_s"] + served_s * cell.repeats / repeats


def _by_journal(path: Path, cell: Cell, run_dir: Path) -> float | None:
    """The pace of a cell that was cut off, carried on to its end."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        n_requests = cell.repeats * len(read_trace(run_dir / "traces" / f"{cell.trace}.jsonl"))
        begun_s, last = rows[0]["start_s"], rows[-1]
        total_ms = last["total_ms"] if math.isfinite(last["total_ms"]) else 0.0
        served_s = last["start_s"] + total_ms / 1e3 - begun_s
    except (OSError, ValueError, LookupError, TypeError):  # none, or cut short, or of other columns
        return None
    return AROUND_S + begun_s + served_s * n_requests / len(rows)


def _by_hint(cell: Cell, profile: Profile) -> float | None:
    for entry in profile.cells:
        named = (entry.traces, entry.capacities, entry.systems)
        if cell.mode == entry.mode and all(
            value in names for value, names in zip(_names(cell), named, strict=True)
        ):
            return None if entry.minutes is None else 60 * entry.minutes
    return None


def _names(cell: Cell) -> tuple[str, str, str]:
    return cell.trace, cell.capacity_label, cell.system


def run_within(
    cells: Sequence[Cell], begin: Callable[[Cell], Any], estimate: Estimate, limit: Limit
) -> list[Cell]:
    """Run cells in their order while they fit into the limit, and say before each what is ahead.

    A cell that no longer fits is passed over; a shorter one behind it may still fit.

    Returns:
        The cells that were left over.
    """
    left_over: list[Cell] = []
    for i, cell in enumerate(cells):
        expected_s = estimate(cell)
        if not limit.allows(expected_s):
            left_over.append(cell)
            continue
        ahead = f"; after it {_sum_of(rest, estimate)}" if (rest := cells[i + 1 :]) else ""
        print(f"{cell.id}: {_about(expected_s)}{ahead}{_of_limit(limit)}", flush=True)
        begin(cell)
    return left_over


def left_over_lines(cells: Sequence[Cell], estimate: Estimate, limit: Limit) -> list[str]:
    """Return what to say of cells that were left over: one line each, and how to go on."""
    lines = [f"left over, because the limit of {span(limit.seconds or 0)} is near: "
             f"{_sum_of(cells, estimate)}"]  # fmt: skip
    for cell in cells:
        expected_s = estimate(cell)
        too_long = expected_s is not None and limit.seconds and expected_s > limit.seconds
        hint = ", longer than the limit itself: give it more time" if too_long else ""
        lines.append(f"  cell:{cell.id}  {_about(expected_s)}{hint}")
    lines.append("The same command goes on from here; on another machine name these cells.")
    return lines


def span(seconds: float) -> str:
    """A length of time for people: "40 s", "2.5 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _about(seconds: float | None) -> str:
    return "nobody knows how long" if seconds is None else f"about {span(seconds)}"


def _sum_of(cells: Sequence[Cell], estimate: Estimate) -> str:
    expected = [estimate(cell) for cell in cells]
    known = [seconds for seconds in expected if seconds is not None]
    text = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
    if known:
        text += f", about {span(sum(known))}"
    unknown = len(cells) - len(known)
    return f"{text} ({unknown} of unknown length)" if unknown else text


def _of_limit(limit: Limit) -> str:
    return "" if limit.seconds is None else f"; {span(max(limit.left_s, 0))} of the limit left"
