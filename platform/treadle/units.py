"""Quantities people write: "2GiB", "30m", "8k". The only parser of them.

Sizes come back as int bytes, durations as float seconds, counts as int.
"""

from __future__ import annotations

import re
from fractions import Fraction

from treadle.errors import ConfigError

__all__ = ["format_bytes", "format_count", "format_duration_s", "parse_bytes", "parse_count", "parse_duration_s"]

_DECIMAL = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES = _DECIMAL | {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)")


def _split(text: str, units: dict[str, float] | dict[str, int], what: str) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(text.strip().lower())
    if match is None or match[2] not in units:
        names = ", ".join(unit for unit in units if unit)
        raise ConfigError(f"{what}: got {text!r}, expected a number with one of the units {names}")
    return Fraction(match[1]), match[2]  # exact: 1.001k is 1001


def parse_bytes(text: str) -> int:
    """Bytes in `text`: "512", "1.5GiB", "20 MB".

    Raises:
        ConfigError: not a size.
    """
    value, unit = _split(text, _BYTES, "size")
    return round(value * _BYTES[unit])


def parse_duration_s(text: str) -> float:
    """Seconds in `text`: "90", "30m", "1.5h", "250ms".

    Raises:
        ConfigError: not a duration.
    """
    value, unit = _split(text, _SECONDS, "duration")
    return float(value * Fraction(str(_SECONDS[unit])))


def parse_count(text: str) -> int:
    """A whole count in `text`: "512", "8k", "1.5M".

    Raises:
        ConfigError: not a count, or not a whole one.
    """
    value, unit = _split(text, _COUNTS, "count")
    scaled = value * _COUNTS[unit]
    if scaled != int(scaled):
        raise ConfigError(f"count: got {text!r}, expected a whole number")
    return int(scaled)


def format_bytes(size: float) -> str:
    """A short human form: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        text = f"{size:.0f}" if unit == "B" else f"{size:.1f}"
        if float(text) < 1024 or unit == "GiB":
            return f"{text} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_count(count: float) -> str:
    """A short human form: 1234567 -> "1.23M"; below 10,000 every digit."""
    if round(count) < 10_000:
        return f"{count:.0f}"
    for unit in ("k", "M", "G"):
        count /= 1000
        if float(f"{count:.3g}") < 1000:
            return f"{count:.3g}{unit}"
    return f"{count:.0f}G"


def format_duration_s(seconds: float) -> str:
    """A short human form: 0.25 -> "250ms", 75 -> "1m15s", 7260 -> "2h01m"."""
    if round(seconds * 1000) < 1000:
        return f"{seconds * 1000:.0f}ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
