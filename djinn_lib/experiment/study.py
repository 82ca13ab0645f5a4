"""Study policies by simulation: bytes and latencies compared with the offline optimum.

The parameters are capacity, skew, number of models and policy. A point is one simulation.
`Grid.points` lists the points, `run_point` computes one, and `run_study` computes all, here or on a
Ray cluster. `make study` runs the whole study: `djinn study --out data/reference/study`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from djinn_lib.engine.memory.policies import POLICIES, Policy
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.experiment.execution.by_hand import progress_bar
from djinn_lib.experiment.executors import Job, fan_out
from djinn_lib.files import ensure_writable, write_atomically, write_json
from djinn_lib.metrics import HIT_MS, latency
from djinn_lib.paths import REPO
from djinn_lib.provenance import git_state, package_versions
from djinn_lib.simulator.checkpoint_sizes import fleet
from djinn_lib.simulator.cost_model import reference_costs
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.simulator.simulate import PAGE_BYTES, Mode, simulate
from djinn_lib.trace import Trace, session_trace, zipf_trace

Traffic = Literal["independent", "sessions"]
CHUNK = 20  # points of a job on Ray: enough to be worth its overhead
WHOLE_LRU = "whole-model lru"  # a cache of whole models, for comparison
KNOWN = "known popularity"  # knows how often each model is requested, but not when


@dataclass(frozen=True)
class Point:
    """One simulation of the study.

    Attributes:
        n_models: number of models.
        traffic: "independent" requests, or "sessions" of users who stay with a model.
        alpha: skew of the models' popularity.
        share: capacity as a share of all weights; the capacity is never below the largest model.
        policy: a name of `POLICIES`, "oracle", `WHOLE_LRU` or `KNOWN`.
        n_requests: length of the trace.
        seed: seed of the models' sizes and the trace.
        mode: as in `simulate`.
        load: for "concurrent", the share of time that the GPU would be busy if all models were
            resident.
    """

    n_models: int
    traffic: Traffic
    alpha: float
    share: float
    policy: str
    n_requests: int = 5000
    seed: int = 0
    mode: Mode = "sequential"
    load: float = 0.5


@dataclass(frozen=True)
class Grid:
    """Values of the parameters; every combination is a point."""

    n_models: Sequence[int] = (3, 10, 100, 1000)
    traffic: Sequence[Traffic] = ("independent", "sessions")
    alpha: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 1.9)
    share: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.97)
    policy: Sequence[str] = ("lru", "lfu", "ewma", "adaptive", KNOWN, "oracle", WHOLE_LRU)
    n_requests: int = 5000

    def points(self) -> list[Point]:
        """Return all points, without duplicates of equal capacities for few models."""
        found = []
        for n, traffic, alpha, share, policy in product(
            self.n_models, self.traffic, self.alpha, self.share, self.policy
        ):
            smaller = [s for s in self.share if s < share]
            if not smaller or _capacity(n, share) != _capacity(n, max(smaller)):
                found.append(Point(n, traffic, alpha, share, policy, self.n_requests))
        return found


SMALL = Grid((3, 30), alpha=(0.0, 1.0), share=(0.5, 0.97), n_requests=1000)
FULL = Grid()
GRIDS = {"small": SMALL, "full": FULL}
QUEUED = tuple(
    Point(10, "independent", 1.0, 0.5, policy, 5000, mode="concurrent", load=load)
    for policy, load in product(
        ("lru", "adaptive", "lookahead", "oracle"), (0.2, 0.4, 0.6, 0.8, 0.9)
    )
)


def run_study(points: Iterable[Point], executor: str = "local") -> pd.DataFrame:
    """Return one row for each point; see `run_point`.

    With the executor "ray" points run on a cluster, each on one core; see `fan_out`.

    Raises:
        ConfigError, PlatformError: no cluster is available.
        DjinnError: a point failed on Ray; the message has its cause.
    """
    chosen = list(points)
    results = _on_ray(chosen) if executor == "ray" else map(run_point, chosen)
    bar = progress_bar(results, total=len(chosen), desc="study", unit="point", mininterval=5)
    return pd.DataFrame(bar)


def _on_ray(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    chunks = {i: points[i : i + CHUNK] for i in range(0, len(points), CHUNK)}
    jobs = [Job(f"points {i} to {i + len(chunk) - 1}", _run_points, (chunk,))
            for i, chunk in chunks.items()]  # fmt: skip
    for job, result in fan_out(jobs):
        if result.error:
            raise DjinnError(f"{job.name} of the study failed: {result.error}")
        yield from result.value


def _run_points(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [run_point(point) for point in points]


def run_point(point: Point) -> dict[str, Any]:
    """Return the parameters and results of a point.

    The results are capacity_bytes, loaded_bytes, optimal_bytes (with the same pages), their ratio,
    p50_ms, p99_ms and mean_ms of whole requests, mean_switch_ms, and free_share (the share of
    requests whose switch takes less than `HIT_MS`).

    Raises:
        ConfigError: there is no such policy.
    """
    sizes, trace, capacity_bytes = _setting(point)
    rows = simulate(
        trace,
        sizes,
        capacity_bytes,
        _policy(point, list(sizes)),
        eviction="models" if point.policy == WHOLE_LRU else "pages",
        costs=_costs(),
        mode=point.mode,
    )
    least = _least_bytes(replace(point, policy="oracle"))
    loaded = int(rows["loaded_bytes"].sum())
    times = latency(rows["total_ms"])
    return asdict(point) | {
        "capacity_bytes": capacity_bytes,
        "loaded_bytes": loaded,
        "optimal_bytes": least,
        "ratio": loaded / least,
        "p50_ms": times["p50"],
        "p99_ms": times["p99"],
        "mean_ms": times["mean"],
        "mean_switch_ms": float(rows["switch_ms"].mean()),
        "free_share": float((rows["switch_ms"] < HIT_MS).mean()),
    }


def free_capacity(study: pd.DataFrame) -> pd.DataFrame:
    """Return the least capacity, as a share of all weights, at which switching is free.

    Free means that a switch costs less than `HIT_MS` on average. There is a row for each number of
    models, traffic, skew and policy. The share is NaN if no capacity of the study was enough.
    """
    keys = ["n_models", "traffic", "alpha", "policy"]
    enough = study[study["mean_switch_ms"] < HIT_MS].groupby(keys)["share"].min()
    every = study.groupby(keys).size().index
    return enough.reindex(every).rename("share").reset_index()


def _setting(point: Point) -> tuple[dict[str, int], Trace, int]:
    sizes = fleet(point.n_models, point.seed)
    rate_per_s = 1.0
    if point.mode == "concurrent":
        rate_per_s = point.load / _mean_service_s(point, sizes)
    return sizes, _trace(point, rate_per_s), _capacity(point.n_models, point.share, point.seed)


def _policy(point: Point, models: Sequence[str]) -> str | Policy:
    if point.policy == WHOLE_LRU:
        return "lru"
    if point.policy == KNOWN:
        return Popularity({model: (i + 1) ** -point.alpha for i, model in enumerate(models)})
    if point.policy not in (*POLICIES, "oracle"):
        raise ConfigError(
            f"expected a policy out of {[*POLICIES, 'oracle', WHOLE_LRU, KNOWN]}, got "
            f"{point.policy!r}"
        )
    return point.policy


class Popularity(Policy):
    """Evict the least popular model first, with known popularity.

    For independent requests, no policy without knowledge of the future loads less in the long run.
    The probability of each model does not depend on earlier requests, so the best bytes to keep are
    those of the most popular models. Only the order of the shares matters.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares

    def touch(self, model: str, now_s: float) -> None:
        """Ignore requests: the popularity is known."""

    def forget(self, model: str) -> None:
        """Ignore removed models."""

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates`, the least popular first."""
        return sorted(candidates, key=lambda model: (self._shares[model], model))


def _trace(point: Point, rate_per_s: float) -> Trace:
    names = tuple(fleet(point.n_models, point.seed))
    return _made(point.traffic, point.n_requests, point.alpha, names, point.seed, rate_per_s)


@lru_cache(maxsize=2)  # consecutive points have the same trace, and making it takes long
def _made(traffic: Traffic, *arguments: Any) -> Trace:
    return (zipf_trace if traffic == "independent" else session_trace)(*arguments)


def _mean_service_s(point: Point, sizes: dict[str, int]) -> float:
    """Mean time of a request when everything is resident."""
    costs = _costs()
    models = [request.model for request in _trace(point, 1.0).requests]
    times_s = [costs.prefill_of(m, sizes[m]) + costs.decode_of(m, sizes[m]) for m in models]
    return sum(times_s) / len(times_s)


def _capacity(n_models: int, share: float, seed: int = 0) -> int:
    """Return the bytes of the ring: whole pages, enough for the largest model."""
    sizes = fleet(n_models, seed).values()
    pages = max(round(sum(sizes) * share) // PAGE_BYTES, -(-max(sizes) // PAGE_BYTES))
    return pages * PAGE_BYTES


_costs = lru_cache(reference_costs)


@lru_cache
def _least_bytes(point: Point) -> int:
    """Return the bytes of the optimum with the same pages, once for all policies."""
    sizes, trace, capacity_bytes = _setting(point)
    return optimal_bytes(trace, sizes, capacity_bytes, PAGE_BYTES)


def save_study(grid: str, folder: Path, executor: str = "local") -> None:
    """Compute a grid and save its points, and where they come from, in a folder.

    Raises:
        ConfigError: the folder cannot be written to, or Ray cannot be used.
        DjinnError: a point failed on Ray.
    """
    begin_s, (commit, dirty) = time.perf_counter(), git_state(REPO)
    ensure_writable(folder)
    study = run_study([*GRIDS[grid].points(), *QUEUED], executor)
    write_atomically(folder / "points.parquet", lambda to: study.to_parquet(to, index=False))
    manifest = {
        "grid": asdict(GRIDS[grid]),
        "costs": asdict(_costs()),
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": package_versions(),
        "wall_s": time.perf_counter() - begin_s,
    }
    write_json(folder / "manifest.json", manifest)
    print(f"{len(study)} points in {manifest['wall_s']:.0f} s: {folder}")
