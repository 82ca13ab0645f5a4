"""Running a function in a forked child: what ends a process, or limits it, ends only the child."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def in_a_child(function: Callable[[], object]) -> tuple[str, int]:
    """What a function returns in a forked child, as text, and how the child ended.

    An exception is told as "Kind: message". The end is 0, or the negative number of a signal. The
    child ends without any farewell.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        said = b""
        try:
            said = str(function()).encode()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}".encode()
        finally:
            os.write(writer, said)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    return text, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_script(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as `python script ...` would, in a forked child that need not import torch."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            status: object = 1
            try:
                for stream, number in ((out, 1), (err, 2)):
                    os.dup2(stream.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
                torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
                sys.argv = [str(script), *map(str, arguments)]
                sys.path.insert(0, str(script.parent))
                runpy.run_path(str(script), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status if isinstance(status, int) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = [(stream.seek(0), stream.read())[1] for stream in (out, err)]
    return subprocess.CompletedProcess(sys.argv, status, *said)
