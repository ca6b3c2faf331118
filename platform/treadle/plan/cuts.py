"""Where rounds end: as many rows a lane as its budget holds, without a look at every row in Python.

Shape letters: E entries of an epoch in dealing order, from the longest to the shortest by noisy lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from treadle.spec import Budget

__all__ = ["Limit", "cut_rounds"]

Int = TypeVar("Int", int, NDArray[np.int64])


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one microbatch may hold.

    Args:
        slots: of what `kind` counts. max_rows: beside it.
        kind: rows x padded time steps, or frames.
        multiple_of: what time steps are padded to a multiple of; nothing is padded where frames are counted.
    """

    slots: int
    kind: Budget
    max_rows: int
    multiple_of: int

    @property
    def counts_slots(self) -> bool:
        return self.kind is Budget.slots

    @property
    def longest(self) -> int:
        """Frames of the longest row that one microbatch can hold."""
        return self.slots - self.slots % self.multiple_of if self.counts_slots else self.slots

    def padded(self, steps: Int) -> Int:
        """Time steps that a row of so many frames takes."""
        return -(-steps // self.multiple_of) * self.multiple_of if self.counts_slots else steps


def cut_rounds(sorted_E: NDArray[np.uint32], limit: Limit, *, lanes: int) -> NDArray[np.uint32]:
    """The first entry of each round, and the number of entries.

    A round holds k rows for each lane; the last one holds what is left. k is the largest for which no lane is above
    the limit: for slots, k times the longest of all rows left (which differs from the longest of the round in few
    rounds, by little: at 5 % noise the number of rounds is the same); for frames, the sum of the lane's rows. Rounds
    that hold a row above the limit take one row a lane.

    Args:
        sorted_E: frames of the entries in dealing order. Overwritten.
    """
    cut = _by_slots if limit.counts_slots else _by_frames
    starts = cut(sorted_E, limit, lanes)
    return np.append(starts, len(sorted_E)).astype(np.uint32)


def _by_slots(sorted_E: NDArray[np.uint32], limit: Limit, lanes: int) -> NDArray[np.int64]:
    """k depends on the longest row left alone, so there are few k, below 2 sqrt(slots), each of a run of rounds."""
    left_E = sorted_E
    np.maximum.accumulate(left_E[::-1], out=left_E[::-1])
    changes = np.flatnonzero(left_E[1:] != left_E[:-1]) + 1
    longest = left_E[np.append(0, changes)].astype(np.int64)
    rows = np.clip(limit.slots // limit.padded(longest), 1, limit.max_rows)
    stops = np.append(changes, len(left_E))
    is_last = np.append(rows[1:] != rows[:-1], True)
    found: list[NDArray[np.int64]] = []
    start = 0
    for stop, k in zip(stops[is_last].tolist(), rows[is_last].tolist(), strict=True):
        if start < stop:
            run = np.arange(start, stop, k * lanes, dtype=np.int64)
            found.append(run)
            start = int(run[-1]) + k * lanes
    return np.concatenate(found)


def _by_frames(sorted_E: NDArray[np.uint32], limit: Limit, lanes: int) -> NDArray[np.int64]:
    """Where a round would end that began there is found for all lines of the table [E / lanes, lanes] at once."""
    num_lines = -(-len(sorted_E) // lanes)
    lines = np.arange(num_lines)
    after = np.minimum(lines + limit.max_rows, num_lines)
    for lane in range(lanes):
        frames = np.zeros(num_lines + 1, np.int64)
        column = sorted_E[lane::lanes]
        np.cumsum(column, out=frames[1 : len(column) + 1])
        frames[len(column) + 1 :] = frames[len(column)]  # a lane without a row in the last line
        np.minimum(after, np.searchsorted(frames, frames[:-1] + limit.slots, side="right") - 1, out=after)
    np.maximum(after, lines + 1, out=after)  # a row above the limit, alone
    found: list[int] = []
    line, follow = 0, after.data
    while line < num_lines:
        found.append(line)
        line = follow[line]
    return np.array(found, np.int64) * lanes
