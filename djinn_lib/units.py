"""Parse sizes in bytes from text, and format numbers for people."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from numbers import Integral

from djinn_lib.errors import ConfigError, shown

_BINARY = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
_EXPONENTS = {unit.lower(): exponent for unit, exponent in _BINARY.items()}
_DECIMAL = re.compile(r"([kmgt])b?", re.IGNORECASE)
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]+)\s*", re.ASCII | re.IGNORECASE)
_MOST = 2**63 - 1  # largest count of bytes of an operating system


def parse_bytes(size: int | str) -> int:
    """Parse a size in bytes, given as a whole number or as text such as ``"25GiB"``.

    Units may be in either case, with a space before them.

    Raises:
        ConfigError: for anything else. Decimal units (``GB``) are refused, because papers
            write GB for both 10**9 and 2**30 bytes.
    """
    n_bytes = _read_size(size) if isinstance(size, str) else size
    if (
        isinstance(n_bytes, Integral)
        and not isinstance(n_bytes, bool)
        and 0 < int(n_bytes) <= _MOST
    ):
        return int(n_bytes)
    raise ConfigError(
        f"expected a positive size, a whole number of bytes or text such as '64MiB' or '25GiB' "
        f"(units {', '.join(_BINARY)}), got {shown(size)}"
    )


def _read_size(text: str) -> int | None:
    """Parse a number with a unit into bytes; None if the text has another form."""
    if not (match := _SIZE.fullmatch(text)):
        return None
    number, unit = match.groups()
    if decimal := _DECIMAL.fullmatch(unit):
        raise ConfigError(
            f"expected a size in binary units, got {shown(text)}, which some count in powers of 10 "
            f"and others in powers of 2: write '{number}{decimal[1].upper()}iB', or a whole number "
            "of bytes"
        )
    exponent = _EXPONENTS.get(unit.lower())
    return None if exponent is None else round(Decimal(number) * 1024**exponent)


def parse_capacity(text: str, total_bytes: int) -> int:
    """Return a capacity in bytes, given as a size or as a share ("25/31.3") of `total_bytes`.

    Raises:
        ConfigError: it is neither.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", text):
        part, whole = map(float, match.groups())
        if part > 0 and whole > 0:
            return round(total_bytes * part / whole)
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(
            f"expected a capacity such as '25GiB', or a share of all weights such as '25/31.3', "
            f"got {text!r}"
        ) from error


def format_bytes(n_bytes: int) -> str:
    """Format a size in binary units: ``26843545600`` gives ``"25.0 GiB"``."""
    value, unit = float(n_bytes), "B"
    for unit in _BINARY:
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


def three_digits(value: float) -> str:
    """Format a number with three digits, or all digits before the point; "-" for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
