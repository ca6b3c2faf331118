"""The report: whole, inert, and readable with any part missing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.spec import CtcSpec
from treadle.track import Example, History, LabelScore, ReportInput, catalogue, read_metrics, render_report
from treadle.track.report import _align

CATALOGUE = catalogue(CtcSpec(label_name="phone", sequence_name="word"))
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b[2J\ud800\u202e</style>{}%s"


class Page(HTMLParser):
    """Checks that tags nest, and collects them with the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend((name, value or "") for name, value in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def metric_rows() -> list[dict[str, Any]]:
    rows = []
    for attempt, updates in ((1, range(10, 60, 10)), (2, range(40, 110, 10))):
        for update in updates:
            metrics = {
                "train/loss": 3.0 / update,
                "val/loss": 4.0 / update,
                "val/phone_error_rate": 1 / update,
                "train/lr": 1e-3,
                "perf/frames_per_s": 1000.0 + update,
                "train/grad_norm": math.nan,
            }
            time_s = 1000.0 + update + 100 * attempt
            rows.append({"schema": 1, "attempt": attempt, "update": update, "time": time_s, "metrics": metrics})
    return rows


def event(attempt: int, time_s: float, name: str, **facts: Any) -> dict[str, Any]:
    return {"schema": 1, "attempt": attempt, "time": time_s, "event": name, **facts}


def full_input(word: str = "g2p") -> ReportInput:
    return ReportInput(
        job=word,
        run_id=word,
        status="finished",
        history=read_metrics(metric_rows()),
        catalogue=CATALOGUE,
        summary=word,
        model_version=word,
        started_s=1100.0,
        duration_s=300.0,
        facts={word: word},
        headline=["test/phone_error_rate", "val/phone_error_rate", word, "perf/frames_per_s"],
        final={"test/phone_error_rate": 0.0714, word: 3.0, "test/loss": math.nan},
        intervals={"test/phone_error_rate": (0.07, 0.073)},
        events=[
            event(1, 1100.0, "start", word=word),
            event(1, 1150.0, "checkpoint", update=50),
            event(2, 1240.0, "restart", reason=word),
            event(2, 1400.0, "end", outcome="finished"),
            {"event": word, "time": "yesterday"},
        ],
        lengths=[(1, 2, 10), (2, 4, 30), (4, 9, 5)],
        fill=[(word, 0.97), ("4-9", 0.81)],
        labels=[LabelScore(label=word, count=10, recall=0.5, precision=math.nan)]
        + [LabelScore(label=f"L{i}", count=i, recall=0.9, precision=0.8) for i in range(20)],
        confusions=[("AH", word, 7), (word, "AH", 70)],
        examples=[Example(input=["c", word], expected=["K", word], predicted=[word, "T"])],
        plan=word,
        spec={"name": word, "model": {word: [1, word], "empty": {}}},
        lineage={word: word},
        made_by=word,
    )


def test_a_full_report_says_what_happened() -> None:
    html = render_report(full_input())
    page = Page(html)
    words = " ".join(page.text)
    for wanted in (
        "7.14",  # a share is shown as percent
        "95 % interval 7.00 to 7.30",
        "best 1.00 % at update 100",
        "attempt 2",
        "1 lost",
        "2 finished",
        "restart",
        "Most confused",
        "By label",
        "Sequence lengths",
        "Fill by length zone",
        "nats/label frame",
        "model.empty",
    ):
        assert wanted in words, wanted
    assert page.tags.count("svg") == 7
    assert words.count("Nothing was logged.") == 1  # the gradient norm, which never was finite
    assert len(html) < 200_000


def test_nothing_is_run_or_loaded() -> None:
    html = render_report(full_input())
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "src")]
    assert "url(" not in html
    assert "://" not in html
    assert "default-src 'none'" in html
    assert "prefers-color-scheme:dark" in html


def test_hostile_strings_are_inert_everywhere() -> None:
    html = render_report(full_input(HOSTILE))
    html.encode("utf-8")
    assert not re.search("[\x00\x1b\ud800\u202e]", html)
    page, plain = Page(html), Page(render_report(full_input()))
    assert set(page.tags) == set(plain.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert "<script>alert(1)</script>" in " ".join(page.text)


@pytest.mark.parametrize("status", ["running", "failed", "preempted", "stopped", "finished", "no such"])
def test_an_empty_run_still_has_a_report(status: str) -> None:
    history = History(series={}, starts={}, num_skipped=0)
    html = render_report(ReportInput(job="g2p", run_id="r", status=status, history=history, catalogue=CATALOGUE))
    words = " ".join(Page(html).text)
    assert status in words
    assert "Training" not in words


def test_missing_and_added_labels_are_marked_where_they_are() -> None:
    examples = [
        Example(input=["x"], expected=["K", "AE", "T"], predicted=["K", "T"]),
        Example(input=["y"], expected=["K"], predicted=["K", "S"]),
        Example(input=["z"], expected=["K"], predicted=["G"]),
        Example(input=["w"], expected=["K"], predicted=["K"]),
    ]
    history = History(series={}, starts={}, num_skipped=0)
    html = render_report(
        ReportInput(job="j", run_id="r", status="finished", history=history, catalogue=CATALOGUE, examples=examples)
    )
    assert re.findall(r'<span class="tok (sub|ins|del)">(\w+)</span>', html) == [
        ("del", "AE"),
        ("ins", "S"),
        ("sub", "G"),
    ]
    assert html.count("✓") == 2  # the run and the last example


WORDS = st.lists(st.sampled_from("abc"), max_size=8)


@given(WORDS, WORDS)
def test_an_alignment_is_a_cheapest_edit(expected: list[str], predicted: list[str]) -> None:
    pairs = _align(expected, predicted)
    assert [a for a, _ in pairs if a is not None] == expected
    assert [b for _, b in pairs if b is not None] == predicted
    before = list(range(len(predicted) + 1))
    for i, a in enumerate(expected, 1):
        row = [i]
        for j, b in enumerate(predicted, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
        before = row
    assert sum(a != b for a, b in pairs) == before[-1]
