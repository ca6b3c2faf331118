"""What the store says of a sweep's trials: values, course, state, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treadle.launch.sweeps.records import Asked
from treadle.store import Blobs, Runs, RunState, RunStatus, read_journal
from treadle.store.sweeps import Member, MemberEnd, MemberState, Sweeps
from treadle.track import History, read_metrics

__all__ = ["Trial", "best_trial", "evaluations_of", "rank", "read_trials", "score", "trial_json"]

_OVER = frozenset(state.value for state in MemberState)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial as it stands.

    Args:
        state: finished, pruned, replaced or failed; else that of its run, which is to go on.
        evaluations: (update, value of the sweep's metric), ascending.
        best, last: of them, None without any. value: at the weights that become the model; trials compare by it.
        seconds: logged time of all its attempts.
    """

    number: int
    run: str
    values: dict[str, str]
    state: str
    reason: str
    evaluations: tuple[tuple[int, float], ...]
    best: float | None
    last: float | None
    value: float | None
    updates: int
    seconds: float
    model_version: int | None
    slot: int
    generation: int
    parent: str | None
    parent_update: int
    evaluations_before: int

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    def value_at(self, evaluation: int) -> float | None:
        """The value of its `evaluation`-th evaluation, those of its parent counted."""
        place = evaluation - self.evaluations_before - 1
        return self.evaluations[place][1] if 0 <= place < len(self.evaluations) else None


def read_trials(blobs: Blobs, sweep: str, asked: Asked) -> list[Trial]:
    """Every trial, by number."""
    runs = Runs(blobs)
    return [_trial(blobs, runs.status(m.run), m, end, asked) for m, end in Sweeps(blobs).members(sweep)]


def _trial(blobs: Blobs, status: RunStatus, member: Member, end: MemberEnd | None, asked: Asked) -> Trial:
    history = read_metrics(read_journal(blobs, f"runs/{member.run}/metrics.jsonl"))
    evaluations = evaluations_of(history, asked.metric)
    values = [value for _, value in evaluations]
    finite = [value for value in values if math.isfinite(value)]
    state = end.state.value if end is not None else status.state.value
    if status.state is RunState.finished:  # it ended before it was to be stopped
        state = MemberState.finished.value
    error = (status.end.error if status.end is not None else None) or {}
    return Trial(
        number=member.number,
        run=member.run,
        values=asked.ordered(member.values),
        state=state,
        reason=str(error.get("message") or (end.reason if end is not None else "")),
        evaluations=evaluations,
        best=(max if asked.larger_is_better else min)(finite, default=None),
        last=values[-1] if values else None,
        value=_kept_value(history, evaluations, asked),
        updates=max(status.update, int(history.last("trainer/update") or 0)),
        seconds=_seconds(history),
        model_version=status.end.model_version if status.end is not None else None,
        slot=member.slot,
        generation=member.generation,
        parent=member.parent,
        parent_update=member.parent_update,
        evaluations_before=member.evaluations_before,
    )


def _kept_value(history: History, evaluations: tuple[tuple[int, float], ...], asked: Asked) -> float | None:
    if not evaluations:
        return None
    kept = evaluations_of(history, asked.kept_by) if asked.kept_by else ()
    if not kept:
        return evaluations[-1][1]
    at, _ = max(kept, key=lambda row: score(row[1], larger_is_better=asked.kept_larger))  # the first of equals
    return dict(evaluations).get(at)


def evaluations_of(history: History, metric: str) -> tuple[tuple[int, float], ...]:
    """(update, value) of every evaluation that counts."""
    series = history.series.get(metric)
    return tuple(zip(series.updates, series.values, strict=True)) if series is not None else ()


def _seconds(history: History) -> float:
    """First to last row of each attempt, added up."""
    spans: dict[int, list[float]] = {}
    for series in history.series.values():
        for attempt, time_s in zip(series.attempts, series.times_s, strict=True):
            spans.setdefault(attempt, []).append(time_s)
    return sum(max(times) - min(times) for times in spans.values())


def score(value: float | None, *, larger_is_better: bool) -> float:
    """`value` so that larger is better; -inf for none, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if larger_is_better else -value


def rank(trials: Sequence[Trial], asked: Asked) -> list[Trial]:
    """The best first."""
    return sorted(trials, key=lambda t: (-score(t.value, larger_is_better=asked.larger_is_better), t.number))


def best_trial(trials: Sequence[Trial], asked: Asked) -> Trial | None:
    """The best of those that finished, and so have a model; None where none did."""
    done = [t for t in rank(trials, asked) if t.state == MemberState.finished.value and t.model_version is not None]
    return done[0] if done and score(done[0].value, larger_is_better=asked.larger_is_better) > -math.inf else None


def trial_json(trial: Trial) -> Mapping[str, Any]:
    """A trial in the answer of a verb."""
    names = (
        "number",
        "run",
        "values",
        "state",
        "reason",
        "best",
        "last",
        "value",
        "updates",
        "seconds",
        "model_version",
        "parent",
    )
    return {name: getattr(trial, name) for name in names}
