"""A picture that stands alone: well-formed, light and dark, nothing outside of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from treadle.track.picture import Panel, picture
from treadle.track.style import PICTURE_STYLE, STYLE
from treadle.track.svg import Bar, bar_chart

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script>\"'&\x00]]>"


def bars(count: int) -> str:
    return bar_chart(
        [Bar(name=str(i), value=i, title=HOSTILE) for i in range(count)], label="l", unit="rows", x_label="steps"
    )


def test_panels_stand_above_one_another() -> None:
    panels = [Panel(title=f"Panel {n} {HOSTILE}", note=HOSTILE, chart=bars(5)) for n in range(3)]
    root = ET.fromstring(picture(panels, label=HOSTILE))
    assert root.tag == f"{SVG}svg"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    inner = root.findall(f"{SVG}svg")
    tops = [float(chart.attrib["y"]) for chart in inner]
    ends = [top + float(chart.attrib["height"]) for top, chart in zip(tops, inner, strict=True)]
    assert len(inner) == 3
    assert all(end <= top for end, top in zip(ends, tops[1:], strict=False))
    assert ends[-1] <= height
    assert all(float(c.attrib["x"]) + float(c.attrib["width"]) <= width for c in inner)
    titles = [node for node in root.findall(f"{SVG}text") if node.attrib.get("class") == "title"]
    assert [(node.text or "").split()[1] for node in titles] == ["0", "1", "2"]


def test_both_themes_and_no_reference_to_anything_else() -> None:
    text = picture([Panel(title="t", note="n", chart=bars(2))], label="l")
    assert "prefers-color-scheme:dark" in text
    assert all(word not in text for word in ("<script", "href", "url(", "@import"))
    assert PICTURE_STYLE.count("{") == PICTURE_STYLE.count("}") > 20
    assert set(PICTURE_STYLE.splitlines()) & set(STYLE.splitlines())


def test_a_chart_of_nothing_leaves_its_title() -> None:
    root = ET.fromstring(picture([Panel(title="t", note="n", chart=bars(0))], label="l"))
    assert root.findall(f"{SVG}svg") == []
    assert len(root.findall(f"{SVG}text")) == 2
