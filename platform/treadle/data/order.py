"""The order in which a data set keeps its rows, and rows copied into it.

Rows are sorted by length, then by hashes of entity and content, so that neighbours are padded little and the order says
nothing of how a source was cut or read. Runs and zones of a build are sorted by the same rule, which is what lets a
zone take one range of each run.

Shape letters: R rows, N frames of all rows laid end to end, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["copy_rows", "cut", "row_order", "starts_of"]

_TIES = ("group", "last", "time", "weight", "split")
_NARROW_BYTES = 32
"""Below it a frame is copied slower through an index of its own than within its row (5 ns, whatever its size)."""


def row_order(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """The order of rows by (length, entity, content), rows that are equal in these by what else is known of them.

    Args:
        columns: length, entity, content, and group, last, time, weight, split.

    Cost: about 0.4 us per row.
    """
    main = [columns[name] for name in ("content", "entity", "length")]
    order = np.lexsort(main)
    equal = np.ones(max(len(order) - 1, 0), bool)
    for column in main:
        ordered = column[order]
        equal &= ordered[1:] == ordered[:-1]
    if equal.any():  # few or none: sorting by all eight for their sake would take thrice as long
        number = np.concatenate([[0], np.cumsum(~equal)])
        tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
        rows = order[tied]
        keys = [columns[name][rows] for name in reversed(_TIES)]
        order[tied] = rows[np.lexsort([*keys, number[tied]])]
    return order


def starts_of(lengths_R: NDArray[Any]) -> NDArray[np.int64]:
    """Where each row starts when rows are laid end to end, and where the last one ends: [R + 1]."""
    starts = np.zeros(len(lengths_R) + 1, np.int64)
    np.cumsum(lengths_R, out=starts[1:])
    return starts


def cut(sizes_R: NDArray[np.int64], target: int) -> list[int]:
    """Bounds of runs of rows of about `target` each, none of them empty: [0, ..., R].

    Pieces are alike in size (2/3 to 4/3 of the target where there are several), but for rows that are larger alone.
    """
    ends = np.cumsum(sizes_R)
    total = int(ends[-1]) if len(ends) else 0
    pieces = max(1, round(total / target))
    piece_R = (ends - sizes_R) * pieces // max(total, 1)
    return [0, *(np.flatnonzero(np.diff(piece_R)) + 1).tolist(), len(sizes_R)]


def copy_rows(
    source: NDArray[Any], starts_R: NDArray[np.int64], lengths_R: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Copy rows that lie anywhere in `source` into `out`, end to end.

    Args:
        source: [N, D], contiguous.
        starts_R: first frame of each row. lengths_R: its frames; fastest where equal lengths are neighbours.
        out: [sum of lengths, D], contiguous.

    Cost: 4 GB/s for frames of 64 bytes, 0.07 us per row of 28 bytes.
    """
    if source.shape[1] * source.itemsize >= _NARROW_BYTES:
        _copy_frames(source, starts_R, lengths_R, out)
    else:
        _copy_runs(source, starts_R, lengths_R, out)


def _copy_frames(
    source: NDArray[Any], starts_R: NDArray[np.int64], lengths_R: NDArray[np.int64], out: NDArray[Any]
) -> None:
    # `take` with an index lets other threads run, copies of rows as a whole do not.
    places = starts_of(lengths_R)
    index_N = np.repeat(starts_R - places[:-1], lengths_R)
    index_N += np.arange(len(index_N))
    source.take(index_N, axis=0, out=out, mode="clip")


def _copy_runs(
    source: NDArray[Any], starts_R: NDArray[np.int64], lengths_R: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Rows of one length as items of one array: overlapping windows of the source, one per frame."""
    frame_bytes = source.shape[1] * source.itemsize
    bounds = [0, *(np.flatnonzero(np.diff(lengths_R)) + 1).tolist(), len(lengths_R)]
    position = 0
    for first, stop in pairwise(bounds):
        length, rows = int(lengths_R[first]) if stop > first else 0, stop - first
        if not length or not rows:
            continue
        kind = np.dtype((np.void, length * frame_bytes))
        windows = np.ndarray((len(source) - length + 1,), kind, source, 0, (frame_bytes,))  # type: ignore[arg-type]
        np.ndarray((rows,), kind, out, position)[:] = windows[starts_R[first:stop]]  # type: ignore[arg-type]
        position += rows * length * frame_bytes
