"""Which trials a sweep has: its axes, their combinations, and draws from them. Pure; imports no Hydra.

`treadle.spec.compose.parse_sweep` reads the axes off overrides in Hydra's syntax. A point of a sweep is a text for each
axis, written as an override would write it, so that composing a trial is composing a job.
"""

from __future__ import annotations

import enum
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from treadle import wire

__all__ = [
    "Axis",
    "ChoiceAxis",
    "Exploit",
    "IntervalAxis",
    "Scheduler",
    "Search",
    "Space",
    "changed",
    "draw",
    "explore",
    "grid",
    "grid_size",
    "select",
    "words",
]

Values = dict[str, str]
T = TypeVar("T")

RESAMPLE_SHARE = 0.25
FACTORS = (0.8, 1.2)
QUANTILE = 0.25
_MAX_TRIES = 200


class Search(enum.Enum):
    """How points are chosen. pbt: a population that copies its best and changes its values while it trains."""

    grid = "grid"
    random = "random"
    optuna = "optuna"
    pbt = "pbt"


class Scheduler(enum.Enum):
    """Which trials end early. asha: those behind at an evaluation count of a geometric series."""

    none = "none"
    asha = "asha"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A key that trials set differently.

    Args:
        key: as an override names it. index: of its argument on the command line.
    """

    kind: ClassVar[str]
    key: str
    index: int


@dataclass(frozen=True, kw_only=True)
class ChoiceAxis(Axis):
    """One of several values, each as an override writes it, in order."""

    kind: ClassVar[str] = "choice"
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class IntervalAxis(Axis):
    """A number from `low` to `high`, evenly or evenly in its logarithm."""

    kind: ClassVar[str] = "interval"
    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def text(self, value: float) -> str:
        """`value`, within the bounds, in four digits or as a whole number: what is written is what is used."""
        rounded = round(value) if self.is_whole else float(f"{value:.4g}")
        low, high = (math.ceil(self.low), math.floor(self.high)) if self.is_whole else (self.low, self.high)
        return repr(type(rounded)(min(max(rounded, low), high)))

    def at(self, share: float) -> str:
        """The value a `share` (0 to 1) of the way."""
        if self.is_log:
            return self.text(math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low))))
        return self.text(self.low + share * (self.high - self.low))


@dataclass(frozen=True, kw_only=True)
class Space:
    """Everything that overrides with several values say.

    Args:
        arguments: the overrides as typed. axes: of those with several values, in order.
    """

    arguments: tuple[str, ...]
    axes: tuple[Axis, ...]

    @property
    def choices(self) -> tuple[ChoiceAxis, ...]:
        return tuple(axis for axis in self.axes if isinstance(axis, ChoiceAxis))

    @property
    def intervals(self) -> tuple[IntervalAxis, ...]:
        return tuple(axis for axis in self.axes if isinstance(axis, IntervalAxis))

    def overrides(self, values: Mapping[str, str]) -> list[str]:
        """The overrides of one trial, each at the place of its argument."""
        found = list(self.arguments)
        for axis in self.axes:
            found[axis.index] = f"{axis.key}={values[axis.key]}"
        return found


def grid(axes: Sequence[ChoiceAxis]) -> Iterator[Values]:
    """Every combination, the last axis fastest: the jobs of Hydra's own sweeper, in its order."""
    for texts in itertools.product(*(axis.texts for axis in axes)):
        yield {axis.key: text for axis, text in zip(axes, texts, strict=True)}


def grid_size(axes: Sequence[ChoiceAxis]) -> int:
    """How many `grid` gives."""
    return math.prod(len(axis.texts) for axis in axes)


def draw(axes: Sequence[Axis], num: int, *, seed: int) -> list[Values]:
    """At most `num` different points at random; fewer where there are no more."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    found: dict[tuple[str, ...], Values] = {}
    for _ in range(num + _MAX_TRIES):
        if len(found) == num:
            break
        values = {axis.key: _drawn(axis, rng) for axis in axes}
        found.setdefault(tuple(values.values()), values)
    return list(found.values())


def _drawn(axis: Axis, rng: random.Random) -> str:
    # random() alone keeps its stream from one Python to the next.
    if isinstance(axis, ChoiceAxis):
        return axis.texts[int(rng.random() * len(axis.texts))]
    assert isinstance(axis, IntervalAxis)
    return axis.at(rng.random())


def words(values: Mapping[str, str]) -> str:
    """A point in a line: `model.hidden_size=64 optim.lr=0.001`."""
    return " ".join(f"{key}={text}" for key, text in values.items())


def changed(record: T, values: Mapping[str, Any]) -> T:
    """A frozen record with other values at dotted keys; its classes check them again.

    Raises:
        IntegrityError: no such key, or a value that its class refuses.
    """
    body = wire.encode(record)
    for key, value in values.items():
        *parents, name = key.split(".")
        node = body
        for parent in parents:
            node = node[parent]
        node[name] = value
    return wire.decode(type(record), body, where="trial")


# ---- population-based training (Jaderberg et al. 2017, arXiv:1711.09846)


@dataclass(frozen=True, kw_only=True)
class Exploit:
    """Slot `slot` of a population goes on from the state of slot `donor`, with other values."""

    slot: int
    donor: int
    values: Values


def select(scores: Sequence[float], population: Sequence[Values], axes: Sequence[Axis], *, seed: int) -> list[Exploit]:
    """Truncation selection: each of the worst quarter goes on from one of the best, with values near its own.

    Source:
        Jaderberg et al. 2017, section 4.1: truncation selection with 20 %, perturbation by 0.8 or 1.2.

    Args:
        scores: of each slot, larger is better; -inf for one that failed, which is always replaced.
        seed: decides alike whenever it is asked again.
    """
    rng = random.Random(seed)  # noqa: S311
    order = sorted(range(len(scores)), key=lambda slot: (-scores[slot], slot))
    count = min(len(order) // 2, math.ceil(QUANTILE * len(order)))
    lost = [slot for slot in order if scores[slot] == -math.inf]
    donors = [slot for slot in order[:count] if slot not in lost]
    found = []
    for slot in sorted({*order[len(order) - count :], *lost}) if donors else ():
        donor = donors[int(rng.random() * len(donors))]
        if scores[donor] > scores[slot]:
            found.append(Exploit(slot=slot, donor=donor, values=explore(axes, population[donor], rng)))
    return found


def explore(axes: Sequence[Axis], values: Mapping[str, str], rng: random.Random) -> Values:
    """Values near `values`: numbers times 0.8 or 1.2, choices one place on; a quarter of them drawn anew."""
    found: Values = {}
    for axis in axes:
        is_new, is_up = rng.random() < RESAMPLE_SHARE, rng.random() < 0.5
        drawn = _drawn(axis, rng)
        if is_new:
            found[axis.key] = drawn
        elif isinstance(axis, ChoiceAxis):
            place = axis.texts.index(values[axis.key]) + (1 if is_up else -1)
            found[axis.key] = axis.texts[min(max(place, 0), len(axis.texts) - 1)]
        else:
            assert isinstance(axis, IntervalAxis)
            found[axis.key] = axis.text(float(values[axis.key]) * FACTORS[is_up])
    return found
