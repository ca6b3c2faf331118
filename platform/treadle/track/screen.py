"""One line at a time, on a terminal or into a log: what both progress displays write through.

Text is cut to the width and freed of control characters, so that no name or message can wrap a line or steer the
terminal.
"""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO

__all__ = ["Screen", "cells", "cut", "one_line"]


def one_line(text: object) -> str:
    """`text` on one line, without control characters and bidirectional overrides."""
    kept = (" " if c in "\n\t\r" else c for c in str(text))
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "�" for c in kept)


def cells(text: str) -> int:
    """Columns that `text` takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def cut(text: str, width: int) -> str:
    """`text`, or as much of it as fits into `width` columns with an ellipsis."""
    if cells(text) <= width:
        return text
    while text and cells(text) > width - 1:
        text = text[:-1]
    return text + "…" if width > 0 else ""


class Screen:
    """A stream, normally stderr, on which one line may be redrawn in place.

    Args:
        stream: where lines go. A closed one ends the show, not the work.
        width: fixed width; None asks the terminal.
    """

    def __init__(self, stream: TextIO, *, width: int | None = None) -> None:
        self._stream = stream
        self._width = width
        self.is_live = stream.isatty()
        self.ascii_only = not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
        self._is_drawn = False
        self._is_broken = False

    @property
    def columns(self) -> int:
        """Columns to write into."""
        if self._width is not None:
            return self._width
        if not self.is_live:
            return 160
        try:
            # One less: some terminals wrap as soon as the last column is written.
            return max(20, os.get_terminal_size(self._stream.fileno()).columns - 1)
        except (OSError, ValueError):
            return 79

    @property
    def is_drawn(self) -> bool:
        """Whether the line in place holds something."""
        return self._is_drawn

    def draw(self, line: str) -> None:
        """Put `line` in place of the one drawn before; into a log it is a line of its own."""
        self._write(f"\r{line}\x1b[K" if self.is_live else f"{line}\n")
        self._is_drawn = self.is_live

    def say(self, line: str) -> None:
        """A line of its own above the one in place, which is gone until drawn again."""
        text = one_line(line)
        self._write(f"\r\x1b[K{text}\n" if self._is_drawn else f"{text}\n")

    def end(self) -> None:
        """Leave the line in place as it is; what follows stands below it."""
        if self._is_drawn:
            self._write("\n")
        self._is_drawn = False

    def _write(self, text: str) -> None:
        if self._is_broken:
            return
        try:
            if self.ascii_only:
                text = text.encode("ascii", "replace").decode()
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # closed, or nobody reads the other end
            self._is_broken = True
