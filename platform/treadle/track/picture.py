"""A picture that stands alone in a file: charts above one another, light or dark as the reader's screen is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.track.style import PICTURE_STYLE
from treadle.track.svg import text

__all__ = ["Panel", "picture"]

_MARGIN, _HEAD, _GAP = 20, 46, 18
_BOX = re.compile(r'<svg viewBox="0 0 (\d+) (\d+)"')


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart with a title and a line below it, both plain text; `chart` comes from `treadle.track.svg`."""

    title: str
    note: str
    chart: str


def picture(panels: Sequence[Panel], *, label: str) -> str:
    """An SVG file of the charts; `label` is what it shows, for those who cannot see it."""
    parts: list[str] = []
    width, y = 0, _MARGIN
    for panel in panels:
        box = _BOX.match(panel.chart)
        if box is None:  # a chart of nothing is a paragraph of HTML
            chart, size = "", (0, 0)
        else:
            size = int(box[1]), int(box[2])
            place = f'<svg x="{_MARGIN}" y="{y + _HEAD}" width="{box[1]}" height="{box[2]}"'
            chart = f'{place} viewBox="0 0 {box[1]} {box[2]}"{panel.chart[box.end() :]}'
        parts.append(f'<text class="title" x="{_MARGIN}" y="{y + 12}">{text(panel.title)}</text>')
        parts.append(f'<text x="{_MARGIN}" y="{y + 30}">{text(panel.note)}</text>')
        parts.append(chart)
        width, y = max(width, size[0]), y + _HEAD + size[1] + _GAP
    width, height = width + 2 * _MARGIN, y - _GAP + _MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{text(label)}">'
    )
    page = f'<rect class="page" width="{width}" height="{height}" rx="8"/>'
    return "\n".join([head, f"<style>{PICTURE_STYLE}</style>", page, *filter(None, parts), "</svg>\n"])
