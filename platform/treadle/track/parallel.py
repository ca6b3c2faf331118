"""Parallel coordinates: what trials were set to and what became of them, one line each. SVG text, no script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.track.svg import number, text, ticks

__all__ = ["Coordinate", "Strand", "parallel_chart"]

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 80, 80, 34, 16, 320
_LEAST_WIDTH, _GAP = 1000, 170


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """One upright axis.

    Args:
        names: of its places from bottom to top, where it has few; else it goes from `low` to `high`.
    """

    label: str
    names: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False

    def share(self, value: float | str) -> float:
        """How far up a value stands, 0 to 1."""
        if self.names:
            return (self.names.index(str(value)) + 0.5) / len(self.names)
        low, high, at = self.low, self.high, float(value)
        if high <= low:
            return 0.5
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(max(at, self.low))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def marks(self) -> list[tuple[float, str]]:
        """(share, text) of its ticks."""
        if self.names:
            return [(self.share(name), name) for name in self.names]
        if self.high <= self.low:
            return [(0.5, number(self.low))]
        round_ones = _powers(self.low, self.high) if self.is_log else ticks(self.low, self.high)
        values = round_ones if len(round_ones) > 1 else [self.low, self.high]
        return [(self.share(value), number(value, digits=3)) for value in values]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], a hair outside included."""
    first, last = math.ceil(math.log10(low) - 1e-6), math.floor(math.log10(high) + 1e-6)
    return [10.0**power for power in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True)
class Strand:
    """One trial: its value on each axis, or None where it ends before; `tone` is first, whole or faint."""

    values: tuple[float | str | None, ...]
    title: str
    tone: str


# Class, width and opacity; the first has the first colour of curves, the others none.
_TONES = {"first": ("line s0", 3.0, 1.0), "whole": ("line axis", 1.4, 0.9), "faint": ("line axis", 1.2, 0.4)}


def parallel_chart(axes: Sequence[Coordinate], strands: Sequence[Strand], *, label: str) -> str:
    """The axes side by side and a curve for each strand; the first ones lie on top."""
    if not axes or not strands:
        return '<p class="none">Nothing was tried yet.</p>'
    width = max(_LEAST_WIDTH, _LEFT + _RIGHT + _GAP * (len(axes) - 1))
    step = (width - _LEFT - _RIGHT) / max(1, len(axes) - 1)
    places = [_LEFT + i * step for i in range(len(axes))]
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for axis, x in zip(axes, places, strict=True):
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="14">{text(axis.label)}</text>')
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
    order = list(_TONES)
    for strand in sorted(strands, key=lambda s: -order.index(s.tone)):
        points = [
            (x, bottom - axis.share(value) * (bottom - _TOP))
            for axis, x, value in zip(axes, places, strand.values, strict=True)
            if value is not None
        ]
        css, size, opacity = _TONES[strand.tone]
        parts.append(
            f'<path class="{css}" style="stroke-width:{size};opacity:{opacity}" d="{_path(points)}">'
            f"<title>{text(strand.title)}</title></path>"
        )
    for axis, x in zip(axes, places, strict=True):
        side, css = (1, "tick halo") if x == places[-1] else (-1, "tick halo end")
        for share, shown in axis.marks():
            y = bottom - share * (bottom - _TOP)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x + 4 * side:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="{css}" x="{x + 7 * side:.1f}" y="{y + 3.5:.1f}">{text(shown)}</text>')
    head = f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{text(label)}">'
    return "\n".join([head, *parts, "</svg>"])


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A curve through the points that is level at each."""
    commands = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"] if points else []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        bend = (x1 - x0) * 0.35
        commands.append(f"C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}")
    return "".join(commands)
