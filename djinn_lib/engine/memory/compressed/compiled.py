"""Loops over words that numba compiles to machine code, which runs without the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function when it is called first, and keep its code for the next process.

    The code is kept beside the source, or in the user's cache where that cannot be written. Where
    neither can, every process compiles again, which takes some seconds. A change of the source file
    compiles again; a change of a constant of another file does not, until `__pycache__` is deleted.
    """
    try:
        return cast("F", numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # no folder for the code
        return cast("F", numba.njit(nogil=True)(function))
