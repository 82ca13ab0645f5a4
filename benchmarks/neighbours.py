"""Do runs on several GPUs of one host disturb each other? `python benchmarks/neighbours.py`.

Each GPU gets a process and an equal share of the processors, as with

    CUDA_VISIBLE_DEVICES=1 taskset -c 16-31 make reproduce

The rates that bound an experiment are measured on each GPU alone and then on all of them at once:
copies to the GPU and back, device memory, and how long the host takes to start an operator.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd

from djinn_lib import nvml
from djinn_lib.experiment.setup.machine import eager_operator_us, measure_rates
from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path
from djinn_lib.provenance import git_state


class Lane:
    """A process with a GPU and processors of its own, which measures when it is asked to."""

    def __init__(self, device: str, gpu: int, cores: Sequence[int]) -> None:
        """Start it. `gpu` is an index of the driver's list, and unused for the CPU."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(device, gpu, cores, theirs))
        self.process.daemon = True  # it ends with this process
        self.process.start()
        theirs.close()

    def __enter__(self) -> Lane:
        """Wait until it has started."""
        self.facts = self.pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # which ends it
        self.process.join()


def _serve(device: str, gpu: int, cores: Sequence[int], pipe: Connection) -> None:
    os.sched_setaffinity(0, cores)
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    uuid = nvml.first_gpu() if device == "cuda" else None
    measure_rates(device, repeats=1)  # the context, and first uses of kernels
    pipe.send({"gpu": uuid, "cores": len(cores)})
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send({**measure_rates(device), "eager_operator_us": eager_operator_us(device)})


def measure(device: str, n_lanes: int, rounds: int) -> pd.DataFrame:
    """Return a row for each lane, round and company: `beside` is how many others measured."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // n_lanes)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        started = [Lane(device, i, cores[i * share :][:share] or cores) for i in range(n_lanes)]
        lanes = [stack.enter_context(lane) for lane in started]
        for number in range(rounds):
            for together in [*([lane] for lane in lanes), lanes]:
                for lane in together:
                    lane.pipe.send("measure")
                for lane in together:
                    rates = lane.pipe.recv()
                    beside = len(together) - 1
                    rows.append(
                        {**lane.facts, "lane": lanes.index(lane), "beside": beside, "round": number}
                        | rates
                    )
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for each lane and rate, the median alone and beside others, and their ratio."""
    rates = [name for name in rows if name.endswith("_per_s") or name.endswith("_us")]
    measured = rows[["lane", "beside", *rates]].melt(["lane", "beside"], var_name="rate").dropna()
    table = measured.pivot_table("value", ["lane", "rate"], "beside", aggfunc="median")
    table = table.rename(columns={0: "alone", table.columns[-1]: "beside the others"})
    return table.assign(ratio=table["beside the others"] / table["alone"]).reset_index()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default=None)
    parser.add_argument("--lanes", type=int, help="how many; the default is one for each GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=user_path, default=Path("data/runs/neighbours.json"))
    args = parser.parse_args(arguments)
    n_gpus = nvml.n_gpus()
    device = args.device or ("cuda" if n_gpus else "cpu")
    n_lanes = args.lanes or max(2, n_gpus)
    if device == "cuda" and n_lanes > n_gpus:
        parser.error(f"{n_lanes} lanes need as many GPUs, and there are {n_gpus}")
    print(f"{n_lanes} lanes on {device}: each alone, then all at once, {args.rounds} times")
    rows = measure(device, n_lanes, args.rounds)
    print(summary(rows).to_string(index=False))
    commit, dirty = git_state(REPO)
    kept = {"commit": commit, "dirty": dirty, "device": device, "rows": rows.to_dict("records")}
    write_json(args.out, kept)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
