"""One run as one HTML file: no script, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from treadle.track.catalogue import Direction, Metric
from treadle.track.log import History, Series
from treadle.track.style import STYLE
from treadle.track.svg import Bar, Line, Span, bar_chart, line_chart, number, span_chart, text
from treadle.units import format_count, format_duration_s

__all__ = ["Example", "LabelScore", "ReportInput", "render_report"]

_MAX_EXAMPLES, _MAX_TOKENS, _MAX_EVENTS = 40, 200, 200
_TONES = {
    "finished": "good",
    "stopped": "warn",
    "preempted": "warn",
    "failed": "bad",
    "lost": "bad",
    "unreadable": "bad",
}
_SIGNS = {"good": "✓", "calm": "●", "warn": "■", "bad": "✕"}
_SMALL_EVENTS = frozenset({"checkpoint", "evaluate"})
_FIXED_FIELDS = frozenset({"schema", "attempt", "time", "event"})


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of the data and what the model made of it, in symbols."""

    input: Sequence[str]
    expected: Sequence[str]
    predicted: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How well one label is found; shares are from 0 to 1."""

    label: str
    count: int
    recall: float
    precision: float


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """Everything the report shows; what is empty is left out.

    Args:
        job: name of the job.
        run_id: id of the run.
        status: "finished", "running", "stopped", "preempted" or "failed".
        history: the metric rows, read by `read_metrics`.
        catalogue: the metrics of the job's task.
        summary: one line about the job.
        model_version: the registered version, "g2p/3".
        started_s: start of the first attempt, Unix seconds.
        duration_s: from the first start to the end.
        facts: more short facts for the head, in order.
        headline: names of the metrics shown as tiles, the most important first.
        final: final value of each metric by name; the tiles read these first, then the history.
        intervals: lower and upper bound of a final value, where known.
        events: the event rows.
        lengths: lower edge (included), upper edge (excluded) and rows of each bucket of lengths.
        fill: name and frames / slots of each length zone.
        labels: scores by label.
        confusions: expected label, predicted label, count.
        examples: rows with expected and predicted labels.
        plan: the plan as text.
        spec: the job as nested plain values.
        lineage: digests and versions by name.
        made_by: what wrote the report, for the foot.
    """

    job: str
    run_id: str
    status: str
    history: History
    catalogue: Mapping[str, Metric]
    summary: str = ""
    model_version: str = ""
    started_s: float | None = None
    duration_s: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    headline: Sequence[str] = ()
    final: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    lengths: Sequence[tuple[int, int, int]] = ()
    fill: Sequence[tuple[str, float]] = ()
    labels: Sequence[LabelScore] = ()
    confusions: Sequence[tuple[str, str, int]] = ()
    examples: Sequence[Example] = ()
    plan: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    made_by: str = "treadle report"


def render_report(given: ReportInput) -> str:
    """The whole page. Every text in `given` is escaped; the page forbids itself scripts and requests."""
    sections = [_head(given), _tiles(given), _curves(given), _quality(given), _examples(given.examples)]
    sections += [_time(given), _data(given), _origin(given)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(given.job)} · {text(given.run_id)}</title>",
            f"<style>{STYLE}</style></head><body><main>",
            *(section for section in sections if section),
            f"<footer>Written by {text(given.made_by)}. One file, no scripts, nothing loaded from elsewhere.</footer>",
            "</main></body></html>\n",
        ]
    )


def _stamp(time_s: float) -> str:
    try:
        return datetime.fromtimestamp(time_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return str(time_s)


def _value(name: str, value: float, given: ReportInput) -> tuple[str, str]:
    """A metric's value for people and its unit; shares as percent."""
    metric = given.catalogue.get(name)
    unit = metric.unit if metric else ""
    if unit == "share" and math.isfinite(value):
        return f"{100 * value:.2f}", "%"
    return number(value), unit


def _head(given: ReportInput) -> str:
    tone = _TONES.get(given.status, "calm")
    facts = {"run": given.run_id}
    if given.model_version:
        facts["model"] = given.model_version
    if given.started_s is not None:
        facts["started"] = _stamp(given.started_s)
    if given.duration_s is not None:
        facts["took"] = format_duration_s(given.duration_s)
    facts |= given.facts
    shown = "".join(f"<span>{text(name)} <b>{text(value)}</b></span>" for name, value in facts.items())
    pill = f'<span class="pill {tone}">{_SIGNS[tone]} {text(given.status)}</span>'
    summary = f"<p>{text(given.summary)}</p>" if given.summary else ""
    return f'<header><h1>{text(given.job)}{pill}</h1>{summary}<div class="facts">{shown}</div></header>'


def _tiles(given: ReportInput) -> str:
    tiles = []
    for name in given.headline:
        value = given.final.get(name, given.history.last(name))
        if value is None:
            continue
        metric, (shown, unit) = given.catalogue.get(name), _value(name, value, given)
        note = _interval(name, given) or _best(name, given)
        tiles.append(
            f'<div class="tile{"" if tiles else " first"}" title="{text(metric.meaning if metric else name)}">'
            f'<div class="name">{text(name)}</div><div class="value">{text(shown)} <small>{text(unit)}</small></div>'
            f'<div class="note">{text(note)}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _interval(name: str, given: ReportInput) -> str:
    if name not in given.intervals:
        return ""
    low, high = (_value(name, bound, given)[0] for bound in given.intervals[name])
    return f"95 % interval {low} to {high}"


def _best(name: str, given: ReportInput) -> str:
    metric, series = given.catalogue.get(name), given.history.series.get(name)
    if metric is None or series is None or metric.good is Direction.level:
        return ""
    finite = [(v, u) for v, u in zip(series.values, series.updates, strict=True) if math.isfinite(v)]
    if len(finite) < 2:
        return ""
    value, update = max(finite) if metric.good is Direction.up else min(finite)
    shown, unit = _value(name, value, given)
    return f"best {shown}{' ' + unit if unit == '%' else ''} at update {update:,}"


def _card(title: str, body: str, *, note: str = "", css: str = "") -> str:
    told = f"<p>{text(note)}</p>" if note else ""
    return f'<section class="card {css}"><h3>{text(title)}</h3>{told}{body}</section>'


def _section(title: str, cards: Sequence[str]) -> str:
    kept = [card for card in cards if card]
    return f'<h2>{text(title)}</h2><div class="grid2">{"".join(kept)}</div>' if kept else ""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """A table of cells that are HTML already; the columns in `right` hold numbers."""
    css = [' class="num"' if i in right else "" for i in range(len(headers))]
    head = "".join(f"<th{css[i]}>{text(name)}</th>" for i, name in enumerate(headers))
    body = "".join("<tr>" + "".join(f"<td{css[i]}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _curves(given: ReportInput) -> str:
    series = given.history.series
    shares = [
        name
        for name in series
        if name.startswith("val/") and name != "val/loss" and given.catalogue.get(name, _UNKNOWN).unit == "share"
    ]
    others = [name for name in series if name.startswith("val/") and name not in shares and name != "val/loss"]
    return _section(
        "Training",
        [
            _plot(given, "Loss", ["train/loss", "val/loss"]),
            _plot(given, "Validation", shares, from_zero=True),
            *(_plot(given, name, [name]) for name in others),
            _plot(given, "Learning rate", ["train/lr"], from_zero=True),
            _plot(given, "Gradient norm", ["train/grad_norm"]),
            _plot(given, "Throughput", ["perf/frames_per_s"], from_zero=True),
            _plot(given, "Time of an update", ["perf/update_ms"], from_zero=True),
            _plot(given, "Fill and waiting", ["data/fill", "perf/data_wait_share"], from_zero=True),
        ],
    )


_UNKNOWN = Metric(name="unknown/unknown", unit="", meaning="")


def _plot(given: ReportInput, title: str, names: Sequence[str], *, from_zero: bool = False) -> str:
    found = {name: given.history.series[name] for name in names if name in given.history.series}
    if not found:
        return ""
    first = given.catalogue.get(next(iter(found)), _UNKNOWN)
    starts = given.history.starts
    marks = {float(update): f"attempt {attempt}" for attempt, update in starts.items() if attempt > min(starts)}
    picture = line_chart(
        [Line(label=name, xs=column.updates, ys=column.values) for name, column in found.items()],
        label=f"{title}: {', '.join(found)} over updates",
        unit=first.unit,
        marks=marks,
        from_zero=from_zero,
        # One range for all curves, so that the same update stands at the same place.
        x_range=(0, max(s.updates[-1] for s in given.history.series.values())),
    )
    named = (
        f'<span title="{text(given.catalogue.get(name, _UNKNOWN).meaning)}"><i class="s{i}"></i>{text(name)}</span>'
        for i, name in enumerate(found)
    )
    return _card(title, f'<div class="legend">{"".join(named)}</div>{picture}')


def _quality(given: ReportInput) -> str:
    return _section(
        "Results",
        [_final(given), _evaluations(given), _confusions(given.confusions), _labels(given.labels)],
    )


def _final(given: ReportInput) -> str:
    rows = []
    for name, value in given.final.items():
        shown, unit = _value(name, value, given)
        interval = " to ".join(_value(name, bound, given)[0] for bound in given.intervals.get(name, ()))
        meaning = given.catalogue[name].meaning if name in given.catalogue else ""
        rows.append([text(name), text(shown), text(unit), text(interval), text(meaning)])
    if not rows:
        return ""
    headers = ["metric", "value", "unit", "95 % interval", "meaning"]
    if not given.intervals:
        headers, rows = headers[:3] + headers[4:], [row[:3] + row[4:] for row in rows]
    return _card("Final numbers", _table(headers, rows, right=frozenset({1})), css="wide")


def _evaluations(given: ReportInput) -> str:
    """The numbers behind the validation curves, folded away."""
    columns = {name: s for name, s in given.history.series.items() if name.startswith("val/")}
    updates = sorted({update for column in columns.values() for update in column.updates})
    if not updates:
        return ""
    cells = {name: dict(zip(s.updates, s.values, strict=True)) for name, s in columns.items()}
    rows = [
        [f"{update:,}", *(text(number(cell[update])) if update in cell else "" for cell in cells.values())]
        for update in updates[-200:]
    ]
    numbers = _table(["update", *columns], rows, right=frozenset(range(len(columns) + 1)))
    return _card(
        "Evaluations",
        f"<details><summary>{len(updates)} on the validation rows</summary>{numbers}</details>",
        css="wide",
    )


def _confusions(confusions: Sequence[tuple[str, str, int]]) -> str:
    if not confusions:
        return ""
    most = sorted(confusions, key=lambda c: -c[2])[:12]
    rows = [
        [_token(expected), _token(predicted, "sub"), _meter(count / max(1, most[0][2])) + f"{count:,}"]
        for expected, predicted, count in most
    ]
    return _card(
        "Most confused", _table(["expected", "predicted", "times"], rows), note="Which label is taken for which."
    )


def _labels(labels: Sequence[LabelScore]) -> str:
    if not labels:
        return ""
    rows = [
        [
            _token(score.label),
            _meter(score.recall) + _percent(score.recall),
            _meter(score.precision) + _percent(score.precision),
            f"{score.count:,}",
        ]
        for score in sorted(labels, key=lambda s: s.recall if math.isfinite(s.recall) else 2.0)
    ]
    headers, right = ["label", "recall", "precision", "count"], frozenset({3})
    body = _table(headers, rows[:12], right=right)
    if len(rows) > 12:
        rest = _table(headers, rows[12:], right=right)
        body += f"<details><summary>{len(rows) - 12} more</summary>{rest}</details>"
    return _card("By label", body, note="The labels found least often first.")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def _meter(share: float) -> str:
    width = 100 * min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    return f'<span class="meter"><i style="width:{width:.1f}%"></i></span>'


def _token(symbol: object, css: str = "") -> str:
    return f'<span class="tok {css}">{text(symbol)}</span>'


def _align(expected: Sequence[str], predicted: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Pairs of a cheapest edit: (a, a) kept, (a, b) replaced, (a, None) missing, (None, b) added."""
    n, m = len(expected), len(predicted)
    cost = [[i + j if i == 0 or j == 0 else 0 for j in range(m + 1)] for i in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            replaced = cost[i - 1][j - 1] + (expected[i - 1] != predicted[j - 1])
            cost[i][j] = min(replaced, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    pairs: list[tuple[str | None, str | None]] = []
    i, j = n, m
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (expected[i - 1] != predicted[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((expected[i], predicted[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((expected[i], None))
        else:
            j -= 1
            pairs.append((None, predicted[j]))
    return pairs[::-1]


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    rows = []
    for example in examples[:_MAX_EXAMPLES]:
        pairs = _align(example.expected[:_MAX_TOKENS], example.predicted[:_MAX_TOKENS])
        edits = sum(a != b for a, b in pairs)
        expected = "".join(_token(a, "del" if b is None else "") for a, b in pairs if a is not None)
        predicted = "".join(
            _token(b, "ins" if a is None else "sub" if a != b else "") for a, b in pairs if b is not None
        )
        sign = f'<span class="no">✕ {edits}</span>' if edits else '<span class="ok">✓</span>'
        given = "".join(map(_token, example.input[:_MAX_TOKENS]))
        rows.append([given, expected, predicted, sign])
    note = "Replaced labels are red, added ones yellow, missing ones struck out where they were expected."
    body = _table(["input", "expected", "predicted", "edits"], rows)
    return _section("Examples", [_card("Predictions", body, note=note, css="wide")])


def _time(given: ReportInput) -> str:
    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for event in given.events:
        if isinstance(event.get("time"), int | float) and math.isfinite(event["time"]):
            attempts.setdefault(int(event.get("attempt", 1)), []).append(event)
    if not attempts:
        return ""
    newest = max(attempts)
    spans = [_span(given, attempt, rows, is_newest=attempt == newest) for attempt, rows in sorted(attempts.items())]
    picture = span_chart(spans, label="Attempts over time with their events")
    note = "One row an attempt; small points are checkpoints and evaluations, large ones other events."
    large = [e for rows in attempts.values() for e in rows if str(e.get("event")) not in _SMALL_EVENTS]
    rows = [
        [
            text(_stamp(event["time"])),
            text(event.get("attempt", "")),
            f"<b>{text(event.get('event', ''))}</b>",
            text(_facts(event)),
        ]
        for event in sorted(large, key=lambda event: event["time"])[-_MAX_EVENTS:]
    ]
    numbers = _table(["time", "attempt", "event", "facts"], rows)
    num_more = sum(map(len, attempts.values())) - len(rows)
    more = f"<p class='none'>and {num_more:,} more in events.jsonl</p>" if num_more else ""
    return _section(
        "Attempts and events",
        [_card("Attempts", picture, note=note, css="wide"), _card("Events", numbers + more, css="wide")],
    )


def _facts(event: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in event.items() if key not in _FIXED_FIELDS)


def _span(given: ReportInput, attempt: int, events: Sequence[Mapping[str, Any]], *, is_newest: bool) -> Span:
    logged = [t for s in given.history.series.values() for t in _times_of(s, attempt)]
    times = [float(event["time"]) for event in events] + logged
    ends = [str(event.get("outcome", "")) for event in events if event.get("event") == "end"]
    outcome = ends[-1] if ends else "running" if is_newest and given.status == "running" else "lost"
    start_s, end_s = min(times), max(times)
    return Span(
        label=f"{attempt} {outcome}",
        start_s=start_s,
        end_s=end_s,
        tone=_TONES.get(outcome, "calm"),
        title=f"attempt {attempt}: {outcome} after {format_duration_s(end_s - start_s)}",
        points=[
            (
                float(event["time"]),
                f"{event.get('event', '')} at {_stamp(event['time'])}\n{_facts(event)}",
                str(event.get("event")) not in _SMALL_EVENTS,
            )
            for event in events
        ],
    )


def _times_of(series: Series, attempt: int) -> list[float]:
    own = [t for t, a in zip(series.times_s, series.attempts, strict=True) if a == attempt and math.isfinite(t)]
    return [min(own), max(own)] if own else []


def _between(low: int, high: int) -> str:
    return f"{low:,}" if high <= low + 1 else f"{low:,} to {high - 1:,}"


def _data(given: ReportInput) -> str:
    lengths = ""
    if given.lengths:
        num_rows = sum(rows for _, _, rows in given.lengths)
        bars = [
            Bar(
                name=f"{low:,}",
                value=rows,
                title=f"length {_between(low, high)}: {rows:,} rows ({100 * rows / max(1, num_rows):.1f} %)",
            )
            for low, high, rows in given.lengths
        ]
        picture = bar_chart(
            bars,
            label="Histogram of sequence lengths",
            unit="rows",
            x_label="length in time steps",
            last_edge=f"{given.lengths[-1][1]:,}",
        )
        lengths = _card("Sequence lengths", picture, note=f"{format_count(num_rows)} rows by length.")
    fill = ""
    if given.fill:
        bars = [Bar(name=name, value=share, title=f"{name}: fill {share:.1%}") for name, share in given.fill]
        picture = bar_chart(bars, label="Fill by length zone", unit="frames / slots", x_label="length zone", high=1.0)
        fill = _card("Fill by length zone", picture, note="The share of computed slots that hold a real time step.")
    return _section("Data", [lengths, fill])


def _flat(value: Any, at: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{at}.{key}" if at else str(key))]
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return [(at, shown)]


def _mono(value: str) -> str:
    return f"<code>{text(value)}</code>"


def _origin(given: ReportInput) -> str:
    plan = _card("Plan", f"<pre>{text(given.plan)}</pre>", css="wide") if given.plan else ""
    lineage = ""
    if given.lineage:
        rows = [[text(name), _mono(value)] for name, value in given.lineage.items()]
        lineage = _card("Lineage", _table(["what", "version or digest"], rows), css="wide")
    spec = ""
    if given.spec:
        pairs = _flat(given.spec)
        body = _table(["key", "value"], [[_mono(key), _mono(value)] for key, value in pairs])
        spec = _card("Job", f"<details><summary>{len(pairs)} settings</summary>{body}</details>", css="wide")
    return _section("Where it comes from", [plan, lineage, spec])
