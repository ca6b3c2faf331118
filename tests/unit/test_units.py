"""Quantities: what is read, what is refused, what is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import ConfigError
from treadle.units import format_bytes, format_count, format_duration_s, parse_bytes, parse_count, parse_duration_s


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1.5GiB", 3 << 29), ("20 MB", 20_000_000), ("1kib", 1024), (" 3 TB ", 3 * 10**12)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("30m", 1800.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("2 d", 172_800.0),
        ("0.1s", 0.1),
        ("3min", 180),
    ],
)
def test_durations(text, seconds):
    assert parse_duration_s(text) == seconds
    assert isinstance(parse_duration_s(text), float)


@pytest.mark.parametrize(
    ("text", "count"), [("512", 512), ("8k", 8000), ("1.5M", 1_500_000), ("2g", 2 * 10**9), ("1.001k", 1001)]
)
def test_counts(text, count):
    assert parse_count(text) == count
    assert isinstance(parse_count(text), int)


@pytest.mark.parametrize("parse", [parse_bytes, parse_duration_s, parse_count])
@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1e3", "nan", "inf", ".5", "5.", "1 2", "1x", "k", "٣", "1_000", "9" * 400]
)
def test_what_is_no_quantity_is_refused(parse, text):
    with pytest.raises(ConfigError, match="expected a number with one of the units"):
        parse(text)


def test_units_belong_to_their_kind():
    for parse, text in ((parse_bytes, "3s"), (parse_duration_s, "3GiB"), (parse_count, "3h")):
        with pytest.raises(ConfigError):
            parse(text)
    with pytest.raises(ConfigError, match="expected a whole number"):
        parse_count("1.5")
    with pytest.raises(ConfigError, match="expected a whole number"):
        parse_count("0.0001k")


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_decimals_of_a_count_are_exact(whole, thousandths):
    assert parse_count(f"{whole}.{thousandths:03d}k") == whole * 1000 + thousandths


@given(st.integers(0, 1 << 50))
def test_whole_bytes_are_exact(size):
    assert parse_bytes(str(size)) == size
    assert parse_bytes(f"{size}KiB") == size * 1024


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.9, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_sizes_shown(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9999, "9999"),
        (10_000, "10k"),
        (999_499, "999k"),
        (999_999, "1M"),
        (1_234_567, "1.23M"),
        (999_999_999, "1G"),
        (2e12, "2000G"),
    ],
)
def test_counts_shown(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.25, "250ms"),
        (0.9999, "1.0s"),
        (59.94, "59.9s"),
        (59.96, "1m00s"),
        (75, "1m15s"),
        (3599.7, "1h00m"),
        (7260, "2h01m"),
    ],
)
def test_durations_shown(seconds, text):
    assert format_duration_s(seconds) == text


@given(st.floats(0, 1e15))
def test_whatever_is_shown_is_short(value):
    for show in (format_bytes, format_count, format_duration_s):
        assert len(show(value)) <= 16
        assert "e" not in show(value)
