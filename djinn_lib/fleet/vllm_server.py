"""`vllm serve` in a process that ends with the one that started it."""

from __future__ import annotations

import sys

from djinn_lib.fleet import children


def main() -> None:
    """Run vLLM's own command with the arguments of this one."""
    children.end_with_parent()
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
