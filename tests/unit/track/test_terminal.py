"""What a person sees: never wider than the terminal, never steering it."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.track.screen import cells
from treadle.track.terminal import Progress, Snapshot, chart, format_progress, sparkline, table

FULL = Snapshot(
    job="g2p",
    num_updates=4000,
    num_epochs=10,
    update=1234,
    epoch=3.1,
    loss=0.1234567,
    headline=("val/phone_error_rate", 0.0712),
    frames_per_s=123_456.0,
    eta_s=80.0,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def build_progress(stream: io.StringIO, clock: Clock, *, no_color: bool = True, width: int | None = 120) -> Progress:
    return Progress(
        stream,
        job="g2p",
        num_updates=100,
        num_epochs=5,
        headline="val/phone_error_rate",
        no_color=no_color,
        clock=clock,
        width=width,
    )


def test_a_wide_line_says_everything() -> None:
    assert format_progress(FULL, width=160) == (
        "g2p  31%  ━━━━━───────────  update 1,234/4,000  epoch 3.1/10  loss 0.1235  "
        "val/phone_error_rate 0.0712  123k frames/s  ETA 1m20s"
    )


def test_a_narrow_line_keeps_what_matters() -> None:
    line = format_progress(FULL, width=60)
    assert "loss 0.1235" in line
    assert "frames/s" not in line
    assert "epoch" not in line


@given(
    st.integers(1, 200),
    st.text(max_size=40),
    st.one_of(st.none(), st.floats()),
    st.integers(0, 10**9),
    st.booleans(),
    st.booleans(),
)
def test_a_line_never_wraps(
    width: int, job: str, loss: float | None, update: int, color: bool, ascii_only: bool
) -> None:
    at = replace(FULL, job=job, loss=loss, update=update)
    line = format_progress(at, width=width, color=color, ascii_only=ascii_only)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", line)
    assert cells(shown) <= width
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", shown)
    if ascii_only and not color:
        assert line.isascii()


def test_a_terminal_line_is_redrawn_in_place() -> None:
    stream, clock = Terminal(), Clock()
    progress = build_progress(stream, clock, no_color=False)
    for update in range(1, 101):
        clock.now += 0.0625
        progress.log(update, {"train/loss": 1.0 / update, "trainer/epoch": update / 20})
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().count("\r") == 50  # in 6.25 s, at most ten a second
    assert "\x1b[36m" in stream.getvalue()
    progress.notice("W&B: no API key -> logging offline to /a/b")
    assert "\r\x1b[KW&B: no API key -> logging offline to /a/b\n\r" in stream.getvalue()
    progress.close("finished")
    last = stream.getvalue().rsplit("\r", 1)[-1]
    assert "100%" in last
    assert last.endswith("\nfinished\n")


def test_no_color_is_respected() -> None:
    stream = Terminal()
    progress = build_progress(stream, Clock(), no_color=True)
    progress.log(1, {"train/loss": 1.0})
    assert re.findall(r"\x1b\[[0-9;]*[a-zA-Z]", stream.getvalue()) == ["\x1b[K"]


def test_plain_lines_are_few_and_hold_every_evaluation() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = build_progress(stream, clock)
    for update in range(1, 101):
        clock.now += 0.1
        progress.log(update, {"train/loss": 1.0})
        if update % 50 == 0:
            progress.log(update, {"val/phone_error_rate": 0.25})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # at 0.1 s and the evaluations at 5 s and 10 s
    assert sum("val/phone_error_rate 0.25" in line for line in lines) == 2
    assert "ETA" in lines[1]
    assert "ETA" not in lines[2]
    assert not re.search(r"[\r\x1b]", stream.getvalue())


def test_time_left_follows_the_pace_since_this_start() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = build_progress(stream, clock)
    clock.now = 1000.0
    progress.log(40, {"train/loss": 1.0})  # resumed: the time before says nothing
    clock.now = 1010.0
    progress.log(60, {"train/loss": 1.0})
    assert "ETA 20.0s" in stream.getvalue().splitlines()[-1]


def test_rows_read_back_from_the_file_are_shown_too() -> None:
    stream = io.StringIO()
    progress = build_progress(stream, Clock())
    progress.log(1, {"train/loss": "nan", "val/phone_error_rate": 0.5})
    assert "loss nan  val/phone_error_rate 0.5" in stream.getvalue()


def test_only_telling_events_are_shown_and_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    progress = build_progress(stream, Clock())
    progress.event("checkpoint", {"update": 3})
    progress.event("restart", {"reason": "\x1b[2Jgone\nnext\u202e"})
    assert stream.getvalue() == "restart: reason=�[2Jgone next�\n"


def test_a_closed_stream_ends_the_show_not_the_run() -> None:
    stream = io.StringIO()
    progress = build_progress(stream, Clock())
    stream.close()
    progress.log(1, {"train/loss": 1.0})
    progress.notice("x")
    progress.close("finished")


def test_a_stream_without_unicode_gets_ascii(tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = io.BytesIO()
    progress = build_progress(io.TextIOWrapper(raw, encoding="ascii"), Clock())  # pyright: ignore[reportArgumentType]
    progress.log(10, {"train/loss": 1.0})
    progress.notice("日本")
    assert b"##--" in raw.getvalue()
    assert raw.getvalue().endswith(b"??\n")


def test_a_table_is_aligned_by_kind() -> None:
    rows = [["g2p-1", 0.07123, 1_234_567, None], ["日本", float("nan"), 3, 2]]
    assert table(rows, ["run", "error", "frames", "age"]).splitlines() == [
        "run      error     frames  age",
        "─────  ───────  ─────────  ───",
        "g2p-1  0.07123  1,234,567    -",
        "日本       nan          3    2",
    ]
    assert table([], ["run"]) == "run\n───"
    assert table([["a\nb\x1b[1m"]], ["x"]).splitlines()[-1] == "a b�[1m"
    assert all(len(line) <= 12 for line in table(rows[:1], ["run", "error", "frames", "age"], width=12).splitlines())


def test_curves_fall_where_values_fall() -> None:
    falling = [100.0 - i for i in range(100)]
    assert sparkline(falling, width=8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, float("nan"), 3.0]) == "▁ █"
    assert sparkline([float("nan")]) == ""
    lines = chart(falling, width=10, height=3, label="train/loss").splitlines()
    assert lines[0].strip() == "train/loss"
    assert [line.split("┤")[0].strip() for line in lines[1:]] == ["98", "", "3"]
    left = [re.search(r"[^\u2800]", line.split("┤")[1]) for line in lines[1:]]
    starts = [match.start() for match in left if match]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert "nothing" in chart([], label="x")
    assert "nothing" in chart([float("nan")])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50), st.integers(1, 30))
def test_curves_take_any_values(values: list[float], width: int) -> None:
    assert all(cells(line.split("┤")[-1]) <= width for line in chart(values, width=width).splitlines() if "┤" in line)
    assert len(sparkline(values, width=width)) <= width
