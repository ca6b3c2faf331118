"""A frozen sweep: everything that was decided before its first trial, as it stands in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle import wire
from treadle.plan import Capacity, Plan
from treadle.spec import JobSpec
from treadle.spec.sweeps import Axis, Scheduler, Search
from treadle.store import Blobs
from treadle.store.sweeps import SweepRecord, Sweeps

__all__ = ["Asked", "Candidate", "FrozenSweep", "freeze_sweep", "plain", "read_sweep"]

_SWEEP = ("sweep-spec", 1)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a sweep goes about it.

    Args:
        job: as it was named. arguments: overrides as they were typed. axes: what they say.
        metric: a logged name; larger_is_better: how two trials compare by it.
        trials: most of them; of a population its size. parallel: at once.
        grace: evaluations before a trial may be stopped. reduction: one in so many goes on, at each rung.
        interval: evaluations between two exploits of a population.
        evaluations: of the longest trial.
        kept_by: the metric whose best evaluation gives the model (`train.keep=best`), "" where the last update does.
        kept_larger: whether larger is better there.
    """

    job: str
    arguments: tuple[str, ...]
    axes: tuple[Axis, ...]
    search: Search
    scheduler: Scheduler
    metric: str
    larger_is_better: bool
    trials: int
    parallel: int
    seed: int
    grace: int
    reduction: int
    interval: int
    evaluations: int
    kept_by: str = ""
    kept_larger: bool = False

    def ordered(self, values: Mapping[str, str]) -> dict[str, str]:
        """The values of a trial in the order of the axes, which JSON forgets."""
        return {axis.key: values[axis.key] for axis in self.axes}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A composed and planned point of the sweep; where a search proposes numbers, they replace those in `spec`."""

    values: dict[str, str]
    spec: JobSpec
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class FrozenSweep:
    """What is asked, the points it was composed for, and the share of the place that each trial has."""

    asked: Asked
    candidates: tuple[Candidate, ...]
    capacity: Capacity

    @property
    def is_direct(self) -> bool:
        """Whether trials of one worker each run inside Ray Tune; else each is a submission of its own."""
        return all(candidate.spec.cluster.workers <= 1 for candidate in self.candidates)

    @property
    def first(self) -> JobSpec:
        """A spec, for what all trials have in common."""
        return self.candidates[0].spec


def freeze_sweep(sweep: FrozenSweep) -> bytes:
    """spec.json."""
    return wire.record(*_SWEEP, sweep)


def read_sweep(blobs: Blobs, record: SweepRecord) -> FrozenSweep:
    """The sweep as submitted.

    Raises:
        IntegrityError: it is not what was submitted.
    """
    where = f"sweeps/{record.sweep}/spec.json"
    return wire.unrecord(FrozenSweep, Sweeps(blobs).spec(record), kind=_SWEEP[0], schema=_SWEEP[1], where=where)


def plain(text: str) -> Any:
    """The JSON value of an override's text: a number, true, null, else the text."""
    try:
        return wire.parse_json(text, where="value")
    except Exception:
        return text
