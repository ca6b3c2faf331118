"""The run's record: what is written, what is refused, what a reader makes of it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle import wire
from treadle.errors import InternalError
from treadle.spec import CtcSpec
from treadle.track import NullTracker, RunTracker, catalogue, now_s, read_metrics

CATALOGUE = catalogue(CtcSpec())


class MemoryLines:
    """Lines in memory, as strict about JSON as the real ones."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.is_open = True

    def append(self, row: Mapping[str, Any]) -> None:
        assert self.is_open
        self.rows.append(json.loads(wire.canonical(dict(row))))

    def close(self) -> None:
        self.is_open = False


class MemorySink:
    """A sink that remembers, and breaks at one of its methods if told to."""

    def __init__(self, breaks_at: str = "") -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.breaks_at = breaks_at

    def _take(self, method: str, *args: Any) -> None:
        if method == self.breaks_at:
            raise RuntimeError("no longer there")
        self.seen.append((method, *args))

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        self._take("log", update, dict(metrics))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        self._take("event", name, dict(facts))

    def close(self, outcome: str) -> None:
        self._take("close", outcome)


def build_tracker(*sinks: MemorySink, attempt: int = 1) -> tuple[RunTracker, MemoryLines, MemoryLines]:
    metrics, events = MemoryLines(), MemoryLines()
    tracker = RunTracker(metrics=metrics, events=events, sinks=sinks, attempt=attempt, catalogue=CATALOGUE)
    return tracker, metrics, events


def test_rows_and_events_have_the_documented_form() -> None:
    sink = MemorySink()
    tracker, metrics, events = build_tracker(sink, attempt=2)
    before = now_s()
    tracker.log(120, {"train/loss": 0.5, "trainer/frames_seen": 10})
    tracker.event("restart", reason="worker lost", ranks=(0, 1), share=math.inf)
    tracker.close("finished")
    tracker.close("finished")
    (row,) = metrics.rows
    assert before <= row.pop("time") <= now_s()
    assert row == {
        "schema": 1,
        "attempt": 2,
        "update": 120,
        "metrics": {"train/loss": 0.5, "trainer/frames_seen": 10},
    }
    restart, end = events.rows
    assert {key: restart[key] for key in restart if key != "time"} == {
        "schema": 1,
        "attempt": 2,
        "event": "restart",
        "reason": "worker lost",
        "ranks": [0, 1],
        "share": "inf",
    }
    assert (end["event"], end["outcome"]) == ("end", "finished")
    assert [seen[0] for seen in sink.seen] == ["log", "event", "close"]
    assert not metrics.is_open
    assert not events.is_open


def test_non_finite_values_are_kept_as_text_and_read_back() -> None:
    sink = MemorySink()
    tracker, metrics, _ = build_tracker(sink)
    tracker.log(1, {"train/loss": math.nan, "train/grad_norm": -math.inf, "train/lr": 1e-3})
    assert metrics.rows[0]["metrics"] == {"train/loss": "nan", "train/grad_norm": "-inf", "train/lr": 1e-3}
    assert math.isnan(sink.seen[0][2]["train/loss"])
    history = read_metrics(metrics.rows)
    assert math.isnan(history.series["train/loss"].last)
    assert history.last("train/grad_norm") == -math.inf


@pytest.mark.parametrize("metrics", [{"train/los": 1.0}, {"train/loss": "1"}, {"train/loss": None}])
def test_what_the_catalogue_does_not_know_is_a_bug(metrics: dict[str, Any]) -> None:
    tracker, lines, _ = build_tracker()
    with pytest.raises(InternalError, match="train/los"):
        tracker.log(1, metrics)
    assert lines.rows == []


def test_facts_may_not_hide_fixed_fields_and_nothing_follows_the_end() -> None:
    tracker, _, _ = build_tracker()
    with pytest.raises(InternalError, match="attempt"):
        tracker.event("restart", attempt=3)
    tracker.close("failed")
    with pytest.raises(InternalError, match="after close"):
        tracker.log(1, {})


@pytest.mark.parametrize("method", ["log", "event", "close"])
def test_a_broken_sink_is_left_out_and_the_run_goes_on(method: str) -> None:
    broken, whole = MemorySink(breaks_at=method), MemorySink()
    tracker, metrics, events = build_tracker(broken, whole)
    for update in (1, 2):
        tracker.log(update, {"train/loss": 1.0})
        tracker.event("checkpoint", update=update)
    tracker.close("finished")
    assert len(metrics.rows) == 2
    assert [seen[0] for seen in whole.seen] == ["log", "event", "log", "event", "close"]
    (lost,) = [row for row in events.rows if row["event"] == "sink_lost"]
    assert (lost["sink"], lost["reason"]) == ("MemorySink", "no longer there")


def test_threads_share_a_tracker() -> None:
    tracker, metrics, _ = build_tracker(MemorySink())
    threads = [
        threading.Thread(target=lambda: [tracker.log(u, {"train/loss": 1.0}) for u in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(metrics.rows) == 200


def test_facts_may_bear_any_other_name() -> None:
    tracker, _, events = build_tracker()
    tracker.event("precision", name="bf16", why="faster")
    assert (events.rows[0]["event"], events.rows[0]["name"]) == ("precision", "bf16")


def test_null_tracker_takes_anything() -> None:
    tracker = NullTracker()
    tracker.log(1, {"no/such": 1.0})
    tracker.event("x", attempt=1)
    tracker.close("finished")


def row(attempt: int, update: int, **metrics: Any) -> dict[str, Any]:
    return {"schema": 1, "attempt": attempt, "update": update, "time": float(update), "metrics": metrics}


def test_the_highest_attempt_counts() -> None:
    history = read_metrics([row(1, 1, a=1.0), row(1, 2, a=2.0, b=5.0), row(2, 2, a=20.0), row(2, 3, a=30.0)])
    assert history.series["a"].updates == (1, 2, 3)
    assert history.series["a"].values == (1.0, 20.0, 30.0)
    assert history.series["a"].attempts == (1, 2, 2)
    assert "b" not in history.series  # thrown away with the state it came from
    assert history.starts == {1: 1, 2: 2}


def test_rows_of_one_update_join() -> None:
    history = read_metrics([row(1, 4, loss=1.0, lr=0.1), row(1, 4, val=0.5, lr=0.2)])
    assert {name: series.last for name, series in history.series.items()} == {"loss": 1.0, "lr": 0.2, "val": 0.5}


def test_torn_and_foreign_rows_are_counted_not_raised() -> None:
    good = wire.canonical(row(1, 1, a=1.0))
    broken: list[Any] = [good[:-9], b"", b"[]", "null", b"\xff\xfe", None, 3, {}, {"schema": 1}]
    broken += [row(1, 2) | {"schema": 2}, row(1, 2, a="many"), row(1, 2) | {"metrics": [1]}, row(1, 2, a=None)]
    history = read_metrics([*broken, good, good.decode()])
    assert history.num_skipped == len(broken)
    assert history.series["a"].values == (1.0,)
    assert read_metrics([]).series == {}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12), st.floats(allow_nan=False)), max_size=40))
def test_columns_agree_with_a_plain_reading(cells: list[tuple[int, int, float]]) -> None:
    history = read_metrics(row(attempt, update, a=value) for attempt, update, value in cells)
    expected: dict[int, tuple[int, float]] = {}
    for attempt, update, value in cells:
        if attempt >= expected.get(update, (0, 0.0))[0]:
            expected[update] = (attempt, value)
    series = history.series.get("a")
    assert dict(zip(series.updates, series.values, strict=True) if series else ()) == {
        update: value for update, (_, value) in expected.items()
    }
    if series:
        assert list(series.updates) == sorted(expected)
