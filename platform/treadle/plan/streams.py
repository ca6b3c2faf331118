"""Sequences laid end to end in lanes, for language models and long recordings: the state goes on from update to update.

The sequences of an epoch are laid end to end in a keyed order and cut into `lanes * rows_per_lane` contiguous streams
of nearly equal length. An update reads the next frames of every stream, `chunk` at most and in all updates as many, but
for one: a last update of what is left over would weigh as much as the others. A lane holds the same streams
throughout, so a state carried from update to update belongs to the lane, whichever rank runs it.

Shape letters: N sequences, S streams, P pieces of an update in a lane.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError
from treadle.plan.order import Draw, keyed_order

__all__ = ["StreamPieces", "StreamPlan", "plan_streams"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPieces:
    """What a lane reads in one update: pieces of sequences, stream by stream, in the order of reading.

    Args:
        streams_P: 0 .. rows_per_lane - 1, the row of the lane's batch that a piece belongs to.
        rows_P, starts_P, stops_P: frames [start, stop) of a sequence.
        begins_P: whether the state starts anew at the piece: a sequence or an epoch begins there.
    """

    streams_P: Ints
    rows_P: Ints
    starts_P: Ints
    stops_P: Ints
    begins_P: NDArray[np.bool_]

    @property
    def frames(self) -> int:
        return int((self.stops_P - self.starts_P).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPlan:
    """The streams of one epoch: 12 bytes a sequence.

    Args:
        order_N: uint32, sequences as they are laid end to end.
        offsets: int64 [N + 1], where each of them begins.
        lanes: shares of an update. rows_per_lane: streams of a lane.
        chunk: most frames of a stream in one update.
    """

    order_N: NDArray[np.uint32]
    offsets: Ints
    lanes: int
    rows_per_lane: int
    chunk: int

    @property
    def num_streams(self) -> int:
        return self.lanes * self.rows_per_lane

    @property
    def frames(self) -> int:
        """Of the epoch."""
        return int(self.offsets[-1])

    @property
    def num_updates(self) -> int:
        """The same for all lanes; a stream that is a frame shorter may have nothing to read in the last update."""
        return -(-self.frames // (self.num_streams * self.chunk))

    @property
    def worst_frames(self) -> int:
        """Most frames of a lane in an update."""
        longest = -(-self.frames // self.num_streams)
        return self.rows_per_lane * -(-longest // self.num_updates)

    def span(self, update: int) -> tuple[int, int]:
        """The frames [start, stop) of each stream that an update reads, as far as it goes."""
        longest, updates = -(-self.frames // self.num_streams), self.num_updates
        return longest * update // updates, longest * (update + 1) // updates

    def stream_span(self, stream: int) -> tuple[int, int]:
        """The frames [start, stop) of a stream, counted over all sequences laid end to end."""
        return self.frames * stream // self.num_streams, self.frames * (stream + 1) // self.num_streams

    def pieces(self, update: int, lane: int) -> StreamPieces:
        """What a lane reads in an update. Cost: the same for every update."""
        if not 0 <= update < self.num_updates:
            raise IndexError(f"update {update} of {self.num_updates}")
        ends = [self.stream_span(lane * self.rows_per_lane + row) for row in range(self.rows_per_lane)]
        first, last = (np.array(end, np.int64) for end in zip(*ends, strict=True))
        start, stop = (np.minimum(first + bound, last) for bound in self.span(update))
        low = self.offsets.searchsorted(start, side="right") - 1
        counts = np.where(start < stop, self.offsets.searchsorted(stop) - low, 0)
        streams = np.repeat(np.arange(self.rows_per_lane), counts)
        before = np.cumsum(counts) - counts
        places = low[streams] + np.arange(len(streams)) - before[streams]
        origin = self.offsets[places]
        starts = np.maximum(start[streams], origin) - origin
        return StreamPieces(
            streams_P=streams,
            rows_P=self.order_N[places].astype(np.int64),
            starts_P=starts,
            stops_P=np.minimum(stop[streams], self.offsets[places + 1]) - origin,
            begins_P=(starts == 0) | (origin + starts == first[streams]),
        )

    def update_frames(self, update: int) -> int:
        """Frames of an update over all lanes."""
        # Of S streams, those that are a frame longer are as many as frames are left over.
        short, longer = divmod(self.frames, self.num_streams)
        done, until = self.span(update)
        each, more = (max(0, min(length, until) - done) for length in (short, short + 1))
        return each * (self.num_streams - longer) + more * longer

    def update_ends(self, update: int) -> int:
        """Sequences whose last frame is read in an update, over all lanes."""
        bounds = self.frames * np.arange(self.num_streams + 1) // self.num_streams
        start, stop = (np.minimum(bounds[:-1] + bound, bounds[1:]) for bound in self.span(update))
        return int((self.offsets.searchsorted(stop, "right") - self.offsets.searchsorted(start, "right")).sum())

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides who reads what when."""
        hasher = hashlib.sha256(f"{self.lanes},{self.rows_per_lane},{self.chunk}".encode())
        hasher.update(np.ascontiguousarray(self.order_N, "<u4").data)
        hasher.update(np.ascontiguousarray(self.offsets, "<i8").data)
        return hasher.hexdigest()


def plan_streams(
    lengths_N: NDArray[Any], *, lanes: int, rows_per_lane: int, chunk: int, seed: int, epoch: int
) -> StreamPlan:
    """The streams of `epoch`; every frame is read exactly once.

    Args:
        lengths_N: frames of each sequence, at least 1.
        lanes: shares of an update; a rank takes one or more.
        rows_per_lane: streams that a lane reads at once.
        chunk: most frames that an update reads of each stream, which gradients flow back through.
        seed, epoch: they decide the order of the sequences.

    Raises:
        ConfigError: no sequences, or fewer frames than streams. DataError: an empty sequence.
    """
    lengths = np.asarray(lengths_N)
    if not len(lengths):
        raise ConfigError("data: got no training rows, expected at least one")
    if (shortest := int(lengths.min())) < 1:
        raise DataError(f"row {int(lengths.argmin())}: got {shortest} frames, expected at least 1")
    order = keyed_order(Draw.streams, len(lengths), seed=seed, epoch=epoch)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths[order], out=offsets[1:])
    if offsets[-1] < lanes * rows_per_lane:
        raise ConfigError(
            f"batch.streams: got {lanes} x {rows_per_lane} streams, expected at most {offsets[-1]}, one a frame",
            hint="a smaller batch.streams, or fewer batch.lanes",
        )
    return StreamPlan(order_N=order, offsets=offsets, lanes=lanes, rows_per_lane=rows_per_lane, chunk=chunk)
