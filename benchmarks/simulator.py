"""Measure how the simulator scales: `python benchmarks/simulator.py`.

The requests are for 1,000 models with pages of 64 MiB. Each number of requests runs in its own
process, so its peak memory can be measured. The offline optimum is measured for 100,000 requests.
The cost of one request must not depend on the number of requests.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import pandas as pd

from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path
from djinn_lib.simulator.checkpoint_sizes import fleet
from djinn_lib.simulator.optimal import optimal_bytes
from djinn_lib.simulator.simulate import simulate
from djinn_lib.trace import zipf_trace

N_MODELS, CAPACITY, ALPHA = 1000, 320 << 30, 1.0
SIZES = (1_000, 10_000, 100_000, 1_000_000)
OPTIMUM_REQUESTS = 100_000


def main() -> int:
    """Measure every size, print and write a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure one size in this process")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--out", type=user_path, default=REPO / "data" / "runs" / "simulator.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.policy)))
        return 0
    rows = []
    for policy in ("lru", "adaptive"):
        for n in [size for size in SIZES if size <= options.largest]:
            command = [sys.executable, __file__, "--one", str(n), "--policy", policy]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    requests = _models(min(OPTIMUM_REQUESTS, options.largest))
    begin_s = time.perf_counter()
    optimal_bytes(requests, fleet(N_MODELS), CAPACITY)
    optimum = {"n_requests": len(requests), "seconds": time.perf_counter() - begin_s}
    write_json(options.out, {"n_models": N_MODELS, "capacity_bytes": CAPACITY, "alpha": ALPHA,
                             "growth": rows, "optimum": optimum})  # fmt: skip
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    print(f"optimum of {optimum['n_requests']} requests: {optimum['seconds']:.2f} s")
    return 0


def one(n_requests: int, policy: str) -> dict[str, float | int | str]:
    """Simulate `n_requests` requests; the peak memory is that of the whole process."""
    models = _models(n_requests)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    rows = simulate(models, fleet(N_MODELS), CAPACITY, policy)
    seconds, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    return {
        "policy": policy,
        "n_requests": len(rows),
        "seconds": seconds,
        "us_per_request": seconds / n_requests * 1e6,
        "cpu_us_per_request": cpu_s / n_requests * 1e6,  # correct even if other programs run
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _models(n_requests: int) -> list[str]:
    trace = zipf_trace(n_requests, ALPHA, list(fleet(N_MODELS)), seed=0, rate_per_s=1.0)
    return [request.model for request in trace.requests]


if __name__ == "__main__":
    sys.exit(main())
