"""Loops over words that numba compiles to machine code, which runs without the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function when it is called first, and keep its code for the next process.

    The code is kept beside the source, or in the user's cache where that cannot be written. Where
    neither can, every process compiles again, which takes some seconds. A change of the source file
    compiles again; a change of a constant of another file does not, until `__pycache__` is deleted.
    """
    machine_code: Any = numba.njit(nogil=True)(function)
    with suppress(RuntimeError):  # no folder for the code
        machine_code._cache = _Kept(function)  # as `cache=True` does
    return machine_code


class _Kept(FunctionCache):
    """Code kept in files; numba's own fails if these are damaged, or the disk is full."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return kept code, or None if there is none that can be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever damaged pickles raise
            with suppress(OSError):
                self.flush()  # or the index stays damaged
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep code for the next process, if possible."""
        with suppress(Exception):
            super().save_overload(sig, data)
