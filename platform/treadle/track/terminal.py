"""What a person sees in a terminal: a progress line, tables, small curves.

Everything that leaves here is cut to the width and freed of control characters, so that no
name or message of a run can wrap a line or steer the terminal.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from treadle.track.screen import Screen, cells, cut, one_line
from treadle.units import format_count, format_duration_s

__all__ = ["Progress", "Snapshot", "chart", "format_progress", "sparkline", "table"]

_QUIET_EVENTS = frozenset({"start", "checkpoint", "evaluate", "end"})
_BLOCKS = " ▁▂▃▄▅▆▇█"
_BRAILLE_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # by column, then from the top


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a run stands; what is None is not shown."""

    job: str
    num_updates: int
    num_epochs: int
    update: int = 0
    epoch: float | None = None
    loss: float | None = None
    headline: tuple[str, float] | None = None
    frames_per_s: float | None = None
    eta_s: float | None = None


def format_progress(at: Snapshot, *, width: int, color: bool = False, ascii_only: bool = False) -> str:
    """One line of at most `width` columns; parts that do not fit are left out, the least needed first."""
    share = min(1.0, at.update / at.num_updates) if at.num_updates > 0 else 0.0
    parts = [(0, f"update {at.update:,}/{at.num_updates:,}")]  # (importance, text), 0 is never left out
    if at.epoch is not None:
        parts.append((4, f"epoch {at.epoch:.1f}/{at.num_epochs}"))
    if at.loss is not None:
        parts.append((1, f"loss {_short(at.loss)}"))
    if at.headline is not None:
        parts.append((2, f"{one_line(at.headline[0])} {_short(at.headline[1])}"))
    if at.frames_per_s is not None:
        parts.append((5, f"{format_count(at.frames_per_s)} frames/s"))
    if at.eta_s is not None:
        parts.append((3, f"ETA {format_duration_s(at.eta_s)}"))
    head, bar_width = f"{one_line(at.job)} {share:4.0%}", 16

    def line(bar: str) -> str:
        return "  ".join([head, *([bar] if bar else []), *(text for _, text in parts)])

    full, empty = ("#", "-") if ascii_only else ("━", "─")
    num_full = round(share * bar_width)
    bar = full * num_full + empty * (bar_width - num_full)
    while cells(line(bar)) > width and len(parts) > 1:
        parts.remove(max(parts))
    if cells(line(bar)) > width:
        bar = ""
    text = cut(line(bar), width)
    if ascii_only:
        return text.replace("…", ".").encode("ascii", "replace").decode()
    if color and bar:
        done = f"\x1b[36m{full * num_full}\x1b[0m\x1b[2m{empty * (bar_width - num_full)}\x1b[0m"
        text = text.replace(bar, done, 1)
    return text


class Progress:
    """A sink that shows a person how a run goes; threads may share it.

    On a terminal one line is redrawn in place. Elsewhere a line is written at the first row, at
    each evaluation and else every `interval_s` at most.

    Args:
        stream: where it goes, normally stderr.
        job: name of the job.
        num_updates: updates of the whole run.
        num_epochs: epochs of the whole run.
        headline: metric shown beside the loss, "val/phone_error_rate".
        no_color: write no colours.
        interval_s: least time between two plain lines.
        clock: seconds that only go forward.
        width: fixed width; None asks the terminal.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        job: str,
        num_updates: int,
        num_epochs: int,
        headline: str,
        no_color: bool,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
    ) -> None:
        self._screen = Screen(stream, width=width)
        self._at = Snapshot(job=job, num_updates=num_updates, num_epochs=num_epochs)
        self._headline = headline
        self._color = self._screen.is_live and not no_color
        self._interval_s = 0.1 if self._screen.is_live else interval_s
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._shown_s = -math.inf
        self._lock = threading.RLock()

    def log(self, update: int, metrics: Mapping[str, float | str]) -> None:
        """Take in a row, as logged or as read back ("nan" for NaN), and show it where it is due."""
        with self._lock:
            numbers = {name: float(value) for name, value in metrics.items()}
            now, is_evaluation = self._clock(), self._headline in numbers
            first_s, first_update = self._first = self._first or (now, update)
            eta_s = None
            if update > first_update and now > first_s:
                left = max(0, self._at.num_updates - update)
                eta_s = left * (now - first_s) / (update - first_update)
            self._at = replace(
                self._at,
                update=update,
                epoch=numbers.get("trainer/epoch", self._at.epoch),
                loss=numbers.get("train/loss", self._at.loss),
                headline=(self._headline, numbers[self._headline]) if is_evaluation else self._at.headline,
                frames_per_s=numbers.get("perf/frames_per_s", self._at.frames_per_s),
                eta_s=eta_s if eta_s is not None else self._at.eta_s,
            )
            if now - self._shown_s >= self._interval_s or is_evaluation:
                self._shown_s = now
                self._draw()

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Show an event on a line of its own, but not the routine ones."""
        if name not in _QUIET_EVENTS:
            self.notice(" ".join([f"{name}:", *(f"{key}={value}" for key, value in facts.items())]))

    def notice(self, line: str) -> None:
        """Show one line above the progress line, uncut: it may hold a path to copy."""
        with self._lock:
            self._screen.say(line)
            if self._screen.is_drawn:
                self._draw()

    def close(self, outcome: str) -> None:
        """Show the last state and how the run ended."""
        with self._lock:
            self._at = replace(self._at, eta_s=None)
            self._draw()
            self._screen.end()
            self._screen.say(outcome)

    def _draw(self) -> None:
        at = replace(self._at, eta_s=None) if self._at.update >= self._at.num_updates else self._at
        screen = self._screen
        screen.draw(format_progress(at, width=screen.columns, color=self._color, ascii_only=screen.ascii_only))


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], *, width: int | None = None) -> str:
    """Aligned columns, numbers to the right, None as "-"; lines longer than `width` are cut."""
    shown = [[_cell(value) for value in row] for row in rows]
    is_right = [
        any(_is_number(row[i]) for row in rows) and all(_is_number(row[i]) or row[i] is None for row in rows)
        for i in range(len(headers))
    ]
    widths = [max(cells(row[i]) for row in [list(headers), *shown]) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = (
            " " * (size - cells(cell)) + cell if right else cell + " " * (size - cells(cell))
            for cell, size, right in zip(row, widths, is_right, strict=True)
        )
        text = "  ".join(padded).rstrip()
        return text if width is None else cut(text, width)

    return "\n".join(line(row) for row in [list(headers), ["─" * size for size in widths], *shown])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return _short(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else one_line(value)


def _resample(values: Sequence[float], num: int) -> list[float | None]:
    """`num` means over equal shares of `values` (fewer values repeat); None where none is finite."""
    result: list[float | None] = []
    for i in range(num):
        start = i * len(values) // num
        share = values[start : max(start + 1, (i + 1) * len(values) // num)]
        finite = [value for value in share if math.isfinite(value)]
        result.append(sum(finite) / len(finite) if finite else None)
    return result


def sparkline(values: Sequence[float], *, width: int = 20) -> str:
    """`values` as one line of block characters; gaps where nothing is finite."""
    columns = _resample(values, min(width, len(values)))
    finite = [value for value in columns if value is not None]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(" " if v is None else _BLOCKS[1 + round(7 * ((v - low) / span if span else 0.5))] for v in columns)


def chart(values: Sequence[float], *, width: int = 60, height: int = 8, label: str = "") -> str:
    """A curve of braille dots, `width` x `height` characters, beside the highest and lowest value drawn.

    Where there are more values than columns (two a character), a column is the mean of its share.
    """
    points = _resample(values, 2 * width) if values else []
    finite = [value for value in points if value is not None]
    if not finite:
        return f"{one_line(label)}: nothing to draw yet" if label else "nothing to draw yet"
    low, high = min(finite), max(finite)
    span, num_rows = high - low, 4 * height
    grid = [[0] * width for _ in range(height)]
    before: int | None = None
    for x, value in enumerate(points):
        if value is None:
            before = None
            continue
        y = round((num_rows - 1) * ((high - value) / span if span else 0.5))
        start = y if before is None else before + (y > before) - (y < before)
        for dot in range(min(start, y), max(start, y) + 1):
            grid[dot // 4][x // 2] |= _BRAILLE_DOTS[x % 2][dot % 4]
        before = y
    marks = [""] * height
    if span:
        marks[-1], marks[0] = _short(low), _short(high)
    else:
        marks[round((num_rows - 1) * 0.5) // 4] = _short(low)
    margin = max(map(len, marks))
    lines = [
        f"{mark:>{margin}} ┤{''.join(chr(0x2800 + bits) for bits in row)}"
        for mark, row in zip(marks, grid, strict=True)
    ]
    return "\n".join([*([f"{'':>{margin}}  {one_line(label)}"] if label else []), *lines])
