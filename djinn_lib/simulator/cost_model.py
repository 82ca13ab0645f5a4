"""Compute what a request costs from its bytes: the clock of the simulator.

A few numbers describe a machine and a model well. These are the rate of the link, the fixed cost of
a copy, the host's cost per page, and the times of a prefill and of a token. `fit` takes them from
the rows of `benchmarks/engine.py`. For models that were not measured, they follow from the bytes:
at batch size 1, reading the weights once bounds both prefill and decode.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from djinn_lib.errors import ConfigError
from djinn_lib.paths import REFERENCE

Line = tuple[float, float]  # seconds at 0 bytes, seconds per byte


@dataclass(frozen=True)
class CostModel:
    """Times of one GPU.

    Args:
        link_bytes_per_s: rate at which missing weights arrive.
        load_start_s: from the request to the first byte, when something is missing.
        hit_s: cost of the switch to a resident model.
        prefill_s: time of a prompt by model; others follow from `prefill_line`.
        token_s: time of a further token by model; others follow from `token_line`.
        prefill_line, token_line: seconds as a line over the bytes of a model.
        plan_line: seconds as a line over missing bytes, for evicting and mapping on the host before
            computation starts.
        n_tokens: new tokens of a request.
        overlap: whether the prefill runs behind the copy.

    Raises:
        ConfigError: a time is negative or not finite, or a rate is not positive.
    """

    link_bytes_per_s: float = 54e9
    load_start_s: float = 0.0
    hit_s: float = 0.0
    prefill_s: Mapping[str, float] = field(default_factory=dict)
    token_s: Mapping[str, float] = field(default_factory=dict)
    prefill_line: Line = (0.0, 0.0)
    token_line: Line = (0.0, 0.0)
    plan_line: Line = (0.0, 0.0)
    n_tokens: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.link_bytes_per_s) and self.link_bytes_per_s > 0):
            raise ConfigError(
                "expected a positive, finite rate of the link in bytes per second, got "
                f"{self.link_bytes_per_s}"
            )
        times = [self.load_start_s, self.hit_s, *self.prefill_s.values(), *self.token_s.values(),
                 *self.prefill_line, *self.token_line, *self.plan_line]  # fmt: skip
        if wrong := [t for t in times if not (math.isfinite(t) and t >= 0)]:
            raise ConfigError(f"expected times of 0 or more seconds, got {wrong[0]}")
        if self.n_tokens < 1:
            raise ConfigError(f"expected at least 1 new token a request, got {self.n_tokens}")

    def prefill_of(self, model: str, n_bytes: int) -> float:
        """Return the seconds from a prefill's start to the first token, without loading."""
        start_s, per_byte_s = self.prefill_line
        return self.prefill_s.get(model, start_s + per_byte_s * n_bytes)

    def decode_of(self, model: str, n_bytes: int) -> float:
        """Return the seconds from the first to the last token."""
        start_s, per_byte_s = self.token_line
        return self.token_s.get(model, start_s + per_byte_s * n_bytes) * (self.n_tokens - 1)

    def switch_of(self, loaded_bytes: int, prefill_s: float) -> float:
        """Return the seconds that missing bytes add to the time to the first token.

        With overlap, layers follow the copy, so the longer of copy and prefill counts. The prefill
        starts when everything is mapped; the copy does not wait for that.
        """
        if not loaded_bytes:
            return self.hit_s
        load_s = self.load_start_s + loaded_bytes / self.link_bytes_per_s
        start_s, per_byte_s = self.plan_line
        plan_s = start_s + per_byte_s * loaded_bytes
        return max(self.hit_s, plan_s, load_s - prefill_s) if self.overlap else load_s


def fit(engine: Mapping[str, Any], n_tokens: int = 50) -> CostModel:
    """Fit the cost model of a machine from the ``engine.json`` of `benchmarks/engine.py`.

    The fit uses hits, full misses with overlap and bare loads. The loads are of whole models, and
    of the parts that the curve of page sizes loads. Requests that switch between models are left
    out, so that they can test the model's predictions.

    Raises:
        ConfigError: the necessary cases are missing.
    """
    sizes = engine["sizes"]
    # The last case of a model is the fastest decode mode, and wins.
    hits = {c["model"]: c for c in engine["cases"] if c["case"] == "hit"}
    loads = [c for c in engine["cases"] if c["case"] in ("load", "full miss, overlap on")]
    if not hits or len({c["loaded_bytes"] for c in loads}) < 2:
        raise ConfigError(
            "expected hits and full misses of at least 2 models in the engine's rows, got "
            f"{len(hits)} hits and {len(loads)} misses: run benchmarks/engine.py"
        )
    points = [(c["loaded_bytes"], c.get("load_ms", c.get("ttft_ms"))) for c in loads]
    curve = [c for c in engine.get("page_curve", []) if c["page_bytes"] == engine["page_bytes"]]
    points += [(c["partial_loaded_bytes"], c["partial_ms"]) for c in curve]
    start_s, per_byte_s = _line(points)
    plans = [
        (c[f"{part}_loaded_bytes"], c[f"{part}_plan_ms"])
        for c in curve
        for part in ("full", "partial")
    ]
    prefill_s = {m: (c["ttft_ms"] - c["switch_ms"]) / 1e3 for m, c in hits.items()}
    token_s = {m: c["ms_per_token"] / 1e3 for m, c in hits.items()}
    return CostModel(
        link_bytes_per_s=1 / per_byte_s,
        load_start_s=start_s,
        hit_s=float(np.mean([c["switch_ms"] for c in hits.values()])) / 1e3,
        prefill_s=prefill_s,
        token_s=token_s,
        prefill_line=_line((sizes[m], s * 1e3) for m, s in prefill_s.items()),
        token_line=_line((sizes[m], s * 1e3) for m, s in token_s.items()),
        plan_line=_line(plans) if plans else (0.0, 0.0),
        n_tokens=n_tokens,
    )


def _line(points: Iterable[tuple[float, float]]) -> Line:
    """Fit a line to (bytes, milliseconds) by relative least squares, no part below 0."""
    x, y = np.array(list(points), float).T
    slope, intercept = np.polyfit(x, y / 1e3, 1, w=1 / y)
    if intercept < 0:  # fit a line through the origin instead
        slope, intercept = float((x / y).sum() / (x * x / y / y).sum()) / 1e3, 0.0
    return max(0.0, float(intercept)), max(0.0, float(slope))


def engine_rows(reference: Path = REFERENCE) -> dict[str, Any]:
    """Read the engine's benchmark of a reference run.

    Raises:
        ConfigError: it is missing or unreadable.
    """
    path = reference / "engine.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected the engine's rows in {path}, got {error!r}: run benchmarks/engine.py"
        ) from error


def reference_costs(reference: Path = REFERENCE, n_tokens: int = 50) -> CostModel:
    """Return the cost model of the machine of a reference run."""
    return fit(engine_rows(reference), n_tokens)
