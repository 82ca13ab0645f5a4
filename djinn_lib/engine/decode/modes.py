"""The ways of decoding by name, and which one a device gets unless told."""

from __future__ import annotations

from typing import Literal, get_args

from djinn_lib.errors import ConfigError

Decode = Literal["eager", "graph", "compiled"]


def default_decode(device: str) -> Decode:
    """Return the fastest way that a device ("cpu" or "cuda") has."""
    return "compiled" if device == "cuda" else "eager"


def parse_decode(decode: str) -> Decode:
    """Return a way of decoding.

    Raises:
        ConfigError: there is no such way.
    """
    if decode not in get_args(Decode):
        raise ConfigError(f"expected decode to be one of {get_args(Decode)}, got {decode!r}")
    return decode  # type: ignore[return-value]
