"""Compare a run of `engine.py` with the targets of the engine on one H100."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Result = dict[str, Any]
GIB = 2**30
DECODE_MS = {"llama-7b": 5.4, "mistral-7b": 5.9, "phi-2": 3.0}
TOTAL_MS = {"llama-7b": 300.0, "phi-2": 170.0}
HBM_SHARE = 0.9


def targets(result: Result) -> list[dict[str, Any]]:
    """Return name, target, measured, unit and met for every target, in table order."""
    rows = list(_rows(result))
    return [
        {
            "name": name,
            "target": target,
            "measured": measured,
            "unit": unit,
            "met": measured >= target if at_least else measured <= target,
        }
        for name, target, measured, unit, at_least in rows
    ]


Row = tuple[str, float, float, str, bool]


def _rows(result: Result) -> Iterator[Row]:
    models = list(result["sizes"])
    case = _finder(result)
    link = result["machine"]["link_rate_bytes_per_s"]
    hit = {m: case("hit", m) for m in models}
    for m in models:
        yield f"hit: cost of the switch, {m}", 0.5, hit[m]["switch_ms"], "ms", False
    for m in models:
        floor_ms = result["sizes"][m] / link * 1e3
        share = case("load", m)["load_ms"] / floor_ms
        name = f"full miss: time until all weights are there, {m}"
        yield name, 1.05, share, "x bytes / H2D rate", False
    for before, after in (("mistral-7b", "llama-7b"), ("llama-7b", "mistral-7b")):
        beyond = case(f"after {before}", after)["ttft_ms"] - hit[after]["ttft_ms"]
        yield f"{after} after {before}: TTFT beyond a hit's", 10.0, beyond, "ms", False
    for m in models:
        floor_ms = max(case("load", m)["load_ms"], hit[m]["ttft_ms"])
        beyond = case("full miss, overlap on", m)["ttft_ms"] - floor_ms
        yield f"full miss: TTFT beyond max(load, prefill), {m}", 15.0, beyond, "ms", False
    for m, limit_ms in DECODE_MS.items():
        yield f"decode, batch 1, {m}", limit_ms, hit[m]["ms_per_token"], "ms/token", False
    for m in models:
        share = read_floor_ms(result, m) / hit[m]["ms_per_token"]
        yield f"decode: share of the HBM rate, {m}", HBM_SHARE, share, "of the read rate", True
    for m, limit_ms in TOTAL_MS.items():
        yield f"generate(50) on a hit, {m}", limit_ms, hit[m]["total_ms"], "ms", False
    yield "bytes copied to the host by evictions", 0, result["copied_bytes"]["d2h"], "bytes", False
    beyond = result["device_bytes_beyond"] / GIB
    yield "device memory beyond ring, KV cache and graphs", 1.5, beyond, "GiB", False
    share = result["host_master_bytes"] / sum(result["model_bytes"].values())
    yield "host memory of the master copies", 1.02, share, "x bytes of the models", False


def read_floor_ms(result: Result, model: str) -> float:
    """Return the milliseconds to read the weights that a token of batch 1 needs."""
    return result["bytes_per_token"][model] / result["machine"]["hbm_read_rate_bytes_per_s"] * 1e3


def _finder(result: Result) -> Callable[[str, str], dict[str, Any]]:
    def case(name: str, model: str) -> dict[str, Any]:
        """Return the case; if there are several ways of decoding, the last and fastest."""
        found = [c for c in result["cases"] if (c["case"], c["model"]) == (name, model)]
        if not found:
            raise ValueError(f"expected a case {name!r} of {model!r}, got none")
        return found[-1]

    return case
