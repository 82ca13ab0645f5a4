"""Running a function in a forked child: what ends a process, or limits it, ends only the child."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

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
