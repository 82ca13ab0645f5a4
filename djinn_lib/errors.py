"""The errors that djinn_lib raises on purpose.

Each message says what was expected, what came and what to do. Every class also derives from the
built-in error that a caller would reach for first, so `except ValueError` works as expected.
"""

from __future__ import annotations

from numbers import Number
from pathlib import PurePath

_SHOWN_CHARACTERS = 80


class DjinnError(Exception):
    """Base of every error that djinn_lib raises on purpose."""


def in_words(error: BaseException) -> str:
    """Return what an error says; of those that others raise, also what it is."""
    said = str(error)
    return said if isinstance(error, DjinnError) and said else f"{type(error).__name__}: {said}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; others' errors can be pages long."""
    said = str(error).strip()
    return said.splitlines()[0][:300] if said else "no message"


def shown(value: object) -> str:
    """Return a refused value as a message shows it: short, and never the contents of a container.

    Printing a tensor reads its memory, which may not be mapped, and Python refuses to print an
    integer of thousands of digits.
    """
    if not isinstance(value, str | bytes | Number | PurePath | None):
        return f"a value of type {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[: _SHOWN_CHARACTERS - 3]}..."


class ConfigError(DjinnError, ValueError):
    """A parameter, profile, model name or system name that cannot be used."""


class TraceError(DjinnError, ValueError):
    """A trace that is malformed or does not fit the models at hand."""


class RecordError(DjinnError, ValueError):
    """Rows or a manifest that break the schema."""


class CheckpointError(DjinnError, ValueError):
    """Weights that are missing, truncated, corrupted or in a refused format."""


class CapacityError(DjinnError, MemoryError):
    """More memory was asked for than the ring, the device or the host has."""


class PlatformError(DjinnError, RuntimeError):
    """The operating system or driver lacks what a backend needs."""


class LeaseError(DjinnError, RuntimeError):
    """A lease was used after its release, or a leased model was to be changed."""


class RequestCancelled(DjinnError, RuntimeError):
    """A request was given up while it was being served."""
