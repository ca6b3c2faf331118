"""What will happen: a job spec, a data card and a capacity become one plan, or a refusal.

No I/O here: what can be decided before anything runs is decided here, printed by `treadle plan`,
and carried out as printed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError, InfeasibleError
from treadle.plan.augment import check_augment
from treadle.plan.batches import EpochPlan, plan_epoch
from treadle.plan.explain import Explained, explain
from treadle.plan.repeats import class_repeats
from treadle.plan.size import count_parameters, longest_target, training_bytes
from treadle.spec import (
    BatchSpec,
    Budget,
    ClassifySpec,
    ClassWeights,
    CtcSpec,
    JobSpec,
    LongRows,
    Pooling,
    Signature,
    TargetKind,
    TargetPer,
    TaskSpec,
)
from treadle.units import format_bytes

__all__ = ["Capacity", "DataCard", "Plan", "SplitCard", "make_plan", "trainable_rows", "with_slots"]

FEW_ROUNDS = 80
"""Fewer rounds an epoch than this pad visibly: padding is about .8 noise + 2.5 / rounds. With 8 lanes and lengths of a
long tail it is 38 % at 4 rounds, 22 % at 9, 12 % at 23 and 7 % at 65 (tests/bench/batching.py). None is refused: an
epoch of few rounds is a short one."""
EXTRA_PAD = 0.05
POOR_BALANCE = 0.95
LEAST_SLOTS, MOST_SLOTS = 256, 1 << 20
USUAL_SLOTS = 4096
"""Where the memory is not known."""

_TARGETS: dict[type[TaskSpec], tuple[TargetKind, TargetPer]] = {
    CtcSpec: (TargetKind.labels, TargetPer.sequence),
    ClassifySpec: (TargetKind.labels, TargetPer.row),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitCard:
    """The rows of one split, as far as planning needs them.

    Args:
        lengths_N: time steps per row.
        targets_N: targets per row.
        label_frames_N: label frames that a CTC alignment of each row needs: labels plus repeats.
        labels_N: the label of each row where there is one per row, else -1.
        weights_N: what each row counts in the loss.
        num_entities: distinct entities (words, patients, speakers' utterances).
    """

    lengths_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    label_frames_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    weights_N: NDArray[np.float32]
    num_entities: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DataCard:
    """A prepared data set, as far as planning needs it."""

    name: str
    digest: str
    signature: Signature
    target: TargetKind
    target_per: TargetPer
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
        train_rows, dropped_rows: rows trained on, and rows whose target has no CTC alignment or whose weight is 0.
        updates_per_epoch, num_updates: of epoch 0, and over all epochs as far as epoch 0 tells.
        max_slots: of a microbatch; slots_found: `given`, or `estimated` from memory and the number of rounds.
        fill: frames / slots; worst_slots: of the largest microbatch, never above `max_slots`.
        parameters: trained values; worker_bytes: estimated peak of one worker.
        batch_digest: of epoch 0's batches, compared by all ranks at start.
        batches: epoch 0's batches in numbers.
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
    max_slots: int
    slots_found: str
    fill: float
    worst_slots: int
    parameters: int
    worker_bytes: int
    batch_digest: str
    batches: Explained
    warnings: tuple[str, ...]


def trainable_rows(split: SplitCard, task: TaskSpec) -> NDArray[np.int64]:
    """The rows that teach anything: with a weight above 0, and for CTC with an alignment.

    A target can be aligned where label frames needed <= label frames given.
    """
    counts = split.weights_N > 0
    if isinstance(task, CtcSpec):
        counts = counts & (split.label_frames_N <= split.lengths_N * task.frames_per_step)
    return np.flatnonzero(counts)


def with_slots(batch: BatchSpec, slots: int) -> BatchSpec:
    """The batch spec with a number for `max_slots`, such as the plan's."""
    return replace(batch, max_slots=str(slots))


def make_plan(spec: JobSpec, card: DataCard, capacity: Capacity) -> Plan:
    """The plan of `spec` on this data at this place.

    Raises:
        DataError: no training rows, or rows that the task cannot take.
        ConfigError: a task that wants other targets, lanes fewer than workers, or a row above the slot budget.
        InfeasibleError: more devices or memory asked than the place has.
    """
    train = _training_split(spec, card)
    check_augment(spec, card.signature)
    world = max(1, spec.cluster.workers)
    _check_devices(spec, capacity)
    lanes = spec.batch.lanes or world
    rows = trainable_rows(train, spec.task)
    _check_rows(len(rows), lanes, world)
    lengths, targets = train.lengths_N[rows], train.targets_N[rows]
    slots = _auto_slots(spec, card, lengths, targets, capacity) if spec.batch.is_auto else spec.batch.slots
    batch = with_slots(spec.batch, slots)
    repeats = class_repeats(train.labels_N[rows], batch)
    epoch = plan_epoch(lengths, batch, lanes=lanes, seed=spec.train.seed, epoch=0, repeats_N=repeats)
    if epoch.pieces(0) > 1:
        _check_pieces(spec)
    size = _worker_bytes(spec, card, epoch, targets)
    _check_memory(size, world, capacity)
    median, p99 = np.percentile(lengths, [50, 99])
    dropped = len(train.lengths_N) - len(rows)
    explained = explain(epoch, ranks=world)
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
        rows_per_update=epoch.num_entries / epoch.num_updates,
        max_slots=slots,
        slots_found="estimated" if spec.batch.is_auto else "given",
        fill=epoch.fill,
        worst_slots=epoch.worst_slots,
        parameters=count_parameters(spec.model, spec.task, card.signature),
        worker_bytes=size,
        batch_digest=epoch.digest,
        batches=explained,
        warnings=_warnings(spec, explained, dropped),
    )


def _rows(card: DataCard, split: str) -> int:
    return len(card.splits[split].lengths_N) if split in card.splits else 0


def _training_split(spec: JobSpec, card: DataCard) -> SplitCard:
    """The rows to train on, if the task can be learned from them."""
    wanted = _TARGETS.get(type(spec.task))
    if wanted not in (None, (card.target, card.target_per)):
        seen = "no targets" if card.target is TargetKind.none else f"{card.target.value} per {card.target_per.value}"
        fitting = [task.kind for task, needed in _TARGETS.items() if needed == (card.target, card.target_per)]
        raise ConfigError(
            f"task: got {spec.task.kind} on data {card.name}, which have {seen}, "
            f"expected {wanted[0].value} per {wanted[1].value}",
            hint=f"task={fitting[0]}" if fitting else "another data set, or other targets in its preparation",
        )
    if spec.batch.class_balance and (card.target, card.target_per) != (TargetKind.labels, TargetPer.row):
        raise ConfigError(
            f"batch.class_balance: got {spec.batch.class_balance:g}, expected 0 where targets are not one label a row"
        )
    train = card.splits.get("train")
    if train is None or not len(train.lengths_N):
        raise DataError(f"data.{card.name}: got no training rows, expected at least one")
    bad = ~(np.isfinite(train.weights_N) & (train.weights_N >= 0))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"data.{card.name}: got weight {train.weights_N[row]} of row {row}, expected 0 or more")
    return train


def _check_rows(num_rows: int, lanes: int, world: int) -> None:
    if lanes < world:
        raise ConfigError(
            f"batch.lanes: got {lanes}, expected at least cluster.workers = {world}",
            hint=f"batch.lanes={world} or cluster.workers={lanes}",
        )
    if not num_rows:
        raise DataError(
            "task: every target is longer than its input allows, or every weight is 0",
            hint="a larger task.frames_per_step",
        )
    if num_rows < world:
        raise ConfigError(
            f"cluster.workers: got {world}, expected at most {num_rows}, the number of training rows",
            hint=f"cluster.workers={num_rows}",
        )


def _check_pieces(spec: JobSpec) -> None:
    """Refuse a network that cannot read a row in pieces."""
    model, task = spec.model, spec.task
    problems: list[str] = []
    if not isinstance(task, ClassifySpec):
        problems.append(f"task: got {task.kind}, expected classify")
    elif task.pooling is Pooling.attention:
        problems.append("task.pooling: got attention, expected last, mean or max")
    if model.bidirectional:
        problems.append("model.bidirectional: got true, expected false")
    if model.attention_every and model.attention_window is None:
        problems.append("model.attention_window: got null, expected a number of frames")
    if problems:
        raise ConfigError(
            "batch.long_rows: got chunk, but this network needs whole rows\n" + "\n".join(problems),
            hint="a larger batch.max_slots, or a smaller data.max_length",
        )


def _auto_slots(
    spec: JobSpec, card: DataCard, lengths_N: NDArray[Any], targets_N: NDArray[Any], capacity: Capacity
) -> int:
    """The largest power of two that fits into the memory and leaves an epoch enough rounds.

    Powers of two, because free memory differs from day to day and batches should not.
    """
    world = max(1, spec.cluster.workers)
    room = min(capacity.memory_bytes // world, capacity.memory_bytes // 2)
    longest, median = int(lengths_N.max()), int(np.median(lengths_N))
    most_by_rounds = int(lengths_N.sum()) // (FEW_ROUNDS * (spec.batch.lanes or world))
    labels = {steps: longest_target(lengths_N, targets_N, steps) for steps in (median, longest)}

    def fits(slots: int) -> bool:
        if slots > max(LEAST_SLOTS, most_by_rounds):
            return False
        if not capacity.memory_bytes:
            return slots <= USUAL_SLOTS
        shapes = [(max(1, slots // steps), min(steps, slots), labels[steps]) for steps in (median, longest)]
        return max(_training_bytes(spec, card, *shape) for shape in shapes) <= room

    slots = LEAST_SLOTS
    while slots < MOST_SLOTS and fits(2 * slots):
        slots *= 2
    needed = -(-longest // spec.batch.multiple_of) * spec.batch.multiple_of
    return slots if spec.batch.long_rows is LongRows.chunk else max(slots, needed)


def _worker_bytes(spec: JobSpec, card: DataCard, epoch: EpochPlan, targets_N: NDArray[Any]) -> int:
    """Of the largest microbatch, of the one with the longest rows, and of that whose alignments are most."""
    places = {epoch.largest, (0, 0)}
    if isinstance(spec.task, CtcSpec):
        alignments_GL = epoch.microbatch_GL * (card.signature.num_labels + epoch.most_GL(targets_N))
        places.add(divmod(int(alignments_GL.argmax()), epoch.lanes))
    found: list[int] = []
    for place in places:
        taken = epoch.lane_rows(*place)
        rows = 1 if epoch.pieces(place[0]) > 1 else len(taken)
        frames = None if epoch.limit.counts_slots else int(epoch.microbatch_GL[place])
        labels = int(targets_N[taken].max())
        found.append(_training_bytes(spec, card, rows, epoch.steps(*place), labels, frames=frames))
    return max(found)


def _training_bytes(
    spec: JobSpec, card: DataCard, rows: int, steps: int, labels: int, *, frames: int | None = None
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
    )


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
            hint="a smaller batch.max_slots or model.hidden_size",
        )


def _warnings(spec: JobSpec, batches: Explained, dropped: int) -> tuple[str, ...]:
    found: list[str] = []
    if batches.entries < batches.lanes:
        found.append(
            f"{batches.lanes} lanes for {batches.entries} rows: some lanes have none; batch.lanes={batches.entries}"
        )
    is_poor = batches.pad > spec.batch.noise + EXTRA_PAD or batches.time_balance < POOR_BALANCE
    if batches.rounds < FEW_ROUNDS and is_poor:
        slots = batches.frames // (FEW_ROUNDS * batches.lanes)
        fewer = "fewer lanes and workers help" if batches.lanes > 1 else "there are few rows"
        found.append(
            f"only {batches.rounds} rounds an epoch over {batches.lanes} lanes: {batches.pad:.0%} of the slots are "
            f"padding, ranks wait {1 - batches.time_balance:.0%} of the time; "
            + (f"batch.max_slots={slots} makes {FEW_ROUNDS} rounds" if slots >= batches.lengths[-1] else fewer)
        )
    if dropped:
        found.append(f"{dropped} training rows have targets too long for their inputs, or no weight, and are left out")
    if spec.batch.class_balance and getattr(spec.task, "class_weights", None) is ClassWeights.balanced:
        found.append("batch.class_balance and task.class_weights both make rare labels count more")
    if spec.batch.budget is Budget.frames and spec.batch.multiple_of > 1:
        found.append("batch.multiple_of does nothing where the budget counts frames: nothing is padded")
    return tuple(found)
