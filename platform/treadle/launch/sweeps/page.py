"""A sweep as one HTML page: what was set, what came of it, and how. Nothing is loaded from elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from treadle.launch.sweeps.records import Asked, FrozenSweep
from treadle.launch.sweeps.results import Trial, best_trial, rank
from treadle.spec.sweeps import Axis, ChoiceAxis, IntervalAxis, Scheduler, words
from treadle.store.sweeps import MemberState, SweepRecord
from treadle.track.parallel import Coordinate, Strand, parallel_chart
from treadle.track.style import STYLE
from treadle.track.svg import Line, line_chart, number, text
from treadle.units import format_duration_s

__all__ = ["HEADERS", "sweep_page", "table_rows"]

HEADERS = ("trial", "last", "best", "updates", "time", "state", "run")
"""Of the table of results; the keys of the axes stand after the first."""
_MOST_CURVES = 24


def table_rows(trials: Sequence[Trial], asked: Asked) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows of the results, the best first."""
    keys = [axis.key for axis in asked.axes]
    rows = [
        [
            t.number,
            *(t.values.get(key, "") for key in keys),
            t.last,
            t.best,
            t.updates,
            format_duration_s(t.seconds),
            t.state,
            t.run,
        ]
        for t in rank(trials, asked)
    ]
    return [HEADERS[0], *keys, *HEADERS[1:]], rows


def sweep_page(record: SweepRecord, frozen: FrozenSweep, trials: Sequence[Trial]) -> str:
    """The whole page; every text is escaped."""
    asked, best = frozen.asked, best_trial(trials, frozen.asked)
    parts = [_head(record, asked, trials), _tiles(record, asked, trials, best), _coordinates(asked, trials, best)]
    parts += [_curves(asked, trials), _table(trials, asked, best)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(record.job)} · {text(record.sweep)}</title>",
            f"<style>{STYLE}</style></head><body><main>",
            *parts,
            f"<footer>Written by treadle sweep --show {text(record.sweep)}. One file, no scripts.</footer>",
            "</main></body></html>\n",
        ]
    )


def _head(record: SweepRecord, asked: Asked, trials: Sequence[Trial]) -> str:
    early = "" if asked.scheduler is Scheduler.none else f", {asked.scheduler.value} from evaluation {asked.grace} on"
    facts = {
        "sweep": record.sweep,
        "search": f"{asked.search.value}{early}",
        "seed": str(asked.seed),
        "at once": str(asked.parallel),
        "submitted": record.created_at,
    }
    shown = "".join(f"<span>{text(name)} <b>{text(value)}</b></span>" for name, value in facts.items())
    states = ", ".join(f"{count} {state}" for state, count in _counts(trials).items())
    good = "smaller" if not asked.larger_is_better else "larger"
    summary = f"{len(trials)} trials ({states}) by {asked.metric}, {good} is better: {' '.join(asked.arguments)}"
    return f'<header><h1>{text(record.job)}</h1><p>{text(summary)}</p><div class="facts">{shown}</div></header>'


def _counts(trials: Iterable[Trial]) -> dict[str, int]:
    found: dict[str, int] = {}
    for trial in trials:
        found[trial.state] = found.get(trial.state, 0) + 1
    return found


def _tiles(record: SweepRecord, asked: Asked, trials: Sequence[Trial], best: Trial | None) -> str:
    if best is None or best.value is None:
        return ""
    updates = sum(trial.updates for trial in trials)
    tiles = [
        (asked.metric, number(best.value), f"trial {best.number}, {record.job}@{best.model_version}"),
        *((key, value, "of the best trial") for key, value in best.values.items()),
        ("updates", f"{updates:,}", "of all trials together"),
    ]
    shown = (
        f'<div class="tile{"" if i else " first"}"><div class="name">{text(name)}</div>'
        f'<div class="value">{text(value)}</div><div class="note">{text(note)}</div></div>'
        for i, (name, value, note) in enumerate(tiles)
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _coordinates(asked: Asked, trials: Sequence[Trial], best: Trial | None) -> str:
    values = [t.value for t in trials if t.value is not None and math.isfinite(t.value)]
    axes = [_coordinate(axis) for axis in asked.axes]
    low, high = min(values, default=0.0), max(values, default=1.0)
    axes.append(Coordinate(label=asked.metric, low=low, high=high, is_log=low > 0 and high / low > 20))
    strands = []
    for trial in trials:
        is_known = trial.value is not None and math.isfinite(trial.value)
        tone = "first" if trial is best else "whole" if trial.state == MemberState.finished.value else "faint"
        shown = f"trial {trial.number}, {trial.state}: {words(trial.values)}"
        told = f"{shown}\n{asked.metric} {number(trial.value)}" if is_known and trial.value is not None else shown
        row = (*(trial.values.get(axis.key) for axis in asked.axes), trial.value if is_known else None)
        strands.append(Strand(values=row, title=told, tone=tone))
    chart = parallel_chart(axes, strands, label=f"{asked.metric} by {', '.join(axis.key for axis in asked.axes)}")
    note = "One line a trial, to the metric of its last evaluation. In colour: the best. Faint: ended early."
    return f'<h2>Trials</h2><section class="card wide"><p>{text(note)}</p>{chart}</section>'


def _coordinate(axis: Axis) -> Coordinate:
    if isinstance(axis, ChoiceAxis):
        return Coordinate(label=axis.key, names=axis.texts)
    assert isinstance(axis, IntervalAxis)
    return Coordinate(label=axis.key, low=axis.low, high=axis.high, is_log=axis.is_log)


def _curves(asked: Asked, trials: Sequence[Trial]) -> str:
    shown = [trial for trial in rank(trials, asked) if trial.evaluations][:_MOST_CURVES]
    if not shown:
        return ""
    lines = [
        Line(label=f"trial {t.number}", xs=[u for u, _ in t.evaluations], ys=[v for _, v in t.evaluations])
        for t in shown
    ]
    chart = line_chart(lines, label=f"{asked.metric} over updates", unit="")
    legend = "".join(f'<span><i class="s{i}"></i>trial {t.number}</span>' for i, t in enumerate(shown[:6]))
    note = "The best six have their own colours; the others repeat them." if len(shown) > 6 else ""
    curves = f'<p>{note}</p><div class="legend">{legend}</div>{chart}'
    best = f"<p>By the number of trials begun.</p>{_best_so_far(asked, trials)}"
    return (
        f'<h2>Course</h2><div class="grid2"><section class="card"><h3>{text(asked.metric)}</h3>{curves}</section>'
        f'<section class="card"><h3>Best so far</h3>{best}</section></div>'
    )


def _best_so_far(asked: Asked, trials: Sequence[Trial]) -> str:
    choose = max if asked.larger_is_better else min
    known = [(t.number, t.value) for t in trials if t.value is not None and math.isfinite(t.value)]
    best = list(itertools.accumulate((value for _, value in known), choose))
    line = Line(label="best so far", xs=[number for number, _ in known], ys=best)
    return line_chart([line], label=f"best {asked.metric} over trials", unit="", x_label="trial")


def _table(trials: Sequence[Trial], asked: Asked, best: Trial | None) -> str:
    headers, rows = table_rows(trials, asked)
    right = {i for i, name in enumerate(headers) if name in ("trial", "last", "best", "updates", "time")}
    css = [' class="num"' if i in right else "" for i in range(len(headers))]
    head = "".join(f"<th{css[i]}>{text(name)}</th>" for i, name in enumerate(headers))
    body = []
    for row in rows:
        is_best = best is not None and row[0] == best.number
        cells = (_cell(value, is_bold=is_best) for value in row)
        body.append("<tr>" + "".join(f"<td{css[i]}>{cell}</td>" for i, cell in enumerate(cells)) + "</tr>")
    ends = [t for t in rank(trials, asked) if t.reason]
    reasons = "".join(f"<li>trial {t.number}, {text(t.state)}: {text(t.reason)}</li>" for t in ends)
    why = f"<details><summary>why {len(ends)} ended early</summary><ul>{reasons}</ul></details>" if ends else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<h2>Results</h2><section class="card wide"><div class="scroll">{table}</div>{why}</section>'


def _cell(value: Any, *, is_bold: bool) -> str:
    shown = "-" if value is None else number(value) if isinstance(value, int | float) else str(value)
    return f"<b>{text(shown)}</b>" if is_bold else text(shown)
