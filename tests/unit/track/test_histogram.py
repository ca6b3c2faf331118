"""Bars that lie: aligned, as long as what they stand for, within the width."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from treadle.track.histogram import Range, format_ranges
from treadle.track.screen import cells

ROWS = [
    Range(label="1 to 8", value=1000, notes=("1,000",)),
    Range(label="9 to 64", value=500, notes=("500",)),
    Range(label="65 to 2,000", value=1, notes=("1",)),
    Range(label="none", value=0, notes=("0",)),
]


def test_bars_are_aligned_and_to_scale() -> None:
    assert format_ranges(ROWS, headers=["time steps", "rows", ""], width=39).splitlines() == [
        " time steps   rows",
        "     1 to 8  1,000  ███████████████████",
        "    9 to 64    500  █████████▌",
        "65 to 2,000      1  ▏",
        "       none      0",
    ]


def test_without_unicode() -> None:
    text = format_ranges(ROWS, headers=["time steps", "rows", ""], width=40, ascii_only=True)
    assert text.isascii()
    assert [line.count("#") for line in text.splitlines()] == [0, 20, 10, 1, 0]


def test_nothing_to_draw() -> None:
    assert format_ranges([], headers=["time steps", "rows"]) == "time steps  rows"


@given(
    st.lists(
        st.builds(
            Range,
            label=st.text(max_size=12),
            value=st.floats() | st.integers(0, 10**9).map(float),
            notes=st.tuples(st.text(max_size=5)),
        ),
        max_size=8,
    ),
    st.integers(20, 120),
    st.booleans(),
)
def test_lines_keep_to_the_width(ranges: list[Range], width: int, plain: bool) -> None:
    lines = format_ranges(ranges, headers=["steps", "rows", ""], width=width, ascii_only=plain).split("\n")
    assert len(lines) == len(ranges) + 1
    assert all(cells(line) <= width for line in lines)
    high = max((r.value for r in ranges if math.isfinite(r.value)), default=0)
    for line, row in zip(lines[1:], ranges, strict=True):
        if "#" not in row.label + row.notes[0] and plain and row.value == high > 0:
            assert "#" in line or "." in line
