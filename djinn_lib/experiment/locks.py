"""Lock a run's folder and its GPU against other runs.

Two runs in one folder would mix their rows; on one GPU they would disturb each other's
measurements. The operating system frees the lock of a killed process. The file names the holder.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from djinn_lib import nvml
from djinn_lib.errors import ConfigError
from djinn_lib.experiment.run_folder import RunFolder


@contextmanager
def run_locks(run_dir: Path, device: str) -> Iterator[None]:
    """Hold the lock of a run's folder, which exists, and for the device "cuda" that of the GPU.

    Raises:
        ConfigError: another run holds one of them; the message names it.
    """
    with ExitStack() as held:
        held.enter_context(_held(RunFolder(run_dir).lock, run_dir, f"the run folder {run_dir}"))
        if device == "cuda":
            held.enter_context(gpu_lock(run_dir))
        yield


@contextmanager
def gpu_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the GPU that this process would use, for a run in a folder.

    Raises:
        ConfigError: another run holds it.
    """
    gpu = nvml.first_gpu()
    # In the folder that all users of this machine share.
    path = Path(tempfile.gettempdir()) / f"djinn-{gpu}.lock"
    with _held(path, run_dir, f"the GPU {gpu}"):
        yield


@contextmanager
def _held(path: Path, run_dir: Path, what: str) -> Iterator[None]:
    """Hold the lock in a file; the file stays, because deleting it would allow two holders."""

    def sign(descriptor: int) -> None:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "run_dir": str(run_dir)}
        with contextlib.suppress(OSError):  # a full disk: locked all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(facts).encode(), 0)

    # Any user may lock a GPU. A file system without locks is no reason to go on without.
    lock = FileLock(path, mode=0o666, blocking=False, fallback_to_soft=False, on_acquired=sign)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{what} is in use by another run ({_holder(path)}): wait for its end, stop it, or "
            "choose another run folder or GPU (--run-dir, CUDA_VISIBLE_DEVICES)"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be locked ({error.strerror}): mend its permissions, or delete what is "
            "in its place"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} on {facts['host']}, run folder {facts['run_dir']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not given its name"
