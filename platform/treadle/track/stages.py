"""How far a piece of work in stages has come, such as the building of a data set."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

from treadle.track.screen import Screen, cut, one_line
from treadle.units import format_bytes, format_count, format_duration_s

__all__ = ["Stages", "format_stage"]

_BAR = 16


def format_stage(
    stage: str, done: int, total: int, *, unit: str, seconds: float, width: int, ascii_only: bool = False
) -> str:
    """One line of at most `width` columns: share, count, rate and the time left.

    Args:
        stage: what is done; one that ends in "bytes" counts those.
        total: 0 where nobody knows it: then there is neither share nor time left.
        seconds: since the stage began.
    """
    if stage.endswith(" bytes"):
        stage, unit = stage.removesuffix(" bytes"), ""
    count = format_bytes if not unit else lambda number: f"{number:,} {unit}"
    parts = [one_line(stage)]
    rate = done / seconds if seconds >= 1e-3 else 0.0
    if total > 0:
        share = min(1.0, done / total)
        full = int(share * _BAR)
        marks = "#-" if ascii_only else "━─"
        parts += [
            f"{share:4.0%}",
            marks[0] * full + marks[1] * (_BAR - full),
            f"{count(done).removesuffix(unit).strip()} of {count(total)}",
        ]
    else:
        parts.append(count(done))
    if rate:
        parts.append(f"{format_count(rate)} {unit}/s" if unit else f"{format_bytes(rate)}/s")
    if total > done and rate:
        parts.append(f"ETA {format_duration_s((total - done) / rate)}")
    elif total and done >= total:
        parts.append(f"in {format_duration_s(seconds)}")
    line = cut("  ".join(parts), width)
    return line.replace("…", ".").encode("ascii", "replace").decode() if ascii_only else line


class Stages:
    """Shows `stage, done, total` as they are told; threads may share it.

    On a terminal one line a stage is redrawn in place. Elsewhere a line is written every `interval_s` at most, so that
    a short piece of work writes none and a long one does not flood a log.

    Args:
        stream: where it goes, normally stderr.
        unit: what is counted.
        interval_s: least time between two plain lines.
        clock: seconds that only go forward.
        width: fixed width; None asks the terminal.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        unit: str = "rows",
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
    ) -> None:
        self._screen = Screen(stream, width=width)
        self._unit = unit
        self._clock = clock
        self._interval_s = 0.1 if self._screen.is_live else interval_s
        self._lock = threading.Lock()
        self._stage: str | None = None
        self._at = (0, 0)
        self._began_s = 0.0
        self._shown_s = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take in how far a stage is, and show it where that is due."""
        with self._lock:
            now = self._clock()
            if stage != self._stage:
                self._finish(now)
                self._stage, self._began_s = stage, now
            self._at = done, total
            if now - self._shown_s >= self._interval_s:
                self._show(now)

    def close(self) -> None:
        """Show the last state where something is shown already."""
        with self._lock:
            self._finish(self._clock())
            self._stage = None

    def _finish(self, now: float) -> None:
        if self._stage is None:
            return
        if self._screen.is_live or now - self._shown_s >= self._interval_s:
            self._show(now)
        self._screen.end()

    def _show(self, now: float) -> None:
        screen, (done, total) = self._screen, self._at
        assert self._stage is not None
        self._shown_s = now
        seconds = now - self._began_s
        width, plain = screen.columns, screen.ascii_only
        screen.draw(
            format_stage(self._stage, done, total, unit=self._unit, seconds=seconds, width=width, ascii_only=plain)
        )
