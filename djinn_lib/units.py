"""Sizes in bytes and other numbers: reading them from text, printing them for people."""

from __future__ import annotations

import math
import re

from djinn_lib.errors import ConfigError

_BINARY = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*")


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes, given as a whole number or as text such as ``"25GiB"``.

    Raises:
        ConfigError: for anything else. Decimal units (``GB``) are refused, because papers
            write GB for both 10**9 and 2**30 bytes.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size > 0:
            return size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size)):
        number, unit = match.groups()
        if unit in _BINARY and (n_bytes := round(float(number) * 1024 ** _BINARY[unit])) > 0:
            return n_bytes
    raise ConfigError(
        f"expected a positive size in bytes or text such as '64MiB' or '25GiB' "
        f"(units {', '.join(_BINARY)}), got {size!r}"
    )


def format_bytes(n_bytes: int) -> str:
    """Return a size for people, in binary units: ``26843545600`` gives ``"25.0 GiB"``."""
    value, unit = float(n_bytes), "B"
    for unit in _BINARY:
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def three_digits(value: float) -> str:
    """A number for people, with three digits or all those before the point; "-" for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
