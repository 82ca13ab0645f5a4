"""Start child processes that end with their parent, and read their logs."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_PARENT = "DJINN_PARENT"
_PR_SET_PDEATHSIG = 1
_GRACE_S, _TERMINATE_S = 20.0, 10.0  # to end after a request, and after SIGTERM
# An exception at the end of a traceback, after any prefix of a logger.
_RAISED = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|Gone)): (.+)$")
# vLLM's messages about an earlier error in another of its processes.
_SECOND_HAND = ("Engine core initialization failed", "WorkerProc initialization failed")
_OURS = "djinn_lib.errors."
_ROOT = Path(__file__).resolve().parents[2]


def _new_starter() -> None:
    global _STARTER
    # The kernel kills a child when the *thread* that started it ends; this thread never does.
    _STARTER = ThreadPoolExecutor(1, thread_name_prefix="djinn-starter")


_new_starter()
os.register_at_fork(after_in_child=_new_starter)  # a fork copies no thread


def start(
    python: str | Path,
    module: str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m module` with this copy of djinn_lib and its output in a file.

    The module must call `end_with_parent`.

    Args:
        python: of the environment to run in.
        module, arguments: what to run.
        log: file for its output.
        environment: variables to add to those of this process.
        descriptors: open files that it inherits.
    """
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        _PARENT: str(os.getpid()),
        **(environment or {}),
    }

    def run() -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                pass_fds=tuple(descriptors),
                start_new_session=True,  # the parent handles interrupts from the keyboard
            )

    starting = _STARTER.submit(run)
    try:
        return starting.result()
    except KeyboardInterrupt:
        if not starting.cancel():
            end(starting.result())  # nobody else knows of it
        raise


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent ends, for any reason."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != int(parent):  # the parent ended before the call
        os._exit(1)


def end(process: subprocess.Popen[bytes], asked: bool = False) -> None:
    """End a process and everything that it started.

    Args:
        process: to end; it may have ended.
        asked: it was asked to end, so it gets time for that.
    """
    if not (asked and _has_ended(process, _GRACE_S)):
        process.terminate()
        if not _has_ended(process, _TERMINATE_S):
            process.kill()
            process.wait()
    with suppress(ProcessLookupError):  # usually its session is empty by now
        os.killpg(process.pid, signal.SIGKILL)


def _has_ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def last_lines(log: Path, n: int = 12) -> str:
    """Return the last lines of a log, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-n:])


def raised_last(log: Path) -> tuple[str, str] | None:
    """Return the class and the message of the error that a log ends with, or None.

    Our own errors take precedence. Messages of one process about the failure of another one are
    skipped.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = [match for line in lines if (match := _RAISED.search(line.rstrip()))]
    told = [one for one in found if one[1].startswith(_OURS)] or [
        one for one in found if not one[2].startswith(_SECOND_HAND)
    ]
    return (told[-1][1].rpartition(".")[2], told[-1][2]) if told else None
