"""Which rows stand in which microbatch: a pure function of (lengths, seed, epoch, budget, lanes).

A **round** deals neighbours in length to all **lanes**, so that every rank pads to nearly the same length at the same
time; an **update** is `rounds_per_update` rounds, each from another zone of lengths. Ranks take lanes `rank::world`, so
the rows of an update do not depend on how many ranks share it. The budget is hard: no microbatch is above it, by
construction. Rounds go from the longest rows to the shortest, so that what is left over at the end is short.

Shape letters: N rows, E entries (rows, as often as they stand in the epoch), G rounds, L lanes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError
from treadle.plan.cuts import Limit, cut_rounds
from treadle.plan.order import noisy_order, zone_turns
from treadle.plan.repeats import draw_entries
from treadle.spec import BatchSpec, LongRows

__all__ = ["EpochPlan", "plan_epoch"]

Ints = NDArray[np.int64]

_MOST_SLOTS = 1 << 40
"""Above it sums of 64 bits could overflow; no device has as many."""
_MOST = 1 << 32
"""Rows, and frames of a row, are fewer: they are kept in 32 bits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """The microbatches of one epoch: 4 bytes an entry, and 8 a round.

    Args:
        order_E: uint32, the row of each entry in dealing order.
        bounds: uint32 [G + 1]; round i holds `order_E[bounds[i]:bounds[i + 1]]`.
        turn_G: uint32, the order in which rounds are taken.
        pieces_G: uint32, for the first rounds only: into how many pieces their rows are cut, which are too long.
        lengths_N: uint32, frames of each row, by row number.
        limit: what a microbatch may hold.
        lanes: shares of a round.
        num_updates: rounds are dealt to updates evenly; the first ones may have one round more.
    """

    order_E: NDArray[np.uint32]
    bounds: NDArray[np.uint32]
    turn_G: NDArray[np.uint32]
    pieces_G: NDArray[np.uint32]
    lengths_N: NDArray[np.uint32]
    limit: Limit
    lanes: int
    num_updates: int

    @property
    def num_rounds(self) -> int:
        return len(self.turn_G)

    @property
    def num_entries(self) -> int:
        """Rows of the epoch, each as often as it stands."""
        return len(self.order_E)

    def rounds_of(self, update: int) -> list[int]:
        """The rounds of an update, 0 <= update < num_updates. Cost: the same for every update."""
        if not 0 <= update < self.num_updates:
            raise IndexError(f"update {update} of {self.num_updates}")
        each, more = divmod(self.num_rounds, self.num_updates)
        start = update * each + min(update, more)
        return self.turn_G[start : start + each + (update < more)].tolist()

    def round_rows(self, number: int) -> Ints:
        """The rows of a round over all its lanes."""
        return self._taken(number, 0, 1)

    def lane_rows(self, number: int, lane: int) -> Ints:
        """The rows that one lane takes of a round; none where the round of the rest has fewer rows than lanes."""
        return self._taken(number, lane, self.lanes)

    def update_rows(self, update: int) -> int:
        """Rows of an update over all lanes."""
        return sum(int(self.bounds[number + 1]) - int(self.bounds[number]) for number in self.rounds_of(update))

    def update_frames(self, update: int) -> int:
        """Frames of an update over all lanes."""
        return sum(int(self.lengths_N[self.round_rows(number)].sum()) for number in self.rounds_of(update))

    def update_sum(self, update: int, values_N: NDArray[Any]) -> float:
        """The sum of any value of rows over an update and all lanes, such as weights or numbers of targets."""
        return float(sum(values_N[self.round_rows(number)].sum(dtype=np.float64) for number in self.rounds_of(update)))

    def pieces(self, number: int) -> int:
        """How many consecutive microbatches a lane makes of a round; above 1 each holds a piece of one row.

        The state is carried from piece to piece. All are of one update, so no checkpoint falls between them.
        """
        return int(self.pieces_G[number]) if number < len(self.pieces_G) else 1

    def piece_span(self, number: int, lane: int, piece: int) -> tuple[int, int]:
        """The frames [start, stop) of the lane's row that a piece holds; none where the row has too few, or no row is.

        All lanes have as many pieces, and the pieces of a row differ by one frame at most.
        """
        rows, num = self.lane_rows(number, lane), self.pieces(number)
        length = int(self.lengths_N[rows[0]]) if len(rows) else 0
        return length * piece // num, length * (piece + 1) // num

    def steps(self, number: int, lane: int) -> int:
        """Time steps that a microbatch of the lane is padded to; 0 without rows."""
        rows, num = self.lane_rows(number, lane), self.pieces(number)
        return self.limit.padded(-(-int(self.lengths_N[rows].max()) // num)) if len(rows) else 0

    @cached_property
    def frames(self) -> int:
        """Real time steps of the epoch."""
        return int(self.frames_GL.sum())

    @cached_property
    def slots(self) -> int:
        """What the budget counts, over all lanes: padded time steps, or frames."""
        return int(self.slots_GL.sum())

    @cached_property
    def worst_slots(self) -> int:
        """What the budget counts of the largest microbatch."""
        return int(self.microbatch_GL.max())

    @property
    def largest(self) -> tuple[int, int]:
        """The round and the lane of the largest microbatch."""
        number, lane = divmod(int(self.microbatch_GL.argmax()), self.lanes)
        return number, lane

    @property
    def fill(self) -> float:
        """Frames / slots, 1.0 without any padding."""
        return self.frames / self.slots

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides who gets which row when."""
        head = (self.limit.slots, self.limit.kind.value, self.limit.multiple_of, self.lanes, self.num_updates)
        hasher = hashlib.sha256(repr(head).encode())
        for part in (self.order_E, self.bounds, self.turn_G, self.pieces_G):
            hasher.update(np.ascontiguousarray(part, "<u4").data)
        return hasher.hexdigest()

    @cached_property
    def rows_GL(self) -> Ints:
        """Rows of each lane."""
        sizes_G = np.diff(self.bounds.astype(np.int64))
        return (sizes_G[:, None] + self.lanes - 1 - np.arange(self.lanes)) // self.lanes

    @cached_property
    def longest_GL(self) -> Ints:
        """Frames of the longest row of each lane, 0 without rows."""
        return self.most_GL(self.lengths_N)

    @cached_property
    def frames_GL(self) -> Ints:
        """Frames of each lane."""
        return self._over_lanes(np.add, self.lengths_N)

    @cached_property
    def steps_GL(self) -> Ints:
        """Padded time steps of each lane; those of all its pieces one after the other."""
        num, longest_GL = len(self.pieces_G), self.longest_GL
        steps_GL = self.limit.padded(longest_GL)
        pieces = self.pieces_G.astype(np.int64)[:, None]
        each, more = np.divmod(longest_GL[:num], pieces)
        steps_GL[:num] = more * self.limit.padded(each + 1) + (pieces - more) * self.limit.padded(each)
        return steps_GL

    @cached_property
    def slots_GL(self) -> Ints:
        """What the budget counts of each lane, over all its pieces."""
        return self.steps_GL * self.rows_GL if self.limit.counts_slots else self.frames_GL

    @cached_property
    def microbatch_steps_GL(self) -> Ints:
        """Padded time steps of each lane's largest microbatch: fewer than `steps_GL` where rows are in pieces."""
        pieces = np.ones((self.num_rounds, 1), np.int64)
        pieces[: len(self.pieces_G), 0] = self.pieces_G
        return self.limit.padded(-(-self.longest_GL // pieces))

    @cached_property
    def microbatch_GL(self) -> Ints:
        """What the budget counts of each lane's largest microbatch: less than `slots_GL` where rows are in pieces."""
        if self.limit.counts_slots:
            return self.padded_GL
        num, found_GL = len(self.pieces_G), self.frames_GL.copy()
        found_GL[:num] = self.microbatch_steps_GL[:num]
        return found_GL

    @cached_property
    def padded_GL(self) -> Ints:
        """Rows x padded time steps of each lane's largest microbatch, whatever the budget counts."""
        return self.rows_GL * self.microbatch_steps_GL

    def most_GL(self, values_N: NDArray[Any]) -> Ints:
        """The largest of any value of rows, such as a number of targets, in each lane; 0 without rows."""
        return self._over_lanes(np.maximum, values_N)

    def _taken(self, number: int, first: int, every: int) -> Ints:
        start, stop = int(self.bounds[number]), int(self.bounds[number + 1])
        return self.order_E[start + first : stop : every].astype(np.int64)

    def _over_lanes(self, by: np.ufunc, values_N: NDArray[Any]) -> Ints:
        # All rounds but the last hold a multiple of `lanes` rows, so that lanes are the columns of one table.
        table = np.zeros((-(-self.num_entries // self.lanes), self.lanes), np.uint32)
        table.reshape(-1)[: self.num_entries] = values_N[self.order_E]
        starts = self.bounds[:-1].astype(np.int64) // self.lanes
        return by.reduceat(table, starts, axis=0, dtype=np.int64)


def plan_epoch(
    lengths_N: NDArray[Any],
    batch: BatchSpec,
    *,
    lanes: int,
    seed: int,
    epoch: int,
    repeats_N: NDArray[np.float64] | None = None,
) -> EpochPlan:
    """The microbatches of `epoch`; every row stands in exactly one of them, unless `repeats_N` says otherwise.

    Source: the sort by noisy length with rank-grouped rounds; noise 0.05 pads 5 % where noise 0 pads 1.3 %, and no two
    epochs share their batches (tests/bench/batching.py).

    Args:
        lengths_N: frames per row, at least 1 each; kept as they are where they are uint32.
        batch: max_slots (a number), budget, max_rows, rounds_per_update, noise, multiple_of and long_rows are read.
        lanes: shares of a round; a rank takes one or more.
        seed: of the job.
        epoch: 0, 1, ...
        repeats_N: how often each row is to stand in the epoch, on average; once where not given.

    Raises:
        ConfigError: no rows, a limit out of range, or one row alone is above it and `long_rows` is refuse.
        DataError: an empty row, or one of 2**32 frames or more.

    Cost: about 0.1 s per million rows on one core; 12 bytes a row while planning.
    """
    lengths = np.asarray(lengths_N)
    max_rows = min(batch.max_rows, _MOST)
    limit = Limit(slots=batch.slots, kind=batch.budget, max_rows=max_rows, multiple_of=batch.multiple_of)
    _check_lengths(lengths, batch, limit)
    lengths = lengths.astype(np.uint32, copy=False)
    entries = None if repeats_N is None else draw_entries(repeats_N, seed=seed, epoch=epoch)
    dealt = lengths if entries is None else lengths[entries]
    order = noisy_order(dealt, noise=batch.noise, first_above=limit.longest, seed=seed, epoch=epoch)
    del dealt
    if entries is not None:
        order = entries[order]
    sorted_E = lengths[order]
    num_long = int(np.count_nonzero(sorted_E > limit.longest)) if int(lengths.max()) > limit.longest else 0
    pieces = _pieces(sorted_E, num_long, limit, lanes)
    bounds = cut_rounds(sorted_E, limit, lanes=lanes)
    num_rounds = len(bounds) - 1
    num_updates = -(-num_rounds // batch.rounds_per_update)
    return EpochPlan(
        order_E=order,
        bounds=bounds,
        turn_G=zone_turns(num_rounds, num_updates, seed=seed, epoch=epoch),
        pieces_G=pieces,
        lengths_N=lengths,
        limit=limit,
        lanes=lanes,
        num_updates=num_updates,
    )


def _check_lengths(lengths_N: NDArray[Any], batch: BatchSpec, limit: Limit) -> None:
    if not len(lengths_N):
        raise ConfigError("data: got no training rows, expected at least one")
    if len(lengths_N) >= _MOST:
        raise ConfigError(f"data: got {len(lengths_N):,} rows, expected fewer than {_MOST:,}")
    if limit.slots > _MOST_SLOTS:
        raise ConfigError(
            f"batch.max_slots: got {limit.slots:,}, expected at most {_MOST_SLOTS:,}", hint="batch.max_slots=4096"
        )
    if limit.longest < 1:
        raise ConfigError(
            f"batch.multiple_of: got {limit.multiple_of}, expected at most batch.max_slots = {limit.slots}"
        )
    if (shortest := int(lengths_N.min())) < 1:
        raise DataError(f"row {int(lengths_N.argmin())}: got {shortest} frames, expected at least 1")
    longest = int(lengths_N.max())
    if longest >= _MOST:
        raise DataError(f"row {int(lengths_N.argmax())}: got {longest:,} frames, expected fewer than {_MOST:,}")
    if longest > limit.longest and batch.long_rows is LongRows.refuse:
        row, needed = int(lengths_N.argmax()), limit.padded(longest)
        padded = f", padded to {needed}" if needed != longest else ""
        raise ConfigError(
            f"batch.max_slots: got {limit.slots}, expected at least {needed}, the length of row {row}{padded}",
            hint=f"batch.max_slots={needed}, or batch.long_rows=chunk, or a smaller data.max_length",
        )


def _pieces(sorted_E: NDArray[np.uint32], num_long: int, limit: Limit, lanes: int) -> NDArray[np.uint32]:
    """Into how many pieces the rows of each of the first rounds are cut: those that hold a row above the limit."""
    starts = np.arange(0, num_long, lanes)
    if not num_long:
        return starts.astype(np.uint32)
    longest = np.maximum.reduceat(sorted_E[: len(starts) * lanes], starts).astype(np.int64)
    return (-(-longest // limit.longest)).astype(np.uint32)
