"""Checks of single values that callers pass, before anything is done with them.

Numbers of numpy count as numbers. A bool is no number, and text is neither number nor flag.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from djinn_lib.errors import ConfigError, shown


def whole_number(value: object, what: str, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`, as Python's own; `what` names it in messages.

    Raises:
        ConfigError: it is something else, or out of range.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(f"expected {what} to be a whole number, got {shown(value)}")
    _ensure_within(value, what, least, most)
    return int(value)


def real_number(value: object, what: str, least: float, most: float) -> float:
    """Return a number from `least` to `most`, as Python's own; `what` names it in messages.

    Raises:
        ConfigError: it is something else, or out of range.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or value != value:
        raise ConfigError(f"expected {what} to be a number, got {shown(value)}")
    _ensure_within(value, what, least, most)
    return float(value)


def _ensure_within(number: Any, what: str, least: float, most: float) -> None:
    if number < least:
        raise ConfigError(f"expected {what} of at least {least}, got {shown(number)}")
    if number > most:
        raise ConfigError(f"expected {what} of at most {most}, got {shown(number)}")


def flag(value: object, what: str) -> bool:
    """Return True or False.

    Raises:
        ConfigError: it is neither, though Python may take it for true.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ConfigError(f"expected {what} to be True or False, got {shown(value)}")


def function(value: object, what: str) -> Callable[..., object]:
    """Return a value that can be called.

    Raises:
        ConfigError: it cannot.
    """
    if callable(value):
        return value
    raise ConfigError(f"expected {what} to be a function, got {shown(value)}")
