"""Which rows stand in which microbatch: a pure function of (lengths, seed, epoch, budget, lanes).

A **round** deals neighbours of one length zone to all **lanes**, so that every rank pads to nearly
the same length at the same time; an **update** is `rounds_per_update` rounds from random zones.
Ranks take lanes `rank::world`, so the rows of an update do not depend on how many ranks share it.
The budget is hard: `rows x longest row <= slots` holds for every microbatch, by construction.

Only raw Philox bits and integer sorts are used: they are the version-stable part of numpy.random,
so a plan made elsewhere, or later, is the same plan (tests/unit/plan/test_batches.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError
from treadle.spec import BatchSpec

__all__ = ["EpochPlan", "plan_epoch"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """The microbatches of one epoch.

    Args:
        order_N: row numbers in dealing order.
        bounds: round i holds `order_N[bounds[i]:bounds[i + 1]]`.
        turn: the order in which rounds are taken.
        lengths_N: time steps of each row, by row number.
        lanes: shares of a round.
        rounds_per_update: rounds of one update; the last update may have fewer.
    """

    order_N: Ints
    bounds: Ints
    turn: Ints
    lengths_N: Ints
    lanes: int
    rounds_per_update: int

    @property
    def num_rounds(self) -> int:
        return len(self.turn)

    @property
    def num_updates(self) -> int:
        return -(-self.num_rounds // self.rounds_per_update)

    def rounds_of(self, update: int) -> list[int]:
        """The rounds of an update, 0 <= update < num_updates."""
        start = update * self.rounds_per_update
        return [int(i) for i in self.turn[start : start + self.rounds_per_update]]

    def round_rows(self, number: int) -> Ints:
        """The rows of a round over all its lanes."""
        return self.order_N[self.bounds[number] : self.bounds[number + 1]]

    def lane_rows(self, number: int, lane: int) -> Ints:
        """The rows that one lane takes of a round; may be empty in the round that holds the rest."""
        return self.round_rows(number)[lane :: self.lanes]

    @cached_property
    def frames(self) -> int:
        """Real time steps of the epoch."""
        return int(self.lengths_N[self.order_N].sum())

    @cached_property
    def slots(self) -> int:
        """Padded time steps of the epoch, over all lanes."""
        return sum(s for r in range(self.num_rounds) for s in self._lane_slots(r))

    @cached_property
    def worst_slots(self) -> int:
        """Slots of the largest microbatch."""
        return max(s for r in range(self.num_rounds) for s in self._lane_slots(r))

    @property
    def largest(self) -> tuple[int, int]:
        """The round and the lane of the largest microbatch."""
        sizes = ((s, -r, -lane) for r in range(self.num_rounds) for lane, s in enumerate(self._lane_slots(r)))
        _, number, lane = max(sizes)
        return -number, -lane

    @property
    def fill(self) -> float:
        """Frames / slots, 1.0 without any padding."""
        return self.frames / self.slots

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides who gets which row when."""
        hasher = hashlib.sha256(f"{self.lanes},{self.rounds_per_update}".encode())
        for part in (self.order_N, self.bounds, self.turn):
            hasher.update(part.astype("<i8").tobytes())
        return hasher.hexdigest()

    def _lane_slots(self, number: int) -> list[int]:
        lanes = (self.lane_rows(number, lane) for lane in range(self.lanes))
        return [len(rows) * int(self.lengths_N[rows].max()) for rows in lanes if len(rows)]


def plan_epoch(lengths_N: Ints, batch: BatchSpec, *, lanes: int, seed: int, epoch: int) -> EpochPlan:
    """The microbatches of `epoch`, every row in exactly one of them.

    Source: the sort by noisy length with rank-grouped rounds; noise 0.05 pads 5 % where noise 0 pads
    1.3 %, and no two epochs share their batches.

    Args:
        lengths_N: time steps per row, at least 1 each.
        batch: slots, max_rows, rounds_per_update and noise are read.
        lanes: shares of a round; a rank takes one or more.
        seed: of the job.
        epoch: 0, 1, ...

    Raises:
        ConfigError: no rows, or one row alone does not fit into `batch.slots`.

    Cost: about 0.1 s per million rows.
    """
    lengths = np.asarray(lengths_N, dtype=np.int64)
    num_rows = len(lengths)
    if num_rows == 0:
        raise ConfigError("data: got no training rows, expected at least one")
    longest = int(lengths.max())
    if longest > batch.slots:
        row = int(lengths.argmax())
        raise ConfigError(
            f"batch.slots: got {batch.slots}, expected at least {longest}, the length of row {row}",
            hint=f"batch.slots={longest}, or a smaller data.max_length",
        )
    order = _noisy_order(lengths, batch.noise, seed=seed, epoch=epoch)
    top = np.maximum.accumulate(lengths[order])
    bounds = [0]
    while bounds[-1] < num_rows:
        start = bounds[-1]
        rows = _rows_per_lane(top, start, lanes, batch)
        bounds.append(min(num_rows, start + rows * lanes))
    keys = np.random.Philox(key=[seed, epoch], counter=1 << 64).random_raw(len(bounds) - 1)
    return EpochPlan(
        order_N=order,
        bounds=np.asarray(bounds, dtype=np.int64),
        turn=np.argsort(keys, kind="stable").astype(np.int64),
        lengths_N=lengths,
        lanes=lanes,
        rounds_per_update=batch.rounds_per_update,
    )


def _noisy_order(lengths: Ints, noise: float, *, seed: int, epoch: int) -> Ints:
    raw = np.random.Philox(key=[seed, epoch]).random_raw(len(lengths))
    jitter = (raw >> np.uint64(44)).astype(np.int64) - (1 << 19)  # 20 signed bits
    # At least half a time step, so that rows of one length are shuffled even without noise.
    amplitude = np.maximum(2 * round(noise * 1000) * lengths, 1000)
    return np.argsort((lengths << 20) + jitter * amplitude // 1000, kind="stable").astype(np.int64)


def _rows_per_lane(top: Ints, start: int, lanes: int, batch: BatchSpec) -> int:
    """The largest k whose k x (longest of the round) fits; the longest grows with k, so bisection holds."""

    def fits(k: int) -> bool:
        return k * int(top[min(len(top), start + k * lanes) - 1]) <= batch.slots

    low, high = 1, min(batch.max_rows, -(-(len(top) - start) // lanes))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
