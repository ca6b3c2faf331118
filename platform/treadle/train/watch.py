"""What a run's evaluations say: the best so far, and for how long there was none better. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from treadle.errors import ConfigError
from treadle.spec import JobSpec, Keep, OptimSpec, Schedule, TrainSpec
from treadle.track import Direction, catalogue, headline_name

__all__ = ["Watch", "check_watched", "headline"]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The evaluations of a run so far.

    Args:
        best: headline metric of the best one; None before any was finite. best_update: after which update it was.
        stale: evaluations since without improvement. flat: the same, counted anew after each cut of the rate.
        cuts: how often `schedule=plateau` has lowered the rate.
    """

    best: float | None = None
    best_update: int = 0
    stale: int = 0
    flat: int = 0
    cuts: int = 0

    def after(self, value: float, update: int, *, spec: JobSpec) -> Watch:
        """The evaluations so far and one more, of `value` after `update` updates; what is not finite is the worst."""
        if self._is_better(value, spec):
            return replace(self, best=value, best_update=update, stale=0, flat=0)
        stale, flat = self.stale + 1, self.flat + 1
        if spec.optim.schedule is Schedule.plateau and flat > spec.optim.plateau_patience:
            return replace(self, stale=stale, flat=0, cuts=self.cuts + 1)
        return replace(self, stale=stale, flat=flat)

    def is_over(self, spec: TrainSpec) -> bool:
        """Whether training ends here, early."""
        return spec.patience is not None and self.stale >= spec.patience

    def is_best_at(self, update: int) -> bool:
        """Whether the evaluation after `update` updates is the best."""
        return self.best is not None and self.best_update == update

    def _is_better(self, value: float, spec: JobSpec) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        is_up = catalogue(spec.task)[f"val/{headline_name(spec.task)}"].good is Direction.up
        gain = value - self.best if is_up else self.best - value
        return gain > 0 and gain >= spec.train.min_delta


def headline(metrics: dict[str, float], spec: JobSpec) -> float:
    """The one number that says how good a network is, out of an evaluation's."""
    return metrics[headline_name(spec.task)]


def check_watched(train: TrainSpec, optim: OptimSpec, *, num_valid: int) -> None:
    """Nothing, where what goes by evaluations has any.

    Raises:
        ConfigError: early stopping, the best weights or `plateau` without validation rows.
    """
    wishes = {
        "train.patience": train.patience is not None,
        "train.keep": train.keep is Keep.best,
        "optim.schedule": optim.schedule is Schedule.plateau,
    }
    seen = {"train.patience": train.patience, "train.keep": "best", "optim.schedule": "plateau"}
    if not num_valid and (asked := [f"{key}: got {seen[key]}" for key, is_on in wishes.items() if is_on]):
        raise ConfigError(
            f"{'; '.join(asked)} without validation rows to go by, expected some",
            hint="split.valid=0.1",
        )
