"""How many slots a microbatch has where the place decides it, and whether its memory is there.

Shape letters: N rows that are trained on, G rounds, L lanes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.errors import InfeasibleError
from treadle.plan.batches import EpochPlan, plan_epoch
from treadle.plan.cards import Capacity, DataCard
from treadle.plan.repeats import class_repeats
from treadle.plan.size import Counts, longest_target, training_bytes
from treadle.spec import BatchSpec, Budget, CtcSpec, JobSpec, LongRows, MinSpec
from treadle.units import format_bytes

__all__ = ["FEW_ROUNDS", "check_memory", "fitting_epoch", "pads", "with_slots"]

FEW_ROUNDS = 80
"""Fewer rounds an epoch than this pad visibly: padding is about .8 noise + 2.5 / rounds. With 8 lanes and lengths of a
long tail it is 38 % at 4 rounds, 22 % at 9, 12 % at 23 and 7 % at 65 (tests/bench/batching.py). None is refused: an
epoch of few rounds is a short one."""
LEAST_SLOTS, MOST_SLOTS = 256, 1 << 20
USUAL_SLOTS = 4096
"""Where the memory is not known."""


def with_slots(batch: BatchSpec, slots: int) -> BatchSpec:
    """The batch spec with a number for `max_slots`, such as the plan's."""
    return replace(batch, max_slots=str(slots))


def check_memory(spec: JobSpec, worker_bytes: int, capacity: Capacity) -> None:
    """Nothing, where so many bytes of each worker fit.

    Raises:
        InfeasibleError: all workers do not fit into the place, or one into no node.
    """
    world, one = max(1, spec.cluster.workers), format_bytes(worker_bytes)
    for needed, most, words, place in (
        (world * worker_bytes, capacity.memory_bytes, f"{world} workers x {one} estimated", "on"),
        (worker_bytes, capacity.largest_node_bytes, f"{one} estimated for a worker", "a node on"),
    ):
        if 0 < most < needed:
            slots = "batch.budget=slots, " if spec.batch.budget is Budget.frames and pads(spec) else ""
            raise InfeasibleError(
                f"memory: {words}, expected at most {format_bytes(most)} {place} {capacity.where}",
                hint=f"{slots}a smaller batch.max_slots or model.hidden_size",
            )


def pads(spec: JobSpec) -> bool:
    """Whether the network takes memory for padded time steps: all cells but two do, and ctc."""
    return not isinstance(spec.model, MinSpec) or isinstance(spec.task, CtcSpec)


def fitting_epoch(spec: JobSpec, card: DataCard, rows: NDArray[np.int64], capacity: Capacity) -> tuple[EpochPlan, int]:
    """Epoch 0, and what its largest microbatch takes of a worker's memory.

    Where slots are to be found they are what memory and the number of rounds allow the usual rows, and half of that
    while the epoch has a microbatch for which a worker has no room.

    Args:
        rows: that are trained on, of the card's split "train".

    Cost: one plan of an epoch, as a rule.
    """
    train = card.splits["train"]
    lengths, targets, labels = train.lengths_N[rows], train.targets_N[rows], train.labels_N[rows]
    lanes = spec.batch.lanes or max(1, spec.cluster.workers)

    def planned(slots: int) -> tuple[EpochPlan, int]:
        batch = with_slots(spec.batch, slots)
        repeats = class_repeats(labels, batch)
        epoch = plan_epoch(lengths, batch, lanes=lanes, seed=spec.train.seed, epoch=0, repeats_N=repeats)
        return epoch, _worker_bytes(spec, card, epoch, targets)

    if not spec.batch.is_auto:
        return planned(spec.batch.slots)
    slots, least = _auto_slots(spec, card, lengths, targets, capacity), _least_slots(spec.batch, int(lengths.max()))
    epoch, size = planned(slots)
    while size > _room(spec, capacity) > 0 and slots > least:
        slots = max(least, slots // 2)
        epoch, size = planned(slots)
    return epoch, size


def _room(spec: JobSpec, capacity: Capacity) -> int:
    """What a worker may take where slots are to be found: its share, and half a node at most."""
    return min(capacity.memory_bytes // max(1, spec.cluster.workers), capacity.largest_node_bytes // 2)


def _least_slots(batch: BatchSpec, longest: int) -> int:
    needed = -(-longest // batch.multiple_of) * batch.multiple_of
    return LEAST_SLOTS if batch.long_rows is LongRows.chunk else max(LEAST_SLOTS, needed)


def _auto_slots(
    spec: JobSpec, card: DataCard, lengths_N: NDArray[Any], targets_N: NDArray[Any], capacity: Capacity
) -> int:
    """The largest power of two that fits into the memory and leaves an epoch enough rounds.

    Powers of two, because free memory differs from day to day and batches should not.
    """
    room = _room(spec, capacity)
    usual = np.array([lengths_N.min(), np.median(lengths_N), lengths_N.max()], np.int64)
    labels = np.array([longest_target(lengths_N, targets_N, int(steps)) for steps in usual])
    most_by_rounds = int(lengths_N.sum()) // (FEW_ROUNDS * (spec.batch.lanes or max(1, spec.cluster.workers)))

    def fits(slots: int) -> bool:
        if slots > max(LEAST_SLOTS, most_by_rounds):
            return False
        if not capacity.memory_bytes:
            return slots <= USUAL_SLOTS
        rows = np.clip(slots // usual, 1, min(spec.batch.max_rows, slots))
        return _training_bytes(spec, card, rows, np.minimum(usual, slots), labels) <= room

    slots = LEAST_SLOTS
    while slots < MOST_SLOTS and fits(2 * slots):
        slots *= 2
    return max(slots, _least_slots(spec.batch, int(lengths_N.max())))


def _worker_bytes(spec: JobSpec, card: DataCard, epoch: EpochPlan, targets_N: NDArray[Any]) -> int:
    """Of the microbatch that takes the most.

    All are looked at: some networks take memory by padded slots, some by frames, all by rows too, and ctc by targets.
    """
    labels = epoch.most_GL(targets_N) if isinstance(spec.task, CtcSpec) else 0
    frames = None if epoch.limit.counts_slots else epoch.microbatch_GL
    return _training_bytes(spec, card, epoch.rows_GL, epoch.microbatch_steps_GL, labels, frames=frames)


def _training_bytes(
    spec: JobSpec, card: DataCard, rows: Counts, steps: Counts, labels: Counts, *, frames: Counts | None = None
) -> int:
    return training_bytes(
        spec.model,
        spec.task,
        card.signature,
        spec.optim,
        rows=rows,
        time_steps=steps,
        frames=frames,
        labels=labels,
        world=max(1, spec.cluster.workers),
        recompute=spec.train.recompute,
    )
