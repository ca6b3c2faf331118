"""Where a run stands in its batches: 300 bytes, equal on all ranks, found again at once.

A position counts updates that were made, not batches that were read ahead. It carries what decided the batches, so that
a run goes on with the batches it had, or says what is different.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle import wire
from treadle.errors import ConfigError
from treadle.spec import BatchSpec

__all__ = ["PLANNER", "PlanInputs", "Position", "check_position", "plan_inputs"]

PLANNER = 2
"""Counts the ways of planning: other batches from the same inputs."""
_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """All that decides the batches of a run.

    Args:
        planner: the way of planning, `PLANNER`.
        data: the first 16 digits of the data set's digest.
        rows, frames: trained on, each counted once.
        seed: of the job. lanes: shares of a round.
        slots: of a microbatch, as planned. The rest is from the batch spec.
        streams, chunk: 0 where whole rows are read, and in positions written before there were streams.
    """

    planner: int
    data: str
    rows: int
    frames: int
    seed: int
    lanes: int
    slots: int
    budget: str
    max_rows: int
    rounds_per_update: int
    noise: float
    multiple_of: int
    long_rows: str
    class_balance: float
    max_repeats: int
    streams: int = 0
    chunk: int = 0

    @property
    def digest(self) -> str:
        """Equal for equal batches."""
        return wire.digest(wire.encode(self))


@dataclass(frozen=True, kw_only=True)
class Position:
    """The next update of a run: the `update`-th of `epoch`, both from 0."""

    epoch: int = 0
    update: int = 0
    inputs: PlanInputs

    def advanced(self, num_updates: int) -> Position:
        """The position after one more update, in an epoch of so many."""
        if self.update + 1 < num_updates:
            return replace(self, update=self.update + 1)
        return replace(self, epoch=self.epoch + 1, update=0)


def plan_inputs(batch: BatchSpec, lengths_N: NDArray[Any], *, data: str, lanes: int, seed: int) -> PlanInputs:
    """What decides the batches.

    Args:
        batch: as planned: with a number for max_slots.
        lengths_N: frames of the rows that are trained on.
        data: digest of the data set.
    """
    return PlanInputs(
        planner=PLANNER,
        data=data[:_DIGITS],
        rows=len(lengths_N),
        frames=int(np.sum(lengths_N, dtype=np.int64)),
        seed=seed,
        lanes=lanes,
        slots=batch.slots,
        budget=batch.budget.value,
        max_rows=batch.max_rows,
        rounds_per_update=batch.rounds_per_update,
        noise=batch.noise,
        multiple_of=batch.multiple_of,
        long_rows=batch.long_rows.value,
        class_balance=batch.class_balance,
        max_repeats=batch.max_repeats,
        streams=batch.streams or 0,
        chunk=batch.chunk if batch.streams else 0,
    )


_KEYS = {
    "planner": "treadle's way of planning",
    "data": "data (digest)",
    "rows": "training rows",
    "frames": "training frames",
    "seed": "train.seed",
    "slots": "batch.max_slots",
}


def check_position(position: Position, inputs: PlanInputs) -> None:
    """Nothing, where the batches are those that the run had so far.

    Raises:
        ConfigError: a line for each input that is another.
    """
    names = [field.name for field in fields(PlanInputs)]
    changed = [name for name in names if getattr(inputs, name) != getattr(position.inputs, name)]
    if not changed:
        return
    lines = [
        f"{_KEYS.get(name, f'batch.{name}')}: got {getattr(inputs, name)}, expected {getattr(position.inputs, name)}, "
        "with which the run began"
        for name in changed
    ]
    raise ConfigError("\n".join(lines), hint="the same settings to go on, or a new run", changed=changed)
