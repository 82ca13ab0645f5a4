"""Processes that end with the one that started them, and what they said before they ended."""

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
_ASKED_S, _TOLD_S = 20.0, 10.0  # to end by itself, and after SIGTERM
# An exception as the end of a traceback tells it, behind whatever a logger has put before it.
_RAISED = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|Gone)): (.+)$")
# What vLLM's processes say of an error that another one of them told before.
_SECOND_HAND = ("Engine core initialization failed", "WorkerProc initialization failed")
_OURS = "djinn_lib.errors."
_ROOT = Path(__file__).resolve().parents[2]
# The kernel ends a child with the thread that started it; this one lives as long as the process.
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="djinn-starter")


def start(
    python: str | Path,
    module: str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m module` with this copy of djinn_lib; its output goes to a file.

    The module has to call `end_with_parent`.

    Args:
        python: of the environment to run in.
        module, arguments: what to run.
        log: where its output goes.
        environment: variables beside those of this process.
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
                start_new_session=True,  # an interrupt at the keyboard is the parent's business
            )

    return _STARTER.submit(run).result()


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel signal this process when the one that started it ends, however that ends."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != int(parent):  # it ended before
        os._exit(1)


def end(process: subprocess.Popen[bytes], asked: bool = False) -> None:
    """Make sure that a process has ended, and what it started as well.

    Args:
        process: to end; it may have ended.
        asked: it has been told to end, so it gets a moment for that.
    """
    if not (asked and _has_ended(process, _ASKED_S)):
        process.terminate()
        if not _has_ended(process, _TOLD_S):
            process.kill()
            process.wait()
    with suppress(ProcessLookupError):  # as a rule nobody is left in its session
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

    One of ours goes before others. Of several processes that write to the log, one may only tell
    that another one failed: that is not what is looked for.
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
