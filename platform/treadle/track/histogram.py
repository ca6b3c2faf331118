"""Counts over ranges as bars that lie: one line a range, its edges written in front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.track.screen import cells, cut, one_line

__all__ = ["Range", "format_ranges"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, kw_only=True)
class Range:
    """One line of a histogram.

    Args:
        label: its edges, such as "17 to 24".
        value: length of the bar.
        notes: further columns, to the right of the label.
    """

    label: str
    value: float
    notes: tuple[str, ...] = ()


def format_ranges(ranges: Sequence[Range], *, headers: Sequence[str], width: int = 80, ascii_only: bool = False) -> str:
    """Aligned columns of labels and notes, then bars; the longest bar ends at `width`.

    Args:
        headers: of the label, of each note, and of the bars.
    """
    columns = [list(headers[:-1]), *([one_line(r.label), *map(one_line, r.notes)] for r in ranges)]
    widths = [max(cells(row[i]) for row in columns) for i in range(len(headers) - 1)]
    lines = [
        "  ".join(" " * (size - cells(cell)) + cell for cell, size in zip(row, widths, strict=True)) for row in columns
    ]
    room = max(4, width - cells(lines[0]) - 2)
    high = max((r.value for r in ranges if math.isfinite(r.value)), default=0.0)
    bars = [headers[-1], *(_bar(r.value / high if high > 0 else 0.0, room, ascii_only) for r in ranges)]
    shown = [cut(f"{line}  {bar}".rstrip(), width) for line, bar in zip(lines, bars, strict=True)]
    text = "\n".join(shown)
    return text.replace("…", ".").encode("ascii", "replace").decode() if ascii_only else text


def _bar(share: float, room: int, ascii_only: bool) -> str:
    """A bar of `share` x `room` columns, to an eighth of one; what is there at all is seen."""
    if not math.isfinite(share) or share <= 0:
        return ""
    if ascii_only:
        return "#" * max(1, round(share * room))
    eighths = max(1, round(share * room * 8))
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")
