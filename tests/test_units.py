import pytest

from djinn_lib.errors import ConfigError
from djinn_lib.units import format_bytes, parse_bytes, three_digits


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("25GiB", 25 << 30), ("64 MiB", 64 << 20), ("1.5KiB", 1536), ("7B", 7), (4096, 4096)],
)
def test_parse_bytes_reads_binary_units(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "bad", ["25GB", "25", "GiB", "-1MiB", "0B", 0, -5, True, 2.5, None, "nanGiB"]
)
def test_parse_bytes_refuses_what_is_ambiguous_or_not_a_size(bad):
    with pytest.raises(ConfigError, match="expected a positive size"):
        parse_bytes(bad)


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
