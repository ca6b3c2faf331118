"""The learning-rate range test: a short training in which the rate only rises, and what its losses say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from treadle.errors import ConfigError, DivergenceError
from treadle.train.backward import counted, summed_loss
from treadle.train.gradients import summing
from treadle.train.optim import rate_scale
from treadle.train.run import Run
from treadle.train.split import Splitter

__all__ = ["Course", "Suggestion", "range_test", "rates_between", "smooth", "suggest"]

DIVERGED = 4.0
"""Times the best smoothed loss at which the test ends."""
SMOOTHING = 0.9
LEAST_UPDATES = 10


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a range test measured, update by update.

    Args:
        rates: `optim.lr` of each update, rising geometrically. losses: of its batch, before the update.
        smoothed: losses, as `smooth` gives them. why: the test ended: "diverged" or "end of the range".
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Rates that a course suggests.

    Args:
        steepest: where the smoothed loss falls fastest per factor of the rate.
        tenth: a tenth of the rate at which the smoothed loss is lowest: the largest that leaves a margin.
        lr: the smaller of both.
    """

    steepest: float
    tenth: float
    lr: float


def range_test(
    run: Run, *, low: float, high: float, num_updates: int, tell: Callable[[int, float, float], object] | None = None
) -> Course:
    """Train `run` while the rate rises from `low` to `high`; its network is worth nothing afterwards.

    Network, batches, loss, clipping and optimizer are the job's; only the course of the rate is not. The loss of a
    batch is that before its update, as in training.

    Source:
        Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186), section 3.3. A rate that
        rises geometrically, the smoothing and the end at four times the best loss are those of Gugger 2018, "How Do You
        Find A Good Learning Rate", and of fastai.

    Args:
        run: of one rank, at its beginning, with epochs enough for `num_updates` and no guard against spikes.
        tell: called with (updates made, rate, smoothed loss).

    Raises:
        DivergenceError: the first losses are not finite already.

    Cost: `num_updates` updates at most, each waited for.
    """
    rates = rates_between(low, high, num_updates)
    scale = rate_scale(run.spec.optim, run.feed.mean_rows)
    losses: list[float] = []
    why, state, splitter = "end of the range", run.start, Splitter()
    updates = run.feed.starting_at(state.epoch, state.index)
    with summing(run.world, run.network) as gradients:
        for rate, update in zip(rates, updates, strict=False):
            count = counted(run, update)
            run.network.train()
            loss = summed_loss(run, state, update, count, gradients=gradients, splitter=splitter)
            gradients.finish(())
            losses.append(float(loss) / count)
            run.updater.judge()
            run.updater.move(scale * rate)
            state = state.advanced(update.frames, run.updater.state, is_last_of_epoch=update.is_last_of_epoch)
            smoothed = smooth(losses)
            if tell is not None:
                tell(len(losses), rate, smoothed[-1])
            if _has_diverged(losses, smoothed):
                why = "diverged"
                break
    getattr(updates, "close", lambda: None)()
    if len(losses) < LEAST_UPDATES or not math.isfinite(losses[0]):
        raise DivergenceError(
            f"learning rates: the loss was lost at update {len(losses)}, at a rate of {rates[len(losses) - 1]:.3g}",
            hint=f"begin below {low:.3g}, or look at the data: treadle data explain",
        )
    return Course(rates=tuple(rates[: len(losses)]), losses=tuple(losses), smoothed=tuple(smooth(losses)), why=why)


def rates_between(low: float, high: float, num: int) -> list[float]:
    """`num` rates from `low` to `high`, each the same factor above the one before.

    Raises:
        ConfigError: not 0 < low < high, or too few.
    """
    if not 0 < low < high or not math.isfinite(high):
        raise ConfigError(f"rates: got {low:g} to {high:g}, expected a range above 0", hint="--from 1e-7 --to 10")
    if num < LEAST_UPDATES:
        raise ConfigError(f"--updates: got {num}, expected at least {LEAST_UPDATES}")
    return [low * (high / low) ** (i / (num - 1)) for i in range(num)]


def smooth(losses: Sequence[float], *, keep: float = SMOOTHING) -> list[float]:
    """The running mean of the losses, each new one with weight 1 - `keep`, corrected for its beginning at 0."""
    mean, found = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = keep * mean + (1 - keep) * loss
        found.append(mean / (1 - keep**number))
    return found


def _has_diverged(losses: Sequence[float], smoothed: Sequence[float]) -> bool:
    if not math.isfinite(losses[-1]):
        return True
    return len(smoothed) >= LEAST_UPDATES and smoothed[-1] > DIVERGED * min(smoothed) > 0


def suggest(course: Course) -> Suggestion | None:
    """Two rules on the smoothed loss, before it is lowest, and the more careful of both; None where it never falls.

    Source:
        Both rules: fastai's `lr_find` (`steep` and `minimum`; Howard and Gugger 2020, section 4.5). Taking the smaller
        is ours: `optim.lr` is the peak of a schedule here, which holds long after the test's few updates.
    """
    smoothed_N = np.array(course.smoothed, np.float64)
    smoothed_N[~np.isfinite(smoothed_N)] = np.inf
    lowest = int(smoothed_N.argmin())
    if lowest < 2:
        return None
    slopes_N = np.gradient(smoothed_N[: lowest + 1], np.log(course.rates[: lowest + 1]))
    if slopes_N.min() >= 0:
        return None
    steepest, tenth = course.rates[int(slopes_N.argmin())], course.rates[lowest] / 10
    return Suggestion(steepest=steepest, tenth=tenth, lr=float(f"{min(steepest, tenth):.2g}"))
