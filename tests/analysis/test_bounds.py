"""docs/measuring.md says which bounds are younger than the rows that they judge."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatch
from functools import cache

import pytest

from djinn_lib.analysis.claims import judge, load_claims
from djinn_lib.analysis.run import Manifest, Run, load_run
from djinn_lib.experiment.profile import load_profile
from djinn_lib.paths import REFERENCE, REPO

PAGE = (REPO / "docs" / "measuring.md").read_text()


@cache
def when(commit: str) -> datetime:
    """When a commit was made; skips where the history is not there."""
    command = ["git", "show", "-s", "--format=%cI", commit]
    said = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if said.returncode:
        pytest.skip(f"the history of this copy lacks the commit {commit}")
    return datetime.fromisoformat(said.stdout.strip())


def since(moment: datetime, run: Run) -> Run:
    """A run with only those cells that began after a moment, replicates in the place of others."""
    rows, every = run.every_row, run.all_manifests.values()
    later = [m for m in every if datetime.fromisoformat(m["started_at_utc"]) >= moment]
    cells: dict[str, Manifest] = {}
    for manifest in sorted(later, key=lambda m: (m in run.manifests.values(), m["started_at_utc"])):
        cells[manifest["cell"]] = manifest  # that of the run, or else the newest replicate
    chosen = {manifest["run_id"] for manifest in cells.values()}
    again = {m["run_id"]: m for m in later if m["run_id"] not in chosen}
    return replace(
        run,
        rows=rows[rows["run_id"].isin(chosen)],
        manifests=cells,
        replicates=rows[rows["run_id"].isin(list(again))],
        replicate_manifests=again,
    )


def test_bounds_that_are_younger_than_their_rows_are_listed():
    claims, run = load_claims(), load_run(REFERENCE)
    table = PAGE.split("### Targets")[1].split("\n#")[0]
    first_columns = "".join(line.split("|")[1] for line in table.splitlines() if line[:1] == "|")
    listed = re.findall(r"`([a-z0-9*-]+)`", first_columns)
    younger, from_then_on = [], cache(lambda commit: since(when(commit), run))
    for claim in claims:
        assert claim.set_in is not None
        kept = from_then_on(claim.set_in)
        if len(kept.rows) == len(run.rows):
            continue
        before, after = judge([claim], run) + judge([claim], kept)
        if before.measured != after.measured:  # it reads rows from before its bound
            younger.append(claim.id)
    assert younger
    assert [name for name in younger if not any(fnmatch(name, one) for one in listed)] == []
    known = [claim.id for claim in claims]
    assert [one for one in listed if not any(fnmatch(name, one) for name in known)] == []


def test_every_variant_of_djinn_and_every_kind_of_trace_is_described():
    profiles = [load_profile(path.stem) for path in (REPO / "params").glob("*.yml")]
    labels = {name for one in profiles for name, system in one.systems.items()
              if system.system.startswith("djinn")} - {"djinn"}  # fmt: skip
    traces = {re.sub(r"_[\d.]+$", "_*", name) for one in profiles for name in one.traces}
    named = set(re.findall(r"`([\w.*]+)`", PAGE))
    assert {*labels, *traces} - named - {"paper", "zipf"} == set()
