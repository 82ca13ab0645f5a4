"""The command line within the process of a test."""

from __future__ import annotations

from djinn_lib.cli import app


def djinn(*arguments: object) -> int:
    """Run `djinn` and return its exit status; what it prints goes where the test's prints go."""
    return app([str(argument) for argument in arguments], standalone_mode=False)
