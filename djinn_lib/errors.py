"""The errors that djinn_lib raises on purpose.

Each message says what is wrong and what to do. Every class also derives from the built-in error
that a caller would expect, so `except ValueError` works.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from numbers import Number
from pathlib import PurePath

_SHOWN_CHARACTERS = 80


class DjinnError(Exception):
    """Base of every error that djinn_lib raises on purpose."""


def in_words(error: BaseException) -> str:
    """Return an error's message; for errors of other libraries, with its type."""
    text = str(error)
    return text if isinstance(error, DjinnError) and text else f"{type(error).__name__}: {text}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, of at most 300 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else "no message"


def shown(value: object) -> str:
    """Format a refused value for a message: short, without contents of containers.

    Printing a tensor reads its memory, which may not be mapped. Python refuses to print an integer
    of thousands of digits.
    """
    if not isinstance(value, str | bytes | Number | PurePath | None):
        return f"a value of type {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[: _SHOWN_CHARACTERS - 3]}..."


def did_you_mean(value: object, known: Iterable[str], otherwise: str) -> str:
    """Ask for the known name that is most like a refused one; `otherwise` if none is."""
    similar = get_close_matches(value, known, 1) if isinstance(value, str) else []
    return f"did you mean {shown(similar[0])}?" if similar else otherwise


def unknown_model(name: object, known: Collection[str], otherwise: str) -> str:
    """Return the message about a name that no model has; `otherwise` if none is like it."""
    return f"expected one of the models {list(known)}, got {shown(name)}: " + did_you_mean(
        name, known, otherwise
    )


class ConfigError(DjinnError, ValueError):
    """A parameter, profile, model name or system name that cannot be used."""


class TraceError(DjinnError, ValueError):
    """A trace that is malformed or does not fit the configured models."""


class RecordError(DjinnError, ValueError):
    """Rows or a manifest that break the schema."""


class CheckpointError(DjinnError, ValueError):
    """Weights that are missing, truncated, corrupted or in a refused format."""


class CapacityError(DjinnError, MemoryError):
    """A request for more memory than the ring, the device or the host has."""


class PlatformError(DjinnError, RuntimeError):
    """The operating system or driver lacks what a backend needs."""


class LeaseError(DjinnError, RuntimeError):
    """A use of a released lease, or a change of a leased model."""


class RequestCancelled(DjinnError, RuntimeError):
    """A request that was cancelled while it was being served."""
