"""Batches of streams: what each lane reads next of sequences that are laid end to end, the state carried along.

Shape letters: P pieces of sequences, B streams that have frames left, N frames of all streams laid end to end, C
channels that a model reads, K values of a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.load.batch import Form
from treadle.data.load.buffers import Lease
from treadle.data.load.reader import RowReader
from treadle.data.manifest import Manifest
from treadle.data.order import starts_of
from treadle.plan import StreamPieces, StreamPlan
from treadle.spec import TargetPer

__all__ = ["StreamBatch", "read_pieces", "read_streams"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamBatch:
    """What a lane reads in one update.

    Args:
        inputs: packed int64 [N] of symbols, or float32 [N, C] of frames, stream by stream.
        streams_B: which streams of the lane have frames: all but in the last update. Rows of a carried state.
        lengths_B: frames of each of them.
        starts_N: True at frames before which the state restarts.
        next_N: the symbol after each one in its sequence, -1 after the last; None where inputs are frames.
        labels_N: the label of each frame, -1 for none; None where targets are not labels of frames.
        values_NK: the values of each frame, NaN for none; None where targets are not values of frames.
        gaps_N: time since the frame before; None without times.
    """

    inputs: NDArray[Any]
    streams_B: Ints
    lengths_B: Ints
    starts_N: NDArray[np.bool_]
    next_N: Ints | None
    labels_N: Ints | None
    values_NK: NDArray[np.float32] | None
    gaps_N: NDArray[np.float32] | None

    @property
    def frames(self) -> int:
        return len(self.starts_N)

    @property
    def slots(self) -> int:
        """The same: nothing is padded."""
        return len(self.starts_N)

    @property
    def form(self) -> Form:
        return Form.packed

    def part(self, first: int, stop: int) -> StreamBatch:
        """The `first`-th to below the `stop`-th of its streams; views, no copies."""
        bounds = starts_of(self.lengths_B)
        frames = slice(int(bounds[first]), int(bounds[stop]))
        of_frames = {name: getattr(self, name) for name in ("next_N", "labels_N", "values_NK", "gaps_N")}
        return StreamBatch(
            inputs=self.inputs[frames],
            streams_B=self.streams_B[first:stop],
            lengths_B=self.lengths_B[first:stop],
            starts_N=self.starts_N[frames],
            **{name: None if values is None else values[frames] for name, values in of_frames.items()},
        )


def read_streams(
    reader: RowReader, manifest: Manifest, rows_R: Ints, plan: StreamPlan, lanes: range, *, start: int = 0
) -> Iterator[list[StreamBatch | None]]:
    """What these lanes read, update by update, from update `start` to the end of the epoch.

    Args:
        rows_R: row number in the data set of each sequence of the plan.
        lanes: those of a rank; there is an element for each, None where a lane has no frames left.
    """
    for update in range(start, plan.num_updates):
        pieces = [plan.pieces(update, lane) for lane in lanes]
        yield [read_pieces(reader, manifest, rows_R, part) if len(part.rows_P) else None for part in pieces]


def read_pieces(
    reader: RowReader, manifest: Manifest, rows_R: Ints, pieces: StreamPieces, *, lease: Lease | None = None
) -> StreamBatch:
    """The batch of these pieces, one or more.

    Args:
        rows_R: row number in the data set of each sequence that pieces name.
        lease: memory that is used again, for inputs and next symbols; fresh where there is none.
    """
    numbers_P = rows_R[pieces.rows_P]
    counts_P = pieces.stops_P - pieces.starts_P
    # One symbol more of each piece, where its sequence goes on: what is to be predicted after its last.
    goes_on_P = pieces.stops_P < manifest.columns["length"][numbers_P]
    more_P = goes_on_P.astype(np.int64) if manifest.preprocessing.symbols else np.zeros(len(counts_P), np.int64)
    stops_P = pieces.stops_P + more_P
    read = reader.batch(numbers_P, form=Form.packed, starts_B=pieces.starts_P, stops_B=stops_P, lease=lease)
    kept_P = starts_of(counts_P)
    starts_N = np.zeros(int(kept_P[-1]), np.bool_)
    starts_N[kept_P[:-1]] = pieces.begins_P
    streams_B, at_B = np.unique(pieces.streams_P, return_index=True)
    inputs, next_N, gaps_N = read.inputs, None, read.gaps
    if read.inputs.ndim == 1:
        place_N = np.arange(len(starts_N)) + np.repeat(starts_of(more_P)[:-1], counts_P)
        inputs, next_N = _taken(read.inputs, place_N, lease), _taken(read.inputs, place_N + 1, lease)
        next_N[kept_P[1:][~goes_on_P] - 1] = -1
        gaps_N = None if read.gaps is None else read.gaps[place_N]
    per_frame = manifest.header.content.target_per is TargetPer.frame
    kept_PT = np.arange(int(read.lengths_B.max())) < counts_P[:, None]
    return StreamBatch(
        inputs=inputs,
        streams_B=streams_B,
        lengths_B=np.add.reduceat(counts_P, at_B),
        starts_N=starts_N,
        next_N=next_N,
        labels_N=read.labels_BU[kept_PT] if per_frame and read.values is None else None,
        values_NK=read.values[kept_PT] if per_frame and read.values is not None else None,
        gaps_N=gaps_N,
    )


def _taken(values: NDArray[Any], place_N: Ints, lease: Lease | None) -> Ints:
    """The values at these places; behind the last one stands that again."""
    out = np.empty(len(place_N), np.int64) if lease is None else lease.array((len(place_N),), np.int64)
    return np.take(values, place_N, out=out, mode="clip")  # any other mode copies once more
