"""Traces: which models are requested, and when.

`paper_trace` reproduces the published sequence of 30 requests. `zipf_trace` and `session_trace`
generate others. A trace file is JSON Lines: a header with parameters and a hash, then one line per
request.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from djinn_lib.errors import TraceError, first_line, shown
from djinn_lib.files import write_text

FORMAT = "djinn-trace/1"
PAPER_MODELS = ("llama-7b", "mistral-7b", "phi-2")
_PAPER: dict[str, Any] = {"n": 30, "seed": 42, "mean_gap_s": 2.0, "probabilities": [0.4, 0.4, 0.2]}
_MAX_REQUESTS = 10_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its number from 0, its arrival in seconds, and its model."""

    request: int
    arrival_s: float
    model: str


@dataclass(frozen=True)
class Trace:
    """A sequence of requests, and the parameters that generated it."""

    kind: str
    params: Mapping[str, Any]
    requests: tuple[Request, ...]

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.requests)

    @property
    def models(self) -> tuple[str, ...]:
        """Requested models, in order of first appearance."""
        return tuple(dict.fromkeys(request.model for request in self.requests))

    @cached_property
    def sha256(self) -> str:
        """Hash of kind, parameters and every request."""
        digest = hashlib.sha256(_dump([self.kind, dict(self.params)]).encode())
        for request in self.requests:
            digest.update(_dump(asdict(request)).encode())
        return digest.hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def _requests(arrivals_s: np.ndarray, models: Sequence[str]) -> tuple[Request, ...]:
    pairs = zip(arrivals_s.tolist(), models, strict=True)
    return tuple(Request(i, at_s, model) for i, (at_s, model) in enumerate(pairs))


def paper_trace(
    models: Sequence[str] = PAPER_MODELS, n: int = _PAPER["n"], seed: int = _PAPER["seed"]
) -> Trace:
    """Generate a trace as in the paper: exponential gaps, models at 40/40/20 %.

    With the default `n` and `seed` it is the published trace of 30 requests.

    Args:
        models: three names, in the roles of llama-7b, mistral-7b and phi-2.
        n: number of requests, at least 1.
        seed: of NumPy's RandomState.

    Raises:
        TraceError: the models are not three different names, or a number is out of range.
    """
    if len(models) != 3 or len(set(models)) != 3:
        raise TraceError(f"expected three different models for the paper's trace, got {models}")
    if not 1 <= n <= _MAX_REQUESTS:
        raise TraceError(f"expected 1 to {_MAX_REQUESTS} requests, got {n}")
    if not 0 <= seed < 2**32:
        raise TraceError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
    generator = np.random.RandomState(seed)  # its stream is stable across NumPy versions
    arrivals_s = generator.exponential(_PAPER["mean_gap_s"], n).cumsum()
    drawn = generator.choice(3, size=n, p=_PAPER["probabilities"])
    params = {**_PAPER, "n": n, "seed": seed, "models": list(models)}
    return Trace("paper", params, _requests(arrivals_s, [models[int(i)] for i in drawn]))


def zipf_trace(n: int, alpha: float, models: Sequence[str], seed: int, rate_per_s: float) -> Trace:
    """Generate Poisson arrivals, with model i in proportion to (i + 1)**-alpha.

    Args:
        n: number of requests, at least 1.
        alpha: skew; 0 makes all models equally popular.
        models: names, the most popular first.
        seed: of NumPy's PCG64 generator.
        rate_per_s: mean arrivals per second.

    Raises:
        TraceError: a parameter is out of range.
    """
    generator, shares, params = _zipf(n, alpha, models, seed, rate_per_s)
    arrivals_s = generator.exponential(1 / rate_per_s, n).cumsum()
    drawn = generator.choice(len(models), size=n, p=shares)
    return Trace("zipf", params, _requests(arrivals_s, [models[int(i)] for i in drawn]))


def session_trace(
    n: int,
    alpha: float,
    models: Sequence[str],
    seed: int,
    rate_per_s: float,
    visit_requests: float = 8.0,
    n_visits: int = 4,
) -> Trace:
    """Generate requests of users who each stay with a model for a while.

    At any time `n_visits` visits are open. Each request belongs to a random one of them, and ends
    it with probability 1 / `visit_requests`. A new visit draws its model as `zipf_trace` does.

    Args:
        n, alpha, models, seed, rate_per_s: as for `zipf_trace`.
        visit_requests: mean number of requests of a visit, at least 1.
        n_visits: visits open at a time, at least 1.

    Raises:
        TraceError: a parameter is out of range.
    """
    generator, shares, params = _zipf(n, alpha, models, seed, rate_per_s)
    if not (math.isfinite(visit_requests) and visit_requests >= 1 and n_visits >= 1):
        raise TraceError(
            "expected visits of at least 1 request, and at least 1 of them, got "
            f"{visit_requests} and {n_visits}"
        )
    new: Iterator[int] = iter(generator.choice(len(models), size=n + n_visits, p=shares).tolist())
    chosen = generator.integers(n_visits, size=n).tolist()
    ends = (generator.random(n) < 1 / visit_requests).tolist()
    arrivals_s = generator.exponential(1 / rate_per_s, n).cumsum()
    visits = [next(new) for _ in range(n_visits)]
    drawn = []
    for visit, over in zip(chosen, ends, strict=True):
        drawn.append(visits[visit])
        if over:
            visits[visit] = next(new)
    params |= {"visit_requests": visit_requests, "n_visits": n_visits}
    return Trace("sessions", params, _requests(arrivals_s, [models[int(i)] for i in drawn]))


def _zipf(
    n: int, alpha: float, models: Sequence[str], seed: int, rate_per_s: float
) -> tuple[np.random.Generator, np.ndarray, dict[str, Any]]:
    """Check the parameters; return the generator, each model's share of the requests, and them."""
    if not 1 <= n <= _MAX_REQUESTS:
        raise TraceError(f"expected 1 to {_MAX_REQUESTS} requests, got n={n}")
    if not 0 <= alpha <= 100:
        raise TraceError(f"expected a skew alpha from 0 to 100, got {alpha}")
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise TraceError(f"expected a positive, finite rate_per_s, got {rate_per_s}")
    if seed < 0:
        raise TraceError(f"expected a seed of at least 0, got {seed}")
    if not models or len(set(models)) != len(models):
        raise TraceError(f"expected one or more different models, got {list(models)}")
    weights = np.arange(1, len(models) + 1, dtype=float) ** -alpha
    params = {"n": n, "alpha": alpha, "models": list(models), "seed": seed}
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator, weights / weights.sum(), {**params, "rate_per_s": rate_per_s}


def renamed(trace: Trace, names: Mapping[str, str], keep: Collection[str] = ()) -> Trace:
    """Rename the models of a trace by `names`, except those in `keep`."""

    def new(model: str) -> str:
        return model if model in keep else names.get(model, model)

    requests = tuple(replace(request, model=new(request.model)) for request in trace.requests)
    params = dict(trace.params)
    if "models" in params:
        params["models"] = [new(model) for model in params["models"]]
    return replace(trace, params=params, requests=requests)


def check_models(trace: Trace, known: Collection[str]) -> None:
    """Check that every model of a trace is configured.

    Raises:
        TraceError: a model is not.
    """
    if unknown := [model for model in trace.models if model not in known]:
        raise TraceError(
            f"expected a trace over the models {list(known)}, got {unknown[0]!r}: "
            "add it to the profile, or generate the trace again"
        )


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace atomically."""
    header = {"format": FORMAT, "kind": trace.kind, "params": dict(trace.params),
              "n": len(trace), "sha256": trace.sha256}  # fmt: skip
    write_text(path, _dump(header) + "".join(_dump(asdict(r)) for r in trace.requests))


def read_trace(path: Path) -> Trace:
    """Read a trace and check that it is as it was written.

    Raises:
        TraceError: the file is missing, truncated, edited or of another format.
    """
    try:
        first, *rest = path.read_text().splitlines() or [""]
        header = _header(first)
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read ({error.strerror}): check the path, or generate it again"
        ) from error
    except ValueError as error:
        raise TraceError(
            f"{path} is not a trace: {error}. Traces are .jsonl files of the format {FORMAT!r} and "
            ".json files in the paper's form; choose one, or generate it again with `djinn trace`"
        ) from error
    try:
        requests = tuple(Request(**json.loads(line)) for line in rest)
        if len(requests) != header["n"]:
            raise ValueError(f"it has {len(requests)} requests, not {header['n']}")
        trace = Trace(header["kind"], header["params"], requests)
        if trace.sha256 != header["sha256"]:
            raise ValueError("its requests do not have the hash in its first line")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TraceError(
            f"{path} is not a whole trace ({first_line(error)}): it was truncated or edited; "
            "generate it again"
        ) from error
    return trace


def _header(line: str) -> dict[str, Any]:
    """Read the first line of a trace file; ValueError says why it is none."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("its first line is not JSON") from error
    if not isinstance(header, dict) or "format" not in header:
        raise ValueError("its first line names no format")
    if header["format"] != FORMAT:
        raise ValueError(f"its format is {shown(header['format'])}")
    return header
