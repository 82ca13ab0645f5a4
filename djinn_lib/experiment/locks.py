"""Locks that keep two runs apart: one a run's folder, one a GPU.

A second run in the same folder would mix its rows with those of the first; on the same GPU each
would measure the other. The kernel holds a lock for as long as the process lives that took it
(`flock`), so the lock of a process that was killed is free at once. The file says who holds it;
that is why it is locked here and not by a library that empties the file before it asks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from djinn_lib import nvml
from djinn_lib.errors import ConfigError


@contextmanager
def run_locks(run_dir: Path, device: str) -> Iterator[None]:
    """Hold the lock of a run's folder and, for "cuda", that of the GPU.

    Args:
        run_dir: exists and can be written to.
        device: "cpu" or "cuda"; "cpu" where the run's cells go to other machines.

    Raises:
        ConfigError: another run holds one of them; the message names it.
    """
    with held(run_dir / ".lock", run_dir, f"the run folder {run_dir}"):
        if device != "cuda":
            yield
            return
        with gpu_lock(run_dir):
            yield


@contextmanager
def gpu_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the GPU that this process would use.

    Raises:
        ConfigError: another run holds it.
    """
    gpu = nvml.first_gpu()
    with held(_shared_folder() / f"djinn-{gpu}.lock", run_dir, f"the GPU {gpu}"):
        yield


@contextmanager
def held(path: Path, run_dir: Path, what: str) -> Iterator[None]:
    """Hold the lock in a file, which stays there afterwards: deleting it would let two in.

    Args:
        path: of the file; made if need be.
        run_dir: whose run this is, for the reader of a message.
        what: the lock protects, in words.

    Raises:
        ConfigError: a living process holds it, or the file cannot be opened.
    """
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"expected {what} to be free, got a run that uses it ({_holder(descriptor)}): "
                "wait for its end, stop it, or choose another run folder or GPU (--run-dir, "
                "CUDA_VISIBLE_DEVICES)"
            ) from error
        _sign(descriptor, run_dir)
        yield
    finally:
        os.close(descriptor)


def _shared_folder() -> Path:
    """Where all users of this machine find the locks of its GPUs."""
    return Path(tempfile.gettempdir())


def _open(path: Path) -> int:
    """Open the file of a lock, also one of another user's, and never what a link leads to."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            descriptor = os.open(path, flags | os.O_CREAT, 0o666)
            with contextlib.suppress(PermissionError):
                os.fchmod(descriptor, 0o666)  # whatever the umask says
            return descriptor
    except OSError as error:
        raise ConfigError(
            f"expected a file for a lock at {path}, got {error.strerror}: mend its permissions"
        ) from error


def _sign(descriptor: int, run_dir: Path) -> None:
    """Write down who holds the lock."""
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "run_dir": str(run_dir)}
    with contextlib.suppress(OSError):  # a full disk: locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {facts['pid']} on {facts['host']}, run folder {facts['run_dir']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not given its name"
