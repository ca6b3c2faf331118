"""What each lane reads next where rows are streams: chunks of sequences that are laid end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from treadle.data import Batch, Form, Lease, Manifest, RowReader, ahead, read_pieces
from treadle.plan import StreamPlan, streams_of, trainable_rows
from treadle.spec import JobSpec
from treadle.train.carry import StreamMicro
from treadle.train.feed import Update, buffers_for, look_ahead, when_read
from treadle.train.world import World

__all__ = ["StreamFeed"]


class StreamFeed:
    """Training chunks of one rank's lanes, called like a `Feed`; the position is an argument, never hidden state.

    Args:
        spec: with `batch.streams`.
        manifest, reader: of the data set.
        lanes: shares of an update. world: the ranks that take them.
    """

    def __init__(self, spec: JobSpec, manifest: Manifest, reader: RowReader, *, lanes: int, world: World) -> None:
        self._spec = spec
        self._manifest = manifest
        self._reader = reader
        self._lanes = lanes
        self._world = world
        card = manifest.card("").splits["train"]
        trained = trainable_rows(card, spec.task)
        self._rows: NDArray[np.int64] = manifest.rows_of("train")[trained]
        self._lengths: NDArray[np.int64] = card.lengths_N[trained]
        self._buffers = buffers_for(world.device)

    def plan(self, epoch: int) -> StreamPlan:
        """The streams of an epoch over all ranks."""
        seed = self._spec.train.seed
        return streams_of(self._spec.batch, self._lengths, lanes=self._lanes, seed=seed, epoch=epoch)

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
        """Streams of all ranks together: what an update reads side by side."""
        return float(self.plan(0).num_streams)

    def rows_before(self, epoch: int, index: int) -> list[int]:
        """The rows of the update before this position, of all ranks: row numbers of the data set, ascending."""
        if not index:
            epoch -= 1
            index = self.plan(epoch).num_updates
        return self.rows_of(epoch, index - 1)

    def rows_of(self, epoch: int, index: int) -> list[int]:
        """The rows that the `index`-th update of an epoch reads a part of, of all ranks: ascending."""
        plan = self.plan(epoch)
        rows = [self._rows[plan.pieces(index, lane).rows_P] for lane in range(self._lanes)]
        return np.unique(np.concatenate(rows)).tolist()

    def largest(self) -> Batch:
        """As many rows as streams, of a chunk each, as far as they go: for probes."""
        streams = self._spec.batch.streams or 1
        longest = np.argsort(-self._lengths, kind="stable")[:streams]
        rows = np.resize(longest, streams)
        stops_B = np.minimum(self._lengths[rows], self._spec.batch.chunk)
        starts_B = np.zeros(streams, np.int64)
        return self._reader.batch(self._rows[rows], form=Form.packed, starts_B=starts_B, stops_B=stops_B)

    def _updates(self, epoch: int, index: int) -> Iterator[tuple[Update, Lease]]:
        while epoch < self._spec.train.epochs:
            plan, asked = self.plan(epoch), index
            for i in range(index, plan.num_updates):
                asked = self._look_ahead(plan, max(i, asked))
                lease = self._buffers.lease()
                yield self._update(plan, epoch, i, lease), lease
            epoch, index = epoch + 1, 0

    def _update(self, plan: StreamPlan, epoch: int, index: int, lease: Lease) -> Update:
        frames, ends = plan.update_frames(index), plan.update_ends(index)
        micros: list[StreamMicro] = []
        for lane in self._own_lanes:
            pieces = plan.pieces(index, lane)
            if len(pieces.rows_P):
                batch = read_pieces(self._reader, self._manifest, self._rows, pieces, lease=lease)
                # The loop hands a microbatch on without looking into it; a `Carry` knows what it is.
                micros.append(StreamMicro(number=0, lane=lane, batch=cast("Batch", batch), at=(epoch, index)))
        return Update(
            epoch=epoch,
            index=index,
            num_updates=plan.num_updates,
            frames=frames,
            rows=ends,
            weighted_frames=float(frames),
            weighted_rows=float(ends),
            micros=tuple(micros),
        )

    @property
    def _own_lanes(self) -> range:
        return range(self._world.rank, self._lanes, self._world.size)

    def _look_ahead(self, plan: StreamPlan, update: int) -> int:
        """Ask for the blocks of the next updates; gives the first that was not asked for."""

        def rows(update: int) -> NDArray[np.int64]:
            return self._rows[np.concatenate([plan.pieces(update, lane).rows_P for lane in self._own_lanes])]

        return look_ahead(self._reader, rows, update, plan.num_updates)
