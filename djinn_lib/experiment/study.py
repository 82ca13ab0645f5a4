"""The study of policies: capacity, skew, number of models and policy, all against the optimum.

A point is one simulation. `Grid.points` lists them, `run_point` computes one, and `run_study` all
of them, in order or by any executor that is given. The whole of it, as `make study` runs it::

    python -m djinn_lib.experiment.study --grid full --out data/reference/study
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import pandas as pd

from djinn_lib.engine.memory.policies import POLICIES, Policy
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.experiment.by_hand import progress_bar
from djinn_lib.experiment.executors import Job, fan_out
from djinn_lib.files import ensure_writable, write_atomically, write_json
from djinn_lib.metrics import HIT_MS, latency
from djinn_lib.paths import REPO, user_path
from djinn_lib.provenance import git_state, package_versions
from djinn_lib.simulator.checkpoint_sizes import fleet
from djinn_lib.simulator.cost_model import CostModel, reference_costs
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.simulator.simulate import PAGE_BYTES, Mode, simulate
from djinn_lib.trace import Trace, session_trace, zipf_trace

Traffic = Literal["independent", "sessions"]
CHUNK = 20  # points of a job on Ray: enough to be worth handing out
WHOLE_LRU = "whole-model lru"  # what a cache of whole models does, for contrast
KNOWN = "known popularity"  # told how often each model is asked for, though not when


@dataclass(frozen=True)
class Point:
    """One simulation of the study.

    Attributes:
        n_models: size of the fleet.
        traffic: "independent" requests, or "sessions" of users who stay with a model.
        alpha: skew of the models' popularity.
        share: capacity as a share of all weights, but never below the largest model.
        policy: a name of `POLICIES`, "oracle", `WHOLE_LRU` or `KNOWN`.
        n_requests: length of the trace.
        seed: of fleet and trace.
        mode: as in `simulate`.
        load: for "concurrent", the share of time that the GPU would be busy if nothing had to be
            loaded.
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
    """Values whose every combination is a point."""

    n_models: Sequence[int] = (3, 10, 100, 1000)
    traffic: Sequence[Traffic] = ("independent", "sessions")
    alpha: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 1.9)
    share: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.97)
    policy: Sequence[str] = ("lru", "lfu", "ewma", "adaptive", KNOWN, "oracle", WHOLE_LRU)
    n_requests: int = 5000

    def points(self) -> list[Point]:
        """All points; capacities that come out the same for a small fleet are left out."""
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


def run_study(
    points: Iterable[Point],
    run_all: Callable[[Callable[[Point], dict[str, Any]], list[Point]], Iterable[dict[str, Any]]]
    | None = None,
) -> pd.DataFrame:
    """Return a row a point; see `run_point`.

    Args:
        points: of the study.
        run_all: maps a function over the points, in any order; default is one after the other.
    """
    chosen = list(points)
    results = run_all(run_point, chosen) if run_all else map(run_point, chosen)
    bar = progress_bar(results, total=len(chosen), desc="study", unit="point", mininterval=5)
    return pd.DataFrame(bar)


def on_ray(
    function: Callable[[Point], dict[str, Any]], points: list[Point]
) -> Iterator[dict[str, Any]]:
    """Map a function over the points on a Ray cluster, one core each; see `fan_out`.

    Raises:
        ConfigError, PlatformError: no cluster can be had.
        DjinnError: a point failed; the message has its cause.
    """
    chunks = [points[i : i + CHUNK] for i in range(0, len(points), CHUNK)]
    jobs = [
        Job(f"points {i * CHUNK} to {i * CHUNK + len(chunk) - 1}", _map_chunk, (function, chunk))
        for i, chunk in enumerate(chunks)
    ]
    for job, result in fan_out(jobs):
        if result.error:
            raise DjinnError(f"{job.name} of the study failed: {result.error}")
        yield from result.value


def _map_chunk(
    function: Callable[[Point], dict[str, Any]], points: list[Point]
) -> list[dict[str, Any]]:
    return [function(point) for point in points]


def run_point(point: Point) -> dict[str, Any]:
    """Return the point's parameters and what came out.

    Besides: capacity_bytes, loaded_bytes, optimal_bytes (over the same pages), ratio of the two,
    p50_ms, p99_ms and mean_ms of whole requests, mean_switch_ms, free_share (of requests whose
    switch takes less than `HIT_MS`).

    Raises:
        ConfigError: no such policy.
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
    least = _least(trace, capacity_bytes, point.n_models, point.seed)
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
    """Return the least share of all weights at which switching is free.

    That is where a switch costs less than `HIT_MS` on average. A row for each fleet, traffic, skew
    and policy; the share is NaN where no capacity of the study was enough.
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
    """Least popular first, the true shares being known.

    Under independent requests no policy that cannot see the future loads less in the long run: the
    next request is as likely to be for any given model as it ever was, so the bytes to keep are
    those of the models asked for most often.

    Args:
        shares: of the requests, by model; only their order counts.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares

    def touch(self, model: str, now_s: float) -> None:
        """A request tells nothing new."""

    def forget(self, model: str) -> None:
        """Nor does a model that leaves."""

    def victims(self, candidates: frozenset[str]) -> Iterable[str]:
        """Return `candidates`, the least popular first."""
        return sorted(candidates, key=lambda model: (self._shares[model], model))


def _trace(point: Point, rate_per_s: float) -> Trace:
    make = zipf_trace if point.traffic == "independent" else session_trace
    names = list(fleet(point.n_models, point.seed))
    return make(point.n_requests, point.alpha, names, point.seed, rate_per_s)


def _mean_service_s(point: Point, sizes: dict[str, int]) -> float:
    """Mean time of a request when everything is resident."""
    costs = _costs()
    models = [request.model for request in _trace(point, 1.0).requests]
    return sum(costs.prefill_of(m, sizes[m]) + costs.decode_of(m, sizes[m]) for m in models) / len(
        models
    )


def _capacity(n_models: int, share: float, seed: int = 0) -> int:
    """Bytes of the ring: whole pages, and room for every model."""
    sizes = fleet(n_models, seed).values()
    pages = max(round(sum(sizes) * share) // PAGE_BYTES, -(-max(sizes) // PAGE_BYTES))
    return pages * PAGE_BYTES


@lru_cache
def _costs() -> CostModel:
    return reference_costs()


_known_least: dict[tuple[str, int], int] = {}


def _least(trace: Trace, capacity_bytes: int, n_models: int, seed: int) -> int:
    """The optimum over the same pages; policies of one setting share it."""
    key = trace.sha256, capacity_bytes
    if key not in _known_least:
        sizes = fleet(n_models, seed)
        _known_least[key] = optimal_bytes(trace, sizes, capacity_bytes, PAGE_BYTES)
    return _known_least[key]


def main(arguments: list[str] | None = None) -> int:
    """Compute a grid and keep its points; returns the exit status."""
    parser = argparse.ArgumentParser(prog="djinn_lib.experiment.study", description=__doc__)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="full")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--out", type=user_path, default=REPO / "data" / "runs" / "study")
    options = parser.parse_args(arguments)
    begin_s, (commit, dirty) = time.perf_counter(), git_state(REPO)
    try:
        ensure_writable(options.out)
        points = [*GRIDS[options.grid].points(), *QUEUED]
        study = run_study(points, on_ray if options.executor == "ray" else None)
    except DjinnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(options.out / "points.parquet", lambda to: study.to_parquet(to, index=False))
    manifest = {
        "grid": asdict(GRIDS[options.grid]),
        "costs": asdict(_costs()),
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": package_versions(),
        "wall_s": time.perf_counter() - begin_s,
    }
    write_json(options.out / "manifest.json", manifest)
    print(f"{len(study)} points in {manifest['wall_s']:.0f} s: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
