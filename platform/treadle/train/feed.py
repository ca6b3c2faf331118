"""The microbatches of this rank, update by update, from any position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.data import Batch, Manifest, RowReader, ahead
from treadle.plan import EpochPlan, plan_epoch, trainable_rows
from treadle.spec import JobSpec
from treadle.train.world import World

__all__ = ["Feed", "Micro", "Update"]


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One microbatch and the place that keys its dropout, whatever rank it lands on."""

    number: int
    lane: int
    batch: Batch


@dataclass(frozen=True, kw_only=True)
class Update:
    """This rank's share of one update: the `index`-th of `num_updates` in `epoch`.

    Args:
        frames, rows: of all ranks together, as the plan says.
        micros: this rank's; none where there are fewer rows than lanes.
    """

    epoch: int
    index: int
    num_updates: int
    frames: int
    rows: int
    micros: tuple[Micro, ...]

    @property
    def is_last_of_epoch(self) -> bool:
        return self.index + 1 == self.num_updates


class Feed:
    """Training batches of one rank; the position is an argument, never hidden state."""

    def __init__(self, spec: JobSpec, manifest: Manifest, reader: RowReader, *, lanes: int, world: World) -> None:
        self._spec = spec
        self._reader = reader
        self._lanes = lanes
        self._world = world
        train = manifest.rows_of("train")
        rows = trainable_rows(manifest.card("").splits["train"], spec.task)
        self._rows: NDArray[np.int64] = train[rows]
        self._lengths = manifest.columns["length"][self._rows].astype(np.int64)

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of an epoch over all ranks."""
        return plan_epoch(self._lengths, self._spec.batch, lanes=self._lanes, seed=self._spec.train.seed, epoch=epoch)

    def starting_at(self, epoch: int, index: int) -> Iterator[Update]:
        """Updates from the `index`-th of `epoch` to the end of the last epoch, read one ahead."""
        return ahead(lambda: self._updates(epoch, index))

    def largest(self) -> Batch:
        """The microbatch with the most slots in epoch 0, for probes."""
        plan = self.plan(0)
        return self._reader.batch(self._rows[plan.lane_rows(*plan.largest)])

    def _updates(self, epoch: int, index: int) -> Iterator[Update]:
        while epoch < self._spec.train.epochs:
            plan = self.plan(epoch)
            for i in range(index, plan.num_updates):
                rows = np.concatenate([plan.round_rows(number) for number in plan.rounds_of(i)])
                yield Update(
                    epoch=epoch,
                    index=i,
                    num_updates=plan.num_updates,
                    frames=int(self._lengths[rows].sum()),
                    rows=len(rows),
                    micros=tuple(self._micros(plan, i)),
                )
            epoch, index = epoch + 1, 0

    def _micros(self, plan: EpochPlan, update: int) -> Iterator[Micro]:
        """This rank's lanes of the update's rounds; none where the round of the rest has no rows for them."""
        for number in plan.rounds_of(update):
            for lane in range(self._world.rank, self._lanes, self._world.size):
                rows = plan.lane_rows(number, lane)
                if len(rows):
                    yield Micro(number=number, lane=lane, batch=self._reader.batch(self._rows[rows]))
