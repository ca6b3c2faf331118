"""The pictures: round ticks, well-formed text, every value inside its axes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.track.svg import Bar, Line, Span, bar_chart, line_chart, number, span_chart, text, ticks

HOSTILE = "<script>alert(1)</script>\"'&\x00\x1b\ud800\u202e]]>-->"


def read(picture: str) -> ET.Element:
    root = ET.fromstring(picture)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for circle in root.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height
    for rect in root.iter("rect"):
        assert float(rect.attrib["x"]) >= 0
        assert float(rect.attrib["width"]) >= 0
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width + 0.2
    for path in root.iter("path"):
        for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"]):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    return root


def labels(root: ET.Element, css: str) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter("text") if css in node.attrib["class"].split()]


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 10))
def test_ticks_are_round_even_and_inside(low: float, span: float, num: int) -> None:
    high = low + span
    if high - low < abs(low) * 1e-9:
        return
    marks = ticks(low, high, num=num)
    assert marks == sorted(set(marks))
    assert len(marks) <= 2 * num + 2
    assert all(low - span * 0.01 <= mark <= high + span * 0.01 for mark in marks)


def test_ticks_by_hand() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(3, 4004, num=6) == [1000, 2000, 3000, 4000]
    assert ticks(0.0, 1e-3) == [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]
    assert ticks(5, 5) == [5]
    assert ticks(math.nan, 1)[0] is not None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.071234, "0.07123"),
        (1234567.0, "1,234,567"),
        (49243.27, "49,243"),
        (0, "0"),
        (math.nan, "nan"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers_for_people(value: float, shown: str) -> None:
    assert number(value) == shown


def test_text_is_inert() -> None:
    shown = text(HOSTILE)
    assert not re.search(r"[<>\"'\x00\x1b\ud800\u202e]", shown)
    shown.encode("utf-8")


def test_a_curve_has_axes_units_marks_and_tooltips() -> None:
    lines = [
        Line(label="train/loss", xs=range(0, 101, 10), ys=[3.0 / (1 + i) for i in range(11)]),
        Line(label="val/loss", xs=[50, 100], ys=[1.0, 0.5]),
    ]
    root = read(line_chart(lines, label="Loss", unit="nats", marks={50.0: "attempt 2", 900.0: "outside"}))
    assert {"0", "20", "100"} <= set(labels(root, "mid"))
    assert labels(root, "unit") == ["nats", "update"]
    assert labels(root, "halo") == ["attempt 2"]
    titles = [node.text for node in root.iter("title")]
    assert "update 50\ntrain/loss: 0.5\nval/loss: 1" in titles
    assert len(list(root.iter("path"))) == 2


def test_wide_ranges_get_a_log_scale_and_gaps_stay_gaps() -> None:
    ys = [1000.0, math.nan, 10.0, math.inf, 0.1]
    root = read(line_chart([Line(label="x", xs=range(5), ys=ys)], label="x", unit="u"))
    assert "u, log scale" in labels(root, "unit")
    (path,) = root.iter("path")
    assert path.attrib["d"].count("M") == 3


def test_many_points_keep_their_spike() -> None:
    ys = [1.0] * 5000
    ys[3333] = 15.0
    picture = line_chart([Line(label="x", xs=range(5000), ys=ys)], label="x")
    (path,) = read(picture).iter("path")
    heights = [float(y) for _, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"])]
    assert min(heights) < 0.2 * max(heights)
    assert len(heights) <= 480
    assert len(picture) < 40_000


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e30, 1e30) | st.just(math.nan)), max_size=20), max_size=3
    ),
    st.booleans(),
)
def test_any_curve_stays_inside(columns: list[list[tuple[int, float]]], from_zero: bool) -> None:
    lines = []
    for column in columns:
        points = sorted(dict(column).items())
        lines.append(Line(label="x", xs=[x for x, _ in points], ys=[y for _, y in points]))
    picture = line_chart(lines, label="any", from_zero=from_zero)
    if any(math.isfinite(y) for line in lines for y in line.ys):
        read(picture)
    else:
        assert "Nothing" in picture


def test_bars_and_their_names() -> None:
    bars = [Bar(name=str(i), value=i, title=f"length {i}") for i in range(40)]
    root = read(bar_chart(bars, label="h", unit="rows", x_label="length", last_edge="40"))
    assert len([rect for rect in root.iter("rect") if "bar" in rect.attrib["class"]]) == 40
    assert 5 <= len(labels(root, "mid")) < 40
    read(bar_chart([Bar(name=HOSTILE, value=math.nan, title=HOSTILE)], label=HOSTILE, unit=HOSTILE, x_label=HOSTILE))
    assert "Nothing" in bar_chart([], label="h", unit="", x_label="")


def test_attempts_over_time() -> None:
    spans = [
        Span(label="1 lost", start_s=1000.0, end_s=1060.0, tone="bad", title=HOSTILE, points=[(1030.0, "a", False)]),
        Span(label="2 finished", start_s=1070.0, end_s=1200.0, tone="good", title="b", points=[(1100.0, "c", True)]),
    ]
    root = read(span_chart(spans, label="attempts"))
    assert {"0", "30.0s", "1m00s"} <= set(labels(root, "mid"))
    first, second = (rect for rect in root.iter("rect") if "span" in rect.attrib["class"])
    assert float(first.attrib["x"]) + float(first.attrib["width"]) < float(second.attrib["x"])
    read(span_chart([Span(label="1", start_s=5.0, end_s=5.0, tone="calm", title="")], label="short"))
    assert "Nothing" in span_chart([], label="none")


def test_marks_stand_between_bars_and_tell_what_they_are() -> None:
    bars = [Bar(name=str(i), value=1 + i, title="t") for i in range(4)]
    marks = {0.0: "first", 1.5: "middle", 4.0: "last", 9.0: "outside"}
    root = read(bar_chart(bars, label="l", unit="rows", x_label="steps", marks=marks))
    lines = [node for node in root.iter("line") if node.attrib["class"] == "mark"]
    rects = [node for node in root.iter("rect") if "bar" in node.attrib["class"]]
    second = rects[1]
    places = [float(line.attrib["x1"]) for line in lines]
    assert places[1] == pytest.approx(float(second.attrib["x"]) + float(second.attrib["width"]) / 2, abs=0.2)
    assert places[0] <= float(rects[0].attrib["x"])
    assert places[2] == places[3] >= float(rects[3].attrib["x"]) + float(rects[3].attrib["width"])
    assert ["".join(line.itertext()) for line in lines] == list(marks.values())
