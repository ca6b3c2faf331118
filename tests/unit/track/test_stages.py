"""How far a build is: redrawn on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.track.screen import cells
from treadle.track.stages import Stages, format_stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_share_count_rate_and_time_left() -> None:
    line = format_stage("read", 3_000, 12_000, unit="rows", seconds=2.0, width=160)
    assert line == "read   25%  ━━━━────────────  3,000 of 12,000 rows  1500 rows/s  ETA 6.0s"
    done = format_stage("read", 12_000, 12_000, unit="rows", seconds=8.0, width=160)
    assert done == "read  100%  ━━━━━━━━━━━━━━━━  12,000 of 12,000 rows  1500 rows/s  in 8.0s"


def test_a_source_of_unknown_length_has_no_time_left() -> None:
    assert format_stage("read", 3_000, 0, unit="rows", seconds=2.0, width=160) == "read  3,000 rows  1500 rows/s"


def test_bytes_are_counted_as_such() -> None:
    line = format_stage("group bytes", 3 << 20, 12 << 20, unit="rows", seconds=2.0, width=160)
    assert line == "group   25%  ━━━━────────────  3.0 MiB of 12.0 MiB  1.5 MiB/s  ETA 6.0s"


@given(
    st.text(max_size=20) | st.just("x bytes"),
    st.integers(0, 10**12),
    st.integers(0, 10**12),
    st.floats(0, 1e9),
    st.integers(1, 160),
    st.booleans(),
)
def test_a_line_never_wraps(stage: str, done: int, total: int, seconds: float, width: int, plain: bool) -> None:
    line = format_stage(stage, done, total, unit="rows", seconds=seconds, width=width, ascii_only=plain)
    assert cells(line) <= width
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    assert line.isascii() or not plain


def test_a_terminal_has_one_line_a_stage() -> None:
    stream, clock = Terminal(), Clock()
    show = Stages(stream, clock=clock, width=100)
    for stage in ("read", "write"):
        for done in range(101):
            clock.now += 0.0625
            show(stage, done, 100)
    show.close()
    lines = stream.getvalue().split("\n")
    assert [line.rsplit("\r", 1)[-1].split()[:2] for line in lines[:2]] == [["read", "100%"], ["write", "100%"]]
    assert lines[2:] == [""]
    assert 40 < lines[0].count("\r") <= 52  # 6.3 s, at most ten a second
    assert "in 6.3s" in lines[0].rsplit("\r", 1)[-1]


def test_a_log_has_a_line_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    show = Stages(stream, clock=clock, interval_s=5.0)
    for done in range(193):
        clock.now += 0.0625
        show("read", done, 192)
    show.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # at 5 and 10 of 12 s
    assert not re.search(r"[\r\x1b]", stream.getvalue())
    assert "ETA" in lines[0]


def test_short_work_writes_nothing_into_a_log() -> None:
    stream, clock = io.StringIO(), Clock()
    show = Stages(stream, clock=clock)
    for stage in ("read", "sort", "write"):
        clock.now += 1.0
        show(stage, 10, 10)
    show.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_closed_stream_ends_the_show_not_the_work(kind: type[io.StringIO]) -> None:
    stream, clock = kind(), Clock()
    show = Stages(stream, clock=clock)
    stream.close()
    clock.now += 60
    show("read", 1, 2)
    show.close()
