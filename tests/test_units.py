import numpy as np
import pytest

from djinn_lib.errors import ConfigError
from djinn_lib.units import format_bytes, parse_bytes, three_digits


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("25GiB", 25 << 30),
        ("64 MiB", 64 << 20),
        ("25 gib", 25 << 30),
        (" 64MIB ", 64 << 20),
        ("1.5KiB", 1536),
        ("1.1GiB", 1181116006),
        ("7B", 7),
        (4096, 4096),
        (np.int64(4096), 4096),
    ],
)
def test_parse_bytes_reads_binary_units(text, n_bytes):
    read = parse_bytes(text)
    assert read == n_bytes
    assert type(read) is int


@pytest.mark.parametrize(
    "bad",
    ["25", "", "GiB", "-1MiB", "0B", "0.4B", "1e3MiB", "25GiBB", "25 Gi B", "9" * 40 + "B",
     "9" * 19 + "TiB", "nanGiB", 0, -5, 2**63, True, 2.5, 25.0, float("nan"), None, b"1B", [1]],
    ids=str,
)  # fmt: skip
def test_parse_bytes_refuses_what_is_not_a_size(bad):
    with pytest.raises(ConfigError, match="expected a positive size"):
        parse_bytes(bad)


@pytest.mark.parametrize(
    ("text", "rather"),
    [("25GB", "25GiB"), ("25 gb", "25GiB"), ("1.5k", "1.5KiB"), ("64M", "64MiB"), ("1tB", "1TiB")],
)
def test_parse_bytes_refuses_decimal_units_and_says_what_to_write(text, rather):
    with pytest.raises(ConfigError, match=f"write '{rather}'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (25 << 30, "25.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_format_bytes_picks_the_unit(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (40.58, "40.6"), (100.4, "100"), (1005.2, "1,005"), (-1234.5, "-1,234"),
     (float("nan"), "-")],
)  # fmt: skip
def test_three_digits_or_all_before_the_point(value, text):
    assert three_digits(value) == text
