from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.track.parallel import Coordinate, Strand, parallel_chart

RATE = Coordinate(label="optim.lr", low=1e-4, high=1e-2, is_log=True)
CELL = Coordinate(label="model", names=("gru", "lstm"))


@pytest.mark.parametrize(
    ("axis", "value", "share"),
    [(RATE, 1e-4, 0), (RATE, 1e-3, 0.5), (RATE, "0.01", 1), (CELL, "gru", 0.25), (CELL, "lstm", 0.75), (RATE, 9, 1)],
)
def test_a_value_has_its_place_on_its_axis(axis: Coordinate, value: float | str, share: float) -> None:
    assert axis.share(value) == pytest.approx(share)


def test_an_axis_of_one_value_has_it_in_the_middle() -> None:
    assert Coordinate(label="m", low=2, high=2).share(2) == 0.5
    assert Coordinate(label="m", low=2, high=2).marks() == [(0.5, "2")]


@given(st.floats(1e-9, 1e9), st.floats(1, 1e6), st.booleans(), st.floats(0, 1))
def test_ticks_and_values_stay_on_the_axis(low: float, factor: float, is_log: bool, share: float) -> None:
    axis = Coordinate(label="a", low=low, high=low * factor, is_log=is_log)
    assert 0 <= axis.share(low + share * (axis.high - low)) <= 1
    assert all(0 <= at <= 1 for at, _ in axis.marks())


def test_the_best_lies_on_top_and_every_line_has_a_title() -> None:
    strands = [
        Strand(values=(1e-3, "gru"), title="best <b>", tone="first"),
        Strand(values=(1e-2, "lstm"), title="ended", tone="faint"),
        Strand(values=(1e-4, None), title="no value", tone="whole"),
    ]
    chart = parallel_chart([RATE, CELL], strands, label="a & b")
    root = ET.fromstring(chart)
    titles = [title.text for title in root.iter("title")]
    assert titles == ["ended", "no value", "best <b>"]
    numbers = [float(n) for path in root.iter("path") for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
    assert numbers
    assert all(math.isfinite(n) for n in numbers)


def test_nothing_is_no_picture() -> None:
    assert parallel_chart([RATE], [], label="x").startswith("<p")
