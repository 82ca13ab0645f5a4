"""Names of the decode modes, and the default for a device."""

from __future__ import annotations

from typing import Literal, get_args

from djinn_lib.errors import ConfigError

Decode = Literal["eager", "graph", "compiled"]


def default_decode(device: str) -> Decode:
    """Return the fastest mode of a device ("cpu" or "cuda")."""
    return "compiled" if device == "cuda" else "eager"


def parse_decode(decode: str) -> Decode:
    """Check the name of a decode mode.

    Raises:
        ConfigError: the mode is unknown.
    """
    if decode not in get_args(Decode):
        raise ConfigError(f"expected decode to be one of {get_args(Decode)}, got {decode!r}")
    return decode  # type: ignore[return-value]
