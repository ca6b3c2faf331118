"""Which trials are too far behind to go on: asynchronous successive halving, decided by Ray Tune's own scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from treadle.launch.sweeps.records import Asked
from treadle.launch.sweeps.results import Trial, score
from treadle.spec.sweeps import Scheduler

__all__ = ["Halving", "NoHalving", "build_halving"]

_SCORE, _TIME = "score", "evaluation"


@dataclass(frozen=True)
class _Named:
    """What the scheduler knows a trial by: its number, which outlives the process that runs the sweep."""

    trial_id: str


class NoHalving:
    """Every trial runs to its end, unless its metric is no number."""

    def is_behind(self, number: int, evaluation: int, value: float) -> bool:
        """Whether a trial is to stop after an evaluation."""
        return not math.isfinite(value)


class Halving:
    """ASHA over the evaluations of all trials, those of earlier attempts included.

    Source:
        Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (MLSys), in the variant of
        `ray.tune.schedulers.ASHAScheduler`: at rungs grace * reduction^k a trial stops that is not in the best
        1 / reduction of those that came there before it.

    Args:
        past: trials that were evaluated before; nothing is decided about them.
    """

    def __init__(self, asked: Asked, past: Iterable[Trial]) -> None:
        from ray.tune.schedulers import ASHAScheduler

        self._asked = asked
        self._asha: Any = ASHAScheduler(
            time_attr=_TIME,
            metric=_SCORE,
            mode="max",
            max_t=max(asked.evaluations, asked.grace),
            grace_period=asked.grace,
            reduction_factor=asked.reduction,
        )
        self._known: set[int] = set()
        rows = [(k, t.number, value) for t in past for k, (_, value) in enumerate(t.evaluations, start=1)]
        for evaluation, number, value in sorted(rows, key=lambda row: row[:2]):
            self.is_behind(number, evaluation, value)

    def is_behind(self, number: int, evaluation: int, value: float) -> bool:
        """Whether a trial is to stop after an evaluation."""
        found = score(value, larger_is_better=self._asked.larger_is_better)
        if found == -math.inf:
            return True
        trial = _Named(str(number))
        if number not in self._known:
            self._known.add(number)
            self._asha.on_trial_add(None, trial)
        decision = self._asha.on_trial_result(None, trial, {_TIME: evaluation, _SCORE: found})
        return decision == self._asha.STOP and evaluation < self._asked.evaluations


def build_halving(asked: Asked, past: Iterable[Trial]) -> Halving | NoHalving:
    """The rule that was asked for."""
    return Halving(asked, past) if asked.scheduler is Scheduler.asha else NoHalving()
