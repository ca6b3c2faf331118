"""The microbatches of this rank, update by update, from any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.data import Batch, Buffers, Form, Lease, Manifest, RowReader, ahead
from treadle.data.load.augment import augment_batch
from treadle.plan import EpochPlan, class_repeats, plan_epoch, trainable_rows
from treadle.spec import AugmentSpec, JobSpec, Parallel, TargetPer
from treadle.train.task import Task
from treadle.train.world import World

__all__ = ["Feed", "Micro", "Update", "buffers_for", "look_ahead", "when_read"]

_LOOKED_AHEAD = 8
"""Updates whose blocks are asked for before they are needed, where a store is far away."""


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One microbatch and the place that keys its dropout, whatever rank it lands on.

    Args:
        piece, num_pieces: which part of its rows it holds, where they are too long to be read at once; the state is
            carried from one to the next.
        part: which part of its rows it holds, where memory was too small for all of them at once.
    """

    number: int
    lane: int
    batch: Batch
    piece: int = 0
    num_pieces: int = 1
    part: int = 0


@dataclass(frozen=True, kw_only=True)
class Update:
    """This rank's share of one update: the `index`-th of `num_updates` in `epoch`.

    Its batches lie in memory that is used again as soon as the next update is asked for.

    Args:
        frames, rows: of all ranks together, as the plan says.
        weighted_frames, weighted_rows: the same, each row counted by its weight: what a summed loss is divided by.
        micros: this rank's; none where there are fewer rows than lanes.
        passes: microbatches of the rank that has most, where all ranks run the network together; else 0.
    """

    epoch: int
    index: int
    num_updates: int
    frames: int
    rows: int
    weighted_frames: float
    weighted_rows: float
    micros: tuple[Micro, ...]
    passes: int = 0

    @property
    def is_last_of_epoch(self) -> bool:
        return self.index + 1 == self.num_updates


class Feed:
    """Training batches of one rank; the position is an argument, never hidden state.

    Args:
        spec: with a number of slots.
        manifest, reader: of the data set.
        lanes: shares of a round. world: the ranks that take them.
        form: packed, where the network takes that without laying it out anew.
        task: says what each row counts; rows count their own weight where there is none.
    """

    def __init__(
        self,
        spec: JobSpec,
        manifest: Manifest,
        reader: RowReader,
        *,
        lanes: int,
        world: World,
        form: Form = Form.padded,
        task: Task | None = None,
    ) -> None:
        self._spec = spec
        self._manifest = manifest
        self._reader = reader
        self._lanes = lanes
        self._world = world
        self._form = form
        card = manifest.card("").splits["train"]
        trained = trainable_rows(card, spec.task)
        self._rows: NDArray[np.int64] = manifest.rows_of("train")[trained]
        self._lengths: NDArray[np.uint32] = card.lengths_N[trained].astype(np.uint32)
        weights, labels = card.weights_N[trained], card.labels_N[trained]
        weights_N = weights.astype(np.float64) if task is None else task.row_weights(weights, labels)
        self._weights = None if (weights_N == 1).all() else (weights_N * self._lengths, weights_N)
        self._repeats = class_repeats(labels, spec.batch)
        self._buffers = buffers_for(world.device)

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of an epoch over all ranks."""
        return plan_epoch(
            self._lengths,
            self._spec.batch,
            lanes=self._lanes,
            seed=self._spec.train.seed,
            epoch=epoch,
            repeats_N=self._repeats,
        )

    def starting_at(self, epoch: int, index: int, *, depth: int = 2) -> Iterator[Update]:
        """Updates from the `index`-th of `epoch` to the end of the last epoch, read at most `depth` ahead."""
        updates = ahead(lambda: self._updates(epoch, index), depth=depth)
        try:
            for update, lease in updates:
                yield update
                lease.release(when_read(self._world.device))
        finally:
            updates.close()  # type: ignore[attr-defined]  a generator

    @property
    def mean_rows(self) -> float:
        """Rows of an update of all ranks together, on average over the first epoch."""
        plan = self.plan(0)
        return sum(plan.update_rows(i) for i in range(plan.num_updates)) / plan.num_updates

    def rows_before(self, epoch: int, index: int) -> list[int]:
        """The rows of the update before this position, of all ranks: row numbers of the data set, ascending."""
        while not index:
            epoch -= 1
            index = self.plan(epoch).num_updates
        return self.rows_of(epoch, index - 1)

    def rows_of(self, epoch: int, index: int) -> list[int]:
        """The rows of the `index`-th update of an epoch, of all ranks: row numbers of the data set, ascending."""
        plan = self.plan(epoch)
        places = [(number, lane) for number in plan.rounds_of(index) for lane in range(self._lanes)]
        rows = [self._rows[plan.lane_rows(*place)] for place in places if len(plan.lane_rows(*place))]
        return np.sort(np.concatenate(rows)).tolist()

    def largest(self) -> Batch:
        """The microbatch with the most slots in epoch 0, for probes."""
        plan = self.plan(0)
        return self._micros(plan, [plan.largest], 0, None)[0].batch

    def _updates(self, epoch: int, index: int) -> Iterator[tuple[Update, Lease]]:
        while epoch < self._spec.train.epochs:
            plan, asked = self.plan(epoch), index
            for i in range(index, plan.num_updates):
                asked = self._look_ahead(plan, max(i, asked))
                frames, rows = plan.update_frames(i), plan.update_rows(i)
                weighted_frames, weighted_rows = self._weighted(plan, i, frames, rows)
                lease = self._buffers.lease()
                update = Update(
                    epoch=epoch,
                    index=i,
                    num_updates=plan.num_updates,
                    frames=frames,
                    rows=rows,
                    weighted_frames=weighted_frames,
                    weighted_rows=weighted_rows,
                    micros=tuple(self._micros(plan, self._places(plan, i), epoch, lease)),
                    passes=self._passes(plan, i),
                )
                yield update, lease
            epoch, index = epoch + 1, 0

    def _places(self, plan: EpochPlan, update: int) -> list[tuple[int, int]]:
        """(round, lane) of this rank's microbatches; none where the round of the rest has no rows for them."""
        lanes = range(self._world.rank, self._lanes, self._world.size)
        places = [(number, lane) for number in plan.rounds_of(update) for lane in lanes]
        return [place for place in places if len(plan.lane_rows(*place))]

    def _passes(self, plan: EpochPlan, update: int) -> int:
        if self._spec.cluster.parallel is Parallel.data:
            return 0
        has_rows_GL = plan.rows_GL[plan.rounds_of(update)] > 0
        return max(int(has_rows_GL[:, rank :: self._world.size].sum()) for rank in range(self._world.size))

    def _micros(self, plan: EpochPlan, places: list[tuple[int, int]], epoch: int, lease: Lease | None) -> list[Micro]:
        whole = [place for place in places if plan.pieces(place[0]) == 1]
        parts = [self._rows[plan.lane_rows(*place)] for place in whole]
        steps = [plan.steps(*place) for place in whole] if self._spec.batch.multiple_of > 1 else [0] * len(whole)
        found = self._reader.batches(parts, form=self._form, steps=steps, lease=lease) if parts else []
        by_place = dict(zip(whole, found, strict=True))
        micros: list[Micro] = []
        for number, lane in places:
            if (number, lane) in by_place:
                batch = self._augmented(by_place[number, lane], epoch)
                micros.append(Micro(number=number, lane=lane, batch=batch))
            else:
                micros.extend(self._pieces(plan, number, lane, epoch, lease))
        return micros

    def _pieces(self, plan: EpochPlan, number: int, lane: int, epoch: int, lease: Lease | None) -> Iterator[Micro]:
        """The pieces of one row, first to last."""
        rows_B = self._rows[plan.lane_rows(number, lane)]
        num_pieces = plan.pieces(number)
        for piece in range(num_pieces):
            start, stop = plan.piece_span(number, lane, piece)
            if stop == start:
                continue
            starts_B, stops_B = np.array([start]), np.array([stop])
            batch = self._reader.batch(
                rows_B,
                form=self._form,
                starts_B=starts_B,
                stops_B=stops_B,
                steps=plan.limit.padded(stop - start),
                lease=lease,
            )
            batch = self._augmented(batch, epoch, starts_B)
            yield Micro(number=number, lane=lane, batch=batch, piece=piece, num_pieces=num_pieces)

    def _augmented(self, batch: Batch, epoch: int, starts_B: NDArray[np.int64] | None = None) -> Batch:
        if self._spec.augment == AugmentSpec():
            return batch
        return augment_batch(
            batch,
            self._spec.augment,
            self._manifest.preprocessing,
            seed=self._spec.train.seed,
            epoch=epoch,
            per_frame=self._manifest.header.content.target_per is TargetPer.frame,
            multiple_of=self._spec.batch.multiple_of,
            starts_B=starts_B,
        )

    def _weighted(self, plan: EpochPlan, update: int, frames: int, rows: int) -> tuple[float, float]:
        """(frames, rows) of an update over all ranks, each row counted by its weight."""
        if self._weights is None:
            return float(frames), float(rows)
        weighted_frames, weighted_rows = (plan.update_sum(update, values_N) for values_N in self._weights)
        return weighted_frames, weighted_rows

    def _look_ahead(self, plan: EpochPlan, update: int) -> int:
        """Ask for the blocks of the next updates; gives the first that was not asked for."""

        def rows(update: int) -> NDArray[np.int64]:
            found = [plan.lane_rows(*place) for place in self._places(plan, update)]
            return self._rows[np.concatenate(found)] if found else self._rows[:0]

        return look_ahead(self._reader, rows, update, plan.num_updates)


def look_ahead(reader: RowReader, rows_of: Callable[[int], NDArray[np.int64]], update: int, num_updates: int) -> int:
    """Ask for the blocks of the updates from `update` on, as far as is worth it; gives the first not asked for.

    Args:
        rows_of: the rows of the data set that this rank reads for an update.
    """
    last = min(update + _LOOKED_AHEAD, num_updates)
    while reader.is_far and update < last:
        rows = rows_of(update)
        update += 1
        if len(rows) and not reader.expect(rows):
            break
    return update


def buffers_for(device: torch.device) -> Buffers:
    """Memory that batches are laid out in, such that `device` reads it while the host goes on."""
    return Buffers(_pinned) if device.type == "cuda" else Buffers()


def when_read(device: torch.device) -> Callable[[], Any] | None:
    """Waits until `device` has read the batches of the update that was just made; None where it has already."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _pinned(num_bytes: int) -> NDArray[np.uint8]:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
