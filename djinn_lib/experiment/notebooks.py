"""Runs notebooks headlessly with papermill, and never takes half a result for a whole one.

Papermill warns of an unknown parameter and says nothing of a killed kernel in the notebook it
leaves. So parameters are checked first, and the executed copy appears under its name only when it
is complete or has failed for good.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import papermill
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from djinn_lib.errors import ConfigError, in_words
from djinn_lib.experiment.by_hand import executing
from djinn_lib.experiment.kernels import ForkingKernelManager
from djinn_lib.experiment.notebook_logs import log_of, move_messages
from djinn_lib.experiment.status import Status
from djinn_lib.paths import NOTEBOOKS, python_path
from djinn_lib.rows import classify_error
from djinn_lib.sockets import socket_folder

_NAMED_KINDS = {
    **dict.fromkeys(("MemoryError", "CapacityError", "OutOfMemoryError"), "oom"),
    **dict.fromkeys(("ConfigError", "TraceError", "RecordError", "CheckpointError"), "bad_input"),
    "TimeoutError": "timeout",
}
_START_S = 180  # for a kernel to answer; on a machine that is busy a minute may not do
_SOCKET = "/djinn-kernel-12345678/socket-5"  # how a kernel's sockets are called in their folder
_TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool}


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Make sure that a notebook has every parameter it is to be given, and of that type.

    Raises:
        ConfigError: there is no such notebook, or it lacks one of the parameters, or annotates it
            with another type than that of the value.
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
) -> Status:
    """Execute a notebook of `notebooks/` into `output`.

    Args:
        notebook: its name without the ending, e.g. "02_run_system".
        output: the executed copy, or the notebook as it is if its kernel did not start; whatever
            was there before goes. What was printed goes to a log next to it.
        parameters: values for its parameters cell, of plain JSON types.
        kernel: a Jupyter kernel; default is the one that the notebook names.
        fork: whether the kernel may be a fork, which starts at once; see `kernels`.

    Returns:
        How it ended. A failing or dying notebook is a status, not an exception, and so is a copy
        that cannot be written, and whatever else the libraries raise.

    Raises:
        ConfigError: notebook or parameters are unknown; nothing has been run then.
        KeyboardInterrupt: the kernel has been ended, and no copy is left.
    """
    source = NOTEBOOKS / f"{notebook}.ipynb"
    check_parameters(source, parameters)
    partial = output.with_suffix(".partial.ipynb")
    begin_s, kind, error = time.perf_counter(), "", ""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in (output, partial, log_of(output)):
            left.unlink(missing_ok=True)
        with executing(output.resolve()):
            _papermill(source, partial, parameters, kernel, fork)
    except PapermillExecutionError as failure:
        kind, error = _kind(failure), f"{failure.ename}: {failure.evalue}"
    except DeadKernelError:
        kind, error = "kernel_died", "the kernel's process ended (killed, out of memory or crashed)"
    except RuntimeError as failure:  # all that Jupyter says of a kernel that does not get ready
        kind, error = "kernel_died", f"the kernel did not start: {failure}"
    except OSError as failure:
        kind, error = classify_error(failure), f"the executed notebook cannot be kept: {failure}"
    except Exception as failure:  # whatever else the libraries raise: other notebooks go on
        kind, error = classify_error(failure), in_words(failure)
    except BaseException:
        # What still listened to the kernel will find it dead; nobody is left who wants to know.
        ensure_event_loop().set_exception_handler(lambda *_: None)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with suppress(OSError, ValueError):  # of a kernel that died there may be half a copy
        move_messages(partial, log_of(output))
    with suppress(OSError):
        if not partial.exists():  # a kernel that never started leaves no copy
            shutil.copyfile(source, partial)
        os.replace(partial, output)
    seconds = time.perf_counter() - begin_s
    return Status(output.stem, "failed" if kind else "ok", seconds, kind, error)


def _kind(failure: PapermillExecutionError) -> str:
    """The kind of an error of which only the name and the words came out of the kernel."""
    kind = classify_error(RuntimeError(failure.evalue))
    if kind == "other" and failure.ename in _NAMED_KINDS:
        return _NAMED_KINDS[failure.ename]
    return kind


def _papermill(
    source: Path, output: Path, parameters: Mapping[str, Any], kernel: str | None, fork: bool
) -> None:
    # Kernels find djinn_lib in this checkout, also those of another environment.
    os.environ["PYTHONPATH"] = python_path()
    if fork:  # without a GPU, or without a measurement
        # OpenMP's threads spin while they wait for each other, which keeps the thread that they
        # wait for from its core where another process wants one too: a cell then takes five times
        # as long. Here they sleep. It is read when torch is imported, before the first fork.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    own = {"kernel_manager_class": ForkingKernelManager} if fork and kernel is None else {}
    with _sockets() as config:
        papermill.execute_notebook(
            _literally(source),
            _literally(output),
            parameters=dict(parameters),
            kernel_name=kernel,
            cwd=str(NOTEBOOKS),
            progress_bar=False,
            start_timeout=_START_S,
            shutdown_kernel="immediate",
            extra_arguments=["--log-level=40"],  # errors only: a kernel's warnings say nothing here
            config=config,
            **own,
        )


def _literally(path: Path) -> str:
    """A path for papermill, which takes it for a format string to fill parameters in."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _sockets() -> Iterator[Config]:
    """Have a kernel listen on sockets in a folder of its own, for as long as the block runs.

    Jupyter's default are ports that are free when they are chosen and may be taken when the kernel
    starts: of two that start side by side one then dies (nteract/papermill#511).
    """
    folder = socket_folder(len(_SOCKET))
    with tempfile.TemporaryDirectory(prefix="djinn-kernel-", dir=folder) as own:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{own}/socket"}})
