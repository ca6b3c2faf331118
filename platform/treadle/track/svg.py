"""Inline SVG pictures for the report: curves, bars, attempts over time. Pure text, no script.

Colours are CSS classes (track/style.py), so that one picture serves light and dark. Every mark
has a `<title>`, which browsers show under the pointer.
"""

from __future__ import annotations

import bisect
import html
import itertools
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from treadle.units import format_count, format_duration_s

__all__ = ["Bar", "Line", "Span", "bar_chart", "line_chart", "number", "span_chart", "text", "ticks"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 50, 20, 20, 38
_WIDE = 1000
_MAX_POINTS = 480
_MAX_STRIPS = 96
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def text(value: object) -> str:
    """`value` as HTML text or attribute content: escaped, without control characters."""
    kept = (
        "\ufffd" if c in _OVERRIDES or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") else c
        for c in str(value)
    )
    return html.escape("".join(kept), quote=True)


def number(value: float, *, digits: int = 4) -> str:
    """`value` for people: 4 significant digits, whole numbers with thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `xs` ascend. Values that are not finite leave a gap."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar; `name` is written below, `title` appears under the pointer."""

    name: str
    value: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Span:
    """One row of a time picture: a bar from `start_s` to `end_s` with points on it.

    Args:
        tone: "good", "warn", "bad" or "calm": the CSS class of the bar.
        points: time, title and whether it is a large mark, of each event.
    """

    label: str
    start_s: float
    end_s: float
    tone: str
    title: str
    points: Sequence[tuple[float, str, bool]] = ()


def ticks(low: float, high: float, *, num: int = 5) -> list[float]:
    """About `num` round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    result = []
    for i in itertools.count(first):
        value = i * step
        if value > high + step * 1e-9 or len(result) > 4 * num:
            return result
        result.append(float(f"{value:.12g}"))
    raise AssertionError("unreachable")


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return ticks(low, high)


def _tick_text(value: float, *, step: float, largest: float) -> str:
    """A tick's label; neighbours on one axis get one form, which `step` and `largest` decide."""
    if value == 0:
        return "0"
    if largest < 0.01:
        mantissa, _, power = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    if abs(value) >= 10_000:
        return format_count(value) if value > 0 else f"-{format_count(-value)}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    is_finer = not math.isclose(step * 10**digits, round(step * 10**digits))  # 0.25 needs one digit more than 0.2
    return f"{value:,.{digits + is_finer}f}"


def _thin(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points that keep each share's lowest and highest value."""
    points = list(zip(xs, ys, strict=True))
    if len(points) <= _MAX_POINTS:
        return points
    num = _MAX_POINTS // 2
    kept = []
    for i in range(num):
        share = points[i * len(points) // num : (i + 1) * len(points) // num]
        finite = [point for point in share if math.isfinite(point[1])] or share
        pair = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept.extend(sorted(pair))
    return kept


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The plot area and both scales."""

    width: int = _WIDTH
    left: int = _LEFT
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    is_log: bool = False

    @property
    def right(self) -> int:
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        scale: Callable[[float], float] = math.log if self.is_log else float
        share = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return self.bottom - share * (self.bottom - _TOP)

    def y_axis(self, unit: str) -> list[str]:
        low, high = self.y_range
        marks = _log_ticks(low, high) if self.is_log else ticks(low, high)
        step = marks[1] - marks[0] if len(marks) > 1 else 1.0
        parts = []
        for mark in marks:
            y = self.y(mark)
            own_step = 10.0 ** math.floor(math.log10(mark)) if self.is_log else step
            label = _tick_text(mark, step=own_step, largest=high)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick end" x="{self.left - 7}" y="{y + 3.5:.1f}">{text(label)}</text>')
        scale = ", log scale" if self.is_log else ""
        if unit or scale:
            parts.append(f'<text class="unit" x="2" y="9">{text((unit or "value") + scale)}</text>')
        return parts

    def x_axis(self, label: str) -> list[str]:
        marks = ticks(*self.x_range, num=6)
        step = marks[1] - marks[0] if len(marks) > 1 else 1.0
        parts = [f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>']
        for mark in marks:
            x = self.x(mark)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.bottom}" y2="{self.bottom + 4}"/>')
            shown = text(_tick_text(mark, step=step, largest=max(abs(marks[0]), abs(marks[-1]))))
            parts.append(f'<text class="tick mid" x="{x:.1f}" y="{self.bottom + 16}">{shown}</text>')
        parts.append(f'<text class="unit end" x="{self.right}" y="{self.height - 6}">{text(label)}</text>')
        return parts


def _svg(frame: _Frame, label: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{text(label)}">'
    return "\n".join([head, *parts, "</svg>"])


def _y_range(lines: Sequence[Line], *, from_zero: bool) -> tuple[float, float, bool] | None:
    """Lowest, highest value and whether a log scale serves better; None where nothing is finite."""
    finite = [y for line in lines for y in line.ys if math.isfinite(y)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if not from_zero and low > 0 and high / low > 20:
        return low / 1.1, high * 1.1, True
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high == low:
        pad = abs(high) * 0.1 or 1.0
        return (low if from_zero and low == 0 else low - pad), high + pad, False
    pad = (high - low) * 0.06
    return (low if from_zero and low == 0 else low - pad), high + pad, False


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    unit: str = "",
    x_label: str = "update",
    marks: Mapping[float, str] | None = None,
    from_zero: bool = False,
    x_range: tuple[float, float] | None = None,
) -> str:
    """Curves over one pair of axes; `marks` are upright lines with a name at some x.

    The y axis is logarithmic where positive values span more than a factor of 20, unless
    `from_zero`; the x axis spans at least `x_range`. Curves of several hundred points keep their extremes.
    """
    lines = [line for line in lines if len(line.xs)]
    spread = _y_range(lines, from_zero=from_zero)
    if spread is None:
        return '<p class="none">Nothing was logged.</p>'
    first, last = min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines)
    if x_range is not None:
        first, last = min(first, x_range[0]), max(last, x_range[1])
    if first == last:
        first, last = first - 1, last + 1
    frame = _Frame(height=215, x_range=(first, last), y_range=spread[:2], is_log=spread[2])
    parts = [*frame.y_axis(unit), *frame.x_axis(x_label)]
    for i, line in enumerate(lines):
        parts.extend(_curve(line, frame, css=f"s{i % 6}"))
    for at, name in (marks or {}).items():
        if first <= at <= last:
            x = frame.x(at)
            is_late = x > frame.right - 70
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{frame.bottom}"/>'
                f'<text class="tick halo{" end" if is_late else ""}" x="{x + (-4 if is_late else 4):.1f}" '
                f'y="{_TOP + 9}">{text(name)}</text>'
            )
    parts.extend(_strips(lines, frame, x_label))
    return _svg(frame, label, parts)


def _curve(line: Line, frame: _Frame, *, css: str) -> list[str]:
    commands, dots, is_down = [], [], False
    points = _thin(line.xs, line.ys)
    for x, y in points:
        if not math.isfinite(y) or (frame.is_log and y <= 0):
            is_down = False
            continue
        commands.append(f"{'L' if is_down else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
        is_down = True
        if len(points) <= 60:
            dots.append(f'<circle class="{css}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>')
    return [f'<path class="line {css}" d="{"".join(commands)}"/>', *dots]


def _strips(lines: Sequence[Line], frame: _Frame, x_label: str) -> list[str]:
    """Transparent strips over the plot whose titles tell every curve's value there."""
    every_x = sorted({x for line in lines for x in line.xs})
    centers = every_x[:: max(1, math.ceil(len(every_x) / _MAX_STRIPS))]
    between = [(a + b) / 2 for a, b in itertools.pairwise(centers)]
    values = [dict(zip(line.xs, line.ys, strict=True)) for line in lines]
    parts = []
    for center, start, end in zip(centers, [every_x[0], *between], [*between, every_x[-1]], strict=True):
        near = every_x[bisect.bisect_left(every_x, start) : bisect.bisect_right(every_x, end)]
        near.sort(key=lambda x: abs(x - center))
        told = [f"{x_label} {number(center)}"]
        for line, at in zip(lines, values, strict=True):
            here = next((at[x] for x in near if x in at), None)
            if here is not None:
                told.append(f"{line.label}: {number(here)}")
        left, right = frame.x(start), frame.x(end)
        if right - left < 1:  # the only point of the plot
            left, right = float(frame.left), float(frame.right)
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{frame.bottom - _TOP:.1f}"><title>{text(chr(10).join(told))}</title></rect>'
        )
    return parts


def bar_chart(
    bars: Sequence[Bar],
    *,
    label: str,
    unit: str,
    x_label: str,
    high: float | None = None,
    last_edge: str | None = None,
    marks: Mapping[float, str] | None = None,
) -> str:
    """Bars side by side from 0 to `high`, named underneath, as many as there is room for.

    With `last_edge` the names are edges and stand below the bars' borders. `marks` are upright lines with a title, at
    1.5 in the middle of the second bar.
    """
    if not bars:
        return '<p class="none">Nothing was counted.</p>'
    high = high or max((bar.value for bar in bars if math.isfinite(bar.value)), default=0.0) * 1.05
    frame = _Frame(height=205, x_range=(0, len(bars)), y_range=(0.0, high or 1.0))
    parts = frame.y_axis(unit)
    width = frame.x(1) - frame.x(0)
    gap = min(2.0, width * 0.15)
    for i, bar in enumerate(bars):
        top = frame.y(bar.value if math.isfinite(bar.value) else 0.0)
        parts.append(
            f'<rect class="bar s0" x="{frame.x(i) + gap / 2:.1f}" y="{top:.1f}" width="{width - gap:.1f}" '
            f'height="{frame.bottom - top:.1f}" rx="{min(2.0, width / 4):.1f}"><title>{text(bar.title)}</title></rect>'
        )
    for at, title in (marks or {}).items():
        x = frame.x(min(max(at, 0.0), len(bars)))
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{frame.bottom}"><title>{text(title)}</title>'
            "</line>"
        )
    names = [bar.name for bar in bars] + ([last_edge] if last_edge is not None else [])
    shift = 0.0 if last_edge is not None else 0.5
    longest = max(map(len, names))
    every = max(1, math.ceil((longest * 6.2 + 10) / width))
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    for i in range(0, len(names), every):
        x = frame.x(i + shift)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{frame.bottom + 16}">{text(names[i])}</text>')
    parts.append(f'<text class="unit end" x="{frame.right}" y="{frame.height - 6}">{text(x_label)}</text>')
    return _svg(frame, label, parts)


def span_chart(spans: Sequence[Span], *, label: str) -> str:
    """Rows of bars over a common time axis that starts at the first of them."""
    if not spans:
        return '<p class="none">Nothing was recorded.</p>'
    zero = min(span.start_s for span in spans)
    last = max(zero + 1.0, *(span.end_s for span in spans))
    row, height = 30, _TOP + 30 * len(spans) + _BOTTOM
    frame = _Frame(width=_WIDE, left=110, height=height, x_range=(0.0, last - zero), y_range=(0.0, 1.0))
    parts = []
    marks = _time_ticks(last - zero)
    for mark in marks:
        x = frame.x(mark)
        shown = format_duration_s(mark) if mark else "0"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{frame.bottom}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{frame.bottom + 16}">{text(shown)}</text>')
    for i, span in enumerate(spans):
        y = _TOP + i * row
        start, end = frame.x(span.start_s - zero), frame.x(span.end_s - zero)
        parts.append(f'<text class="tick end" x="{frame.left - 7}" y="{y + 12.5}">{text(span.label)}</text>')
        parts.append(
            f'<rect class="span {span.tone}" x="{start:.1f}" y="{y}" width="{max(end - start, 3):.1f}" height="18" '
            f'rx="3"><title>{text(span.title)}</title></rect>'
        )
        for at_s, title, is_large in span.points:
            parts.append(
                f'<circle class="{"point" if is_large else "speck"}" cx="{frame.x(at_s - zero):.1f}" cy="{y + 9}" '
                f'r="{4 if is_large else 2}"><title>{text(title)}</title></circle>'
            )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    parts.append(f'<text class="unit end" x="{frame.right}" y="{height - 6}">time since the first start</text>')
    return _svg(frame, label, parts)


def _time_ticks(length_s: float) -> list[float]:
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400)
    step = next((s for s in steps if length_s / s <= 7), math.ceil(length_s / 86400 / 7) * 86400)
    return [float(i * step) for i in range(int(length_s / step) + 1)]
