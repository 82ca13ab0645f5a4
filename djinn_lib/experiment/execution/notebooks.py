"""Execute notebooks with papermill, and detect incomplete executions.

Papermill only warns of unknown parameters, and its output does not show that a kernel was killed.
So parameters are checked first, and the executed copy appears under its name only when it is
complete or has finally failed.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_core.utils import ensure_event_loop, run_sync
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from djinn_lib.errors import ConfigError, in_words
from djinn_lib.experiment.execution.by_hand import executing
from djinn_lib.experiment.execution.kernels import (
    ForkingKernelManager,
    begin_worker,
    fork_context,
    import_ahead,
)
from djinn_lib.experiment.execution.notebook_logs import log_of, move_messages
from djinn_lib.experiment.manifest import Status
from djinn_lib.paths import NOTEBOOKS, python_path
from djinn_lib.rows import classify_error
from djinn_lib.sockets import socket_folder

_NAMED_KINDS = {
    **dict.fromkeys(("MemoryError", "CapacityError", "OutOfMemoryError"), "oom"),
    **dict.fromkeys(("ConfigError", "TraceError", "RecordError", "CheckpointError"), "bad_input"),
    "TimeoutError": "timeout",
}
_AT_ONCE = 4  # each uses up to a gigabyte of memory
_START_S = 180  # until a kernel answers; on a busy machine a minute may be too short
_SOCKET = "/djinn-kernel-12345678/socket-5"  # pattern of the names of a kernel's sockets
_T = TypeVar("_T")
_TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool}


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Check that a notebook has all given parameters, with the types of the values.

    Raises:
        ConfigError: there is no such notebook, or a parameter is missing or has another type.
    """
    if not notebook.exists():
        known = sorted(path.stem for path in notebook.parent.glob("*.ipynb"))
        raise ConfigError(f"expected a notebook out of {known}, got {notebook.stem!r}")
    known = papermill.inspect_notebook(_literally(notebook))
    if unknown := sorted(parameters.keys() - known.keys()):
        raise ConfigError(
            f"expected parameters of {notebook.name} out of {sorted(known)}, got {unknown}"
        )
    for name, value in parameters.items():
        kind = known[name]["inferred_type_name"]
        if not isinstance(value, _TYPES.get(kind, object)):
            raise ConfigError(
                f"expected parameter {name!r} of {notebook.name} to be of type {kind}, got "
                f"{value!r} ({type(value).__name__})"
            )


def execute(
    notebook: str,
    output: Path,
    parameters: Mapping[str, Any],
    kernel: str | None = None,
    fork: bool = False,
    manager: KernelManager | None = None,
) -> Status:
    """Execute a notebook of `notebooks/` into `output`.

    Args:
        notebook: its name without the ending, e.g. "02_run_system".
        output: path of the executed copy, which is replaced; printed output goes to a log next
            to it. If the kernel did not start, it is a copy of the notebook.
        parameters: values for its parameters cell, of plain JSON types.
        kernel: a Jupyter kernel; default is the one that the notebook names.
        fork: whether the kernel may be a fork, which starts at once; see `kernels`.
        manager: manager of a kernel from `one_kernel`, to use instead; it keeps running.

    Returns:
        The status. Failing or dying notebooks, copies that cannot be written and errors of
        libraries are statuses, not exceptions.

    Raises:
        ConfigError: notebook or parameters are unknown; nothing has run.
        KeyboardInterrupt: the kernel was ended, and there is no copy.
    """
    source = NOTEBOOKS / f"{notebook}.ipynb"
    check_parameters(source, parameters)
    partial = output.with_suffix(".partial.ipynb")
    begin_s, kind, error = time.perf_counter(), "", ""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in (output, partial, log_of(output)):
            left.unlink(missing_ok=True)
        with (
            executing(output.resolve().parent),
            nullcontext(manager) if manager else one_kernel(kernel, fork) as used,
        ):
            _papermill(source, partial, parameters, used)
    except PapermillExecutionError as failure:
        kind, error = _kind(failure), f"{failure.ename}: {failure.evalue}"
    except DeadKernelError:
        kind, error = "kernel_died", "the kernel's process ended (killed, out of memory or crashed)"
    except RuntimeError as failure:  # Jupyter raises nothing more specific for this
        kind, error = "kernel_died", f"the kernel did not start: {failure}"
    except OSError as failure:
        kind, error = classify_error(failure), f"the executed notebook cannot be kept: {failure}"
    except Exception as failure:  # errors of libraries: other notebooks continue
        kind, error = classify_error(failure), in_words(failure)
    except BaseException:
        # Pending listeners will report that the kernel is dead, which is already known.
        ensure_event_loop().set_exception_handler(lambda *_: None)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with suppress(OSError, ValueError):  # a kernel that died may leave an incomplete copy
        move_messages(partial, log_of(output))
    with suppress(OSError):
        if not partial.exists():  # a kernel that never started leaves no copy
            shutil.copyfile(source, partial)
        os.replace(partial, output)
    seconds = time.perf_counter() - begin_s
    return Status(output.stem, "failed" if kind else "ok", seconds, kind, error)


def side_by_side(jobs: Mapping[str, Callable[[], Status]]) -> Iterator[Status]:
    """Execute notebooks in parallel, each by a job; yield the status of each when it ends.

    They run in processes of their own, because papermill changes the working directory.
    """
    with _pool(min(len(jobs), len(os.sched_getaffinity(0)), _AT_ONCE)) as pool:
        running = {pool.submit(job): name for name, job in jobs.items()}
        try:
            for ended in as_completed(running):
                try:
                    yield ended.result()
                except BrokenProcessPool as error:
                    said = f"its process ended: {error}"
                    yield Status(running[ended], "failed", 0.0, "kernel_died", said)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # this also ends their kernels
                process.kill()
            raise


def in_a_fork(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a process that has the imports of `kernels`; return its result."""
    with _pool(1) as pool:
        return pool.submit(function, *arguments).result()


def _pool(n: int) -> Executor:
    return ProcessPoolExecutor(n, fork_context(), initializer=begin_worker)


def _kind(failure: PapermillExecutionError) -> str:
    """Classify an error from its name and its message, which is all that the kernel returns."""
    kind = classify_error(RuntimeError(failure.evalue))
    if kind == "other" and failure.ename in _NAMED_KINDS:
        return _NAMED_KINDS[failure.ename]
    return kind


@contextmanager
def one_kernel(name: str | None = None, fork: bool = False) -> Iterator[KernelManager]:
    """Manage one kernel, which the first notebook starts; it ends with the block.

    Args:
        name: name of a Jupyter kernel; default is the one of this environment.
        fork: whether the kernel of this environment may be a fork; see `kernels`.
    """
    kind = ForkingKernelManager if fork and name is None else AsyncKernelManager
    # Kernels of other environments must also find djinn_lib in this checkout.
    os.environ["PYTHONPATH"] = python_path()
    if fork:  # without a GPU, or without a measurement
        import_ahead()
    with _sockets() as config:
        manager = kind(kernel_name=name or NATIVE_KERNEL_NAME, config=config)
        try:
            yield manager
        finally:
            if manager.has_kernel:
                with suppress(RuntimeError):  # the kernel may have ended by itself
                    run_sync(manager.shutdown_kernel)(now=True)


def _papermill(
    source: Path, output: Path, parameters: Mapping[str, Any], manager: KernelManager
) -> None:
    papermill.execute_notebook(
        _literally(source),
        _literally(output),
        parameters=dict(parameters),
        kernel_name=manager.kernel_name,
        cwd=str(NOTEBOOKS),
        progress_bar=False,
        start_timeout=_START_S,
        extra_arguments=["--log-level=40"],  # errors only: a kernel's warnings are not useful here
        km=manager,
    )


def _literally(path: Path) -> str:
    """Escape a path for papermill, which uses it as a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _sockets() -> Iterator[Config]:
    """Let a kernel listen on sockets in its own folder while the block runs.

    By default Jupyter chooses free ports, which may be taken when the kernel starts. If two kernels
    start at once, one may then die (nteract/papermill#511).
    """
    folder = socket_folder(len(_SOCKET))
    with tempfile.TemporaryDirectory(prefix="djinn-kernel-", dir=folder) as own:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{own}/socket"}})
