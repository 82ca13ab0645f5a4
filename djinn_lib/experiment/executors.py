"""Run independent jobs on a Ray cluster, and return one result for each.

Jobs write no shared files: their results return to the caller as values. So results are complete or
absent, and no shared file system is needed for them.

An exception in a job is its result. It is not retried and does not stop other jobs. The jobs of a
lost worker or node run again. So a job may run twice, but its result arrives once.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from djinn_lib.errors import ConfigError, PlatformError, in_words
from djinn_lib.local_ray import start_ray
from djinn_lib.paths import python_path
from djinn_lib.sockets import ray_folder

_CONNECT_S, _HEALTH_S = 5.0, 60.0  # the check imports Ray: 2 s, and 15 on a busy machine
_LOOK_S = 2.0  # between two looks at the nodes while nothing finishes
_OBJECT_STORE_BYTES = 200 << 20  # of a cluster started here: results are small
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Job:
    """A call of an importable function, and the resources that it needs.

    With `whole_node` it gets all cores of one of the largest nodes, instead of `num_cpus`.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    num_cpus: float = 1
    num_gpus: float = 0
    whole_node: bool = False


@dataclass(frozen=True)
class Result:
    """Result of a job: its value, or the cause of its failure.

    `lost` says that its worker or node was lost in every attempt.
    """

    value: Any = None
    error: str = ""
    lost: bool = False


def fan_out(
    jobs: Sequence[Job], address: str | None = None, max_retries: int = 3, patience_s: float = 60.0
) -> Iterator[tuple[Job, Result]]:
    """Run jobs on a Ray cluster and yield each with its result as it ends.

    Args:
        jobs: the jobs, which run in any order.
        address: address of a cluster, as "host:port"; default `RAY_ADDRESS`; without that, a
            cluster on this machine is started, and stopped at the end.
        max_retries: how often a job is retried after its worker or node is lost.
        patience_s: how long (s) to wait for a node that can run a job.

    Raises:
        ConfigError: the address is invalid, or no cluster answers there.
        PlatformError: Ray is not installed, or no node has the resources; nothing has run.
    """
    with _cluster(ensure_ray(address)):
        import ray

        pending, fitted_s = _submit(jobs, max_retries), time.perf_counter()
        while pending:
            for ref in ray.wait(list(pending), timeout=_LOOK_S)[0]:
                yield pending.pop(ref)[0], _result(ref)
            nodes = _nodes()
            stuck = [ref for ref, (_, needs) in pending.items() if not _fits(needs, nodes)]
            fitted_s = fitted_s if stuck else time.perf_counter()
            if time.perf_counter() - fitted_s > patience_s:
                for ref in stuck:
                    ray.cancel(ref, force=True)
                    job, needs = pending.pop(ref)
                    yield job, Result(error=_no_node(job, needs, nodes), lost=True)


def ensure_ray(address: str | None = None) -> str | None:
    """Return the address of the cluster to join, or None to start one here.

    Raises:
        ConfigError: the address is invalid, no cluster answers there, or the path of every folder
            here is too long for sockets.
        PlatformError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise PlatformError("expected Ray in this environment, got none: pip install 'ray>=2.60'")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        ray_folder()
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            f"expected a Ray cluster as host:port of its head node, got {address!r}: "
            "set RAY_ADDRESS to what `ray start --head` printed, or unset it"
        )
    _ensure_answers(host, int(port))
    return address


def _ensure_answers(host: str, port: int) -> None:
    """Check the cluster first: `ray.init` would try for minutes and then end this process."""
    ray_check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address"]
    check = [*ray_check, f"{host}:{port}"]
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
        subprocess.run(check, check=True, capture_output=True, timeout=_HEALTH_S)
    except (OSError, OverflowError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"expected a Ray cluster of this version of Ray at RAY_ADDRESS={host}:{port}, got no "
            f"answer ({type(error).__name__}): start one there with `ray start --head`, or unset "
            "RAY_ADDRESS to use this machine alone"
        ) from error


@contextmanager
def _cluster(joined: str | None) -> Iterator[None]:
    """Connect to a cluster; stop it at the end if it was started here."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["PYTHONPATH"] = python_path()  # a cluster that is started here inherits it
    try:
        if joined:
            ray.init(
                address=joined,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            )
        else:
            start_ray(logging_level=logging.ERROR, object_store_memory=_OBJECT_STORE_BYTES)
    except Exception as error:  # Ray raises its plainest one where a node does not start in time
        remedy = (
            "run this on a node of the cluster, with the cluster's versions of Python and Ray"
            if joined
            else "try again when the machine is less busy, or use the local executor"
        )
        raise PlatformError(
            f"expected to use Ray at {joined or 'this machine'}, got {in_words(error)}: {remedy}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _submit(jobs: Sequence[Job], max_retries: int) -> dict[Any, tuple[Job, Resources]]:
    """Submit all jobs, if each fits a node; return them by Ray's reference to the result."""
    import ray

    nodes = _nodes()
    wanted = [(job, _needs(job, nodes)) for job in jobs]
    for job, needs in wanted:
        if not _fits(needs, nodes):
            raise PlatformError(_no_node(job, needs, nodes))
    run = ray.remote(max_retries=max_retries, retry_exceptions=False)(_run)
    pending = {}
    for job, needs in wanted:
        placed = run.options(num_cpus=needs["CPU"], num_gpus=needs["GPU"])
        pending[placed.remote(job.function, job.arguments)] = job, needs
    return pending


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Result:
    """Run a job on its worker; return exceptions as text, since not all can be pickled."""
    try:
        return Result(function(*arguments))
    except (Exception, SystemExit) as error:  # a worker that exits would be taken for a lost one
        return Result(error=f"{type(error).__name__}: {error}")


def _result(ref: Any) -> Result:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:  # beside the job itself: a module or value that is not pickled
        return Result(error=f"{error.cause}")
    except RayError as error:
        return Result(error=f"{type(error).__name__}: {error}", lost=True)


def _nodes() -> list[Resources]:
    """Return the total resources of each living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _needs(job: Job, nodes: Sequence[Resources]) -> Resources:
    """Return the resources to request; two jobs that need a whole node never share one."""
    cores = [node.get("CPU", 0) for node in nodes if node.get("GPU", 0) >= job.num_gpus]
    return {"CPU": max(cores, default=1) if job.whole_node else job.num_cpus, "GPU": job.num_gpus}


def _fits(needs: Resources, nodes: Sequence[Resources]) -> bool:
    return any(all(node.get(key, 0) >= n for key, n in needs.items()) for node in nodes)


def _no_node(job: Job, needs: Resources, nodes: Sequence[Resources]) -> str:
    have = [f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes]
    return (
        f"expected a node with {needs['CPU']:g} CPU and {needs['GPU']:g} GPU for {job.name!r}, "
        f"got nodes with {', '.join(have) or 'nothing'}: add such a node"
    )
