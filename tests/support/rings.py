"""Brokers in a process of their own, and other processes that need not import torch once more."""

import os
import runpy
import subprocess
import sys
import traceback
from multiprocessing import get_context
from types import SimpleNamespace

import torch

from djinn_lib.fleet import children
from djinn_lib.fleet.connection import Connection

MIB = 1 << 20
SOON_S = 20.0
FORK = get_context("fork")


class Ring:
    """`djinn ring` of ten pages, which ends with the block."""

    def __init__(self, folder, popen=subprocess.Popen):
        self.socket = folder / "ring"
        options = ("--capacity", "10MiB", "--quantum", "0.01", "--max-wait", "0.05")
        self.process = popen(
            [sys.executable, "-m", "djinn_lib.fleet.commands", "ring", "--socket",
             str(self.socket), "--device", "cpu", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "ring of" in self.process.stdout.readline(), self.process.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert not self.end() and self.process.returncode == 0

    def status(self):
        connection = Connection(self.socket)
        try:
            return connection.status()
        finally:
            connection.close()

    def end(self):
        """End it, and return what it wrote to stderr."""
        self.process.terminate()
        return self.process.communicate(timeout=SOON_S)[1]


def fork_children(patch):
    """Let `children.start` fork this process, instead of starting a Python that imports torch."""
    used = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    patch.setattr(children, "subprocess", SimpleNamespace(Popen=forked, **used))


def forked(command, *, env=os.environ, pass_fds=(), **options):
    """Like `subprocess.Popen` of `python -m module ...`; the child never gets to `exec`."""
    module, arguments = command[2], command[3:]

    def become():
        first = 3
        for kept in (*sorted(pass_fds), os.sysconf("SC_OPEN_MAX")):
            os.closerange(first, kept)  # also the pipe on which the parent waits for `exec`
            first = kept + 1
        variables = dict(env)
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:0] = variables.get("PYTHONPATH", "").split(os.pathsep)
        sys.argv = [module, *arguments]
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        status = 1
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    return subprocess.Popen(command, env=env, preexec_fn=become, **options)
