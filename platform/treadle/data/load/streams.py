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
from treadle.data.load.reader import RowReader
from treadle.data.manifest import Manifest
from treadle.data.order import starts_of
from treadle.plan import StreamPieces, StreamPlan
from treadle.spec import TargetPer

__all__ = ["StreamBatch", "read_streams"]

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


def read_streams(
    reader: RowReader, manifest: Manifest, rows_R: Ints, plan: StreamPlan, lanes: range, *, start: int = 0
) -> Iterator[list[StreamBatch | None]]:
    """What these lanes read, update by update, from update `start` to the end of the epoch.

    Args:
        rows_R: row number in the data set of each sequence of the plan.
        lanes: those of a rank; there is an element for each, None where a lane has no frames left.
    """
    lengths_R = manifest.columns["length"][rows_R].astype(np.int64)
    per_frame = manifest.header.content.target_per is TargetPer.frame
    for update in range(start, plan.num_updates):
        pieces = [plan.pieces(update, lane) for lane in lanes]
        yield [_batch(reader, rows_R, lengths_R, part, per_frame) if len(part.rows_P) else None for part in pieces]


def _batch(reader: RowReader, rows_R: Ints, lengths_R: Ints, pieces: StreamPieces, per_frame: bool) -> StreamBatch:
    counts_P = pieces.stops_P - pieces.starts_P
    # One frame more of each piece, where its sequence goes on: what is to be predicted after its last.
    more_P = (pieces.stops_P < lengths_R[pieces.rows_P]).astype(np.int64)
    read = reader.batch(
        rows_R[pieces.rows_P], form=Form.packed, starts_B=pieces.starts_P, stops_B=pieces.stops_P + more_P
    )
    first_P, kept_P = starts_of(counts_P + more_P)[:-1], starts_of(counts_P)[:-1]
    place_N = np.arange(int(counts_P.sum())) + np.repeat(first_P - kept_P, counts_P)
    starts_N = np.zeros(len(place_N), np.bool_)
    starts_N[kept_P] = pieces.begins_P
    streams_B, at_B = np.unique(pieces.streams_P, return_index=True)
    next_N = None
    if read.inputs.ndim == 1:
        next_N = read.inputs[np.minimum(place_N + 1, len(read.inputs) - 1)]
        next_N[(kept_P + counts_P - 1)[more_P == 0]] = -1
    kept_PT = np.arange(int(read.lengths_B.max())) < counts_P[:, None]
    return StreamBatch(
        inputs=read.inputs[place_N],
        streams_B=streams_B,
        lengths_B=np.add.reduceat(counts_P, at_B),
        starts_N=starts_N,
        next_N=next_N,
        labels_N=read.labels_BU[kept_PT] if per_frame and read.values is None else None,
        values_NK=read.values[kept_PT] if per_frame and read.values is not None else None,
        gaps_N=None if read.gaps is None else read.gaps[place_N],
    )
