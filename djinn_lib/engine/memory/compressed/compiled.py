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
    neither can, every process compiles again, which takes some seconds. So does a change of the
    source file or of an integer that it imports.
    """
    machine_code: Any = numba.njit(nogil=True)(function)
    with suppress(RuntimeError):  # no folder for the code
        machine_code._cache = _Kept(function)  # as `cache=True` does
    return machine_code


class _Kept(FunctionCache):
    """Code kept in files.

    numba's own fails if these are damaged, or the disk is full, and does not notice another value
    of an imported constant.
    """

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

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """Return what code must have been made for, to be used again."""
        names = self._py_func.__globals__.items()
        numbers = sorted((name, value) for name, value in names if isinstance(value, int))
        return super()._index_key(sig, codegen), tuple(numbers)
