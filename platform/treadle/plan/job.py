"""What will happen: a job spec, a data card and a capacity become one plan, or a refusal.

No I/O here: what can be decided before anything runs is decided here, printed by `treadle plan`,
and carried out as printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError, InfeasibleError
from treadle.plan.batches import plan_epoch
from treadle.plan.size import count_parameters, training_bytes
from treadle.spec import CtcSpec, JobSpec, Signature, TaskSpec
from treadle.units import format_bytes

__all__ = ["Capacity", "DataCard", "Plan", "SplitCard", "make_plan", "trainable_rows"]

PLAN_SCHEMA = 1
FEW_ROUNDS = 80
"""Fewer rounds an epoch than this pad visibly: padding is about .8 noise + 2.5 / rounds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitCard:
    """The rows of one split, as far as planning needs them.

    Args:
        lengths_N: time steps per row.
        label_frames_N: label frames that a CTC alignment of each row needs: labels plus repeats.
        num_entities: distinct entities (words, patients, speakers' utterances).
    """

    lengths_N: NDArray[np.int64]
    label_frames_N: NDArray[np.int64]
    num_entities: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DataCard:
    """A prepared data set, as far as planning needs it."""

    name: str
    digest: str
    signature: Signature
    splits: dict[str, SplitCard]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the place offers.

    Args:
        where: its name for messages, such as "this machine" or an address.
        cpus, gpus: whole devices; memory_bytes: of the smallest node that takes workers, 0 = unknown.
    """

    where: str
    cpus: int
    gpus: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will do, in numbers.

    Args:
        world: ranks; lanes: shares of a round, at least `world`.
        train_rows, dropped_rows: rows trained on, and rows whose target has no CTC alignment.
        updates_per_epoch, num_updates: of epoch 0, and over all epochs as far as epoch 0 tells.
        fill: frames / slots; worst_slots: of the largest microbatch, never above `batch.slots`.
        parameters: trained values; worker_bytes: estimated peak of one worker.
        batch_digest: of epoch 0's batches, compared by all ranks at start.
    """

    spec_digest: str
    data_digest: str
    signature: Signature
    world: int
    lanes: int
    train_rows: int
    dropped_rows: int
    valid_rows: int
    test_rows: int
    train_frames: int
    length_min: int
    length_median: int
    length_p99: int
    length_max: int
    updates_per_epoch: int
    num_updates: int
    rows_per_update: float
    fill: float
    worst_slots: int
    parameters: int
    worker_bytes: int
    batch_digest: str
    warnings: tuple[str, ...]


def trainable_rows(split: SplitCard, task: TaskSpec) -> NDArray[np.int64]:
    """The rows whose target can be aligned at all: label frames needed <= label frames given."""
    if isinstance(task, CtcSpec):
        return np.flatnonzero(split.label_frames_N <= split.lengths_N * task.frames_per_step)
    return np.arange(len(split.lengths_N))


def make_plan(spec: JobSpec, card: DataCard, capacity: Capacity) -> Plan:
    """The plan of `spec` on this data at this place.

    Raises:
        DataError: no training rows, or a target that the task cannot take.
        ConfigError: lanes fewer than workers, or a row above the slot budget.
        InfeasibleError: more devices or memory asked than the place has.
    """
    train = card.splits.get("train")
    if train is None or not len(train.lengths_N):
        raise DataError(f"data.{card.name}: got no training rows, expected at least one")
    world = max(1, spec.cluster.workers)
    _check_devices(spec, capacity)
    lanes = spec.batch.lanes or world
    if lanes < world:
        raise ConfigError(
            f"batch.lanes: got {lanes}, expected at least cluster.workers = {world}",
            hint=f"batch.lanes={world} or cluster.workers={lanes}",
        )
    rows = trainable_rows(train, spec.task)
    if not len(rows):
        raise DataError("task: every target is longer than its input allows", hint="a larger task.frames_per_step")
    lengths = train.lengths_N[rows]
    epoch = plan_epoch(lengths, spec.batch, lanes=lanes, seed=spec.train.seed, epoch=0)
    size = training_bytes(spec.model, spec.task, card.signature, spec.optim, slots=epoch.worst_slots, world=world)
    _check_memory(size, world, capacity)
    median, p99 = np.percentile(lengths, [50, 99])
    dropped = len(train.lengths_N) - len(rows)
    return Plan(
        spec_digest=spec.digest,
        data_digest=card.digest,
        signature=card.signature,
        world=world,
        lanes=lanes,
        train_rows=len(rows),
        dropped_rows=dropped,
        valid_rows=_rows(card, "valid"),
        test_rows=_rows(card, "test"),
        train_frames=int(lengths.sum()),
        length_min=int(lengths.min()),
        length_median=int(median),
        length_p99=int(p99),
        length_max=int(lengths.max()),
        updates_per_epoch=epoch.num_updates,
        num_updates=epoch.num_updates * spec.train.epochs,
        rows_per_update=len(rows) / epoch.num_updates,
        fill=epoch.fill,
        worst_slots=epoch.worst_slots,
        parameters=count_parameters(spec.model, spec.task, card.signature),
        worker_bytes=size,
        batch_digest=epoch.digest,
        warnings=_warnings(epoch.num_rounds, lanes, dropped),
    )


def _rows(card: DataCard, split: str) -> int:
    return len(card.splits[split].lengths_N) if split in card.splits else 0


def _check_devices(spec: JobSpec, capacity: Capacity) -> None:
    for what, asked, there in (
        ("CPUs", spec.cluster.workers * spec.cluster.cpus_per_worker, capacity.cpus),
        ("GPUs", spec.cluster.workers * spec.cluster.gpus_per_worker, capacity.gpus),
    ):
        if asked > there:
            fits = max(1, there // max(1, asked // spec.cluster.workers))
            raise InfeasibleError(
                f"cluster.workers: got {spec.cluster.workers} x {asked // spec.cluster.workers} {what}, "
                f"expected at most {there} {what} on {capacity.where}",
                hint=f"cluster.workers={fits}" if there else "cluster.gpus_per_worker=0",
            )


def _check_memory(worker_bytes: int, world: int, capacity: Capacity) -> None:
    if capacity.memory_bytes and worker_bytes * world > capacity.memory_bytes:
        raise InfeasibleError(
            f"memory: {world} workers x {format_bytes(worker_bytes)} estimated, "
            f"expected at most {format_bytes(capacity.memory_bytes)} on {capacity.where}",
            hint="a smaller batch.slots or model.hidden_size",
        )


def _warnings(num_rounds: int, lanes: int, dropped: int) -> tuple[str, ...]:
    found: list[str] = []
    if num_rounds < FEW_ROUNDS and lanes > 1:
        found.append(
            f"only {num_rounds} rounds an epoch over {lanes} lanes: padding grows; a smaller batch.slots helps"
        )
    if dropped:
        found.append(f"{dropped} training rows have targets too long for their inputs and are left out")
    return tuple(found)
