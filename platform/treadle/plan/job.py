"""What will happen: a job spec, a data card and a capacity become one plan, or a refusal.

No I/O here: what can be decided before anything runs is decided here, printed by `treadle plan`,
and carried out as printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError, InfeasibleError
from treadle.plan.augment import check_augment
from treadle.plan.cards import Capacity, DataCard, SplitCard
from treadle.plan.explain import Explained, explain, explain_streams
from treadle.plan.parallel import check_parallel
from treadle.plan.size import count_parameters
from treadle.plan.slots import FEW_ROUNDS, check_memory, fitting_epoch, pads
from treadle.plan.streaming import streams_plan
from treadle.spec import (
    AugmentSpec,
    Budget,
    ClassifySpec,
    ClassWeights,
    CtcSpec,
    InputKind,
    JobSpec,
    LanguageSpec,
    MinSpec,
    Pooling,
    Signature,
    TagSpec,
    TargetKind,
    TargetPer,
    TaskSpec,
)

__all__ = ["Plan", "make_plan", "trainable_rows"]

EXTRA_PAD = 0.05
POOR_BALANCE = 0.95
MANY_PADDED = 2
"""Times the budget of frames that rows x padded time steps may be before it is said."""

_TARGETS: dict[type[TaskSpec], tuple[TargetKind, TargetPer]] = {
    CtcSpec: (TargetKind.labels, TargetPer.sequence),
    ClassifySpec: (TargetKind.labels, TargetPer.row),
    TagSpec: (TargetKind.labels, TargetPer.frame),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will do, in numbers.

    Args:
        world: ranks; lanes: shares of a round, at least `world`.
        train_rows, dropped_rows: rows trained on, and rows whose target has no CTC alignment, which hold one symbol
            and so predict none, or whose weight is 0.
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
    """The rows that teach anything: with a weight above 0, for CTC with an alignment, for language of two symbols.

    A target can be aligned where label frames needed <= label frames given.
    """
    counts = split.weights_N > 0
    if isinstance(task, CtcSpec):
        counts = counts & (split.label_frames_N <= split.lengths_N * task.frames_per_step)
    if isinstance(task, LanguageSpec):
        counts = counts & (split.lengths_N > 1)
    return np.flatnonzero(counts)


def make_plan(spec: JobSpec, card: DataCard, capacity: Capacity) -> Plan:
    """The plan of `spec` on this data at this place.

    Raises:
        DataError: no training rows, or rows that the task cannot take.
        ConfigError: a task that wants other targets, lanes fewer than workers, or a row above the slot budget.
        InfeasibleError: more devices or memory asked than the place has.
    """
    train = _training_split(spec, card)
    check_augment(spec, card.signature)
    _check_language(spec, card)
    check_parallel(spec)
    world = max(1, spec.cluster.workers)
    _check_devices(spec, capacity)
    lanes = spec.batch.lanes or world
    rows = trainable_rows(train, spec.task)
    _check_rows(len(rows), lanes, world)
    lengths = train.lengths_N[rows]
    epoch = _streams(spec, card, rows) if spec.batch.streams else _batches(spec, card, rows, capacity)
    check_memory(spec, epoch.worker_bytes, capacity)
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
        updates_per_epoch=epoch.batches.updates,
        num_updates=epoch.batches.updates * spec.train.epochs,
        rows_per_update=epoch.batches.entries / epoch.batches.updates,
        max_slots=epoch.batches.limit,
        slots_found="estimated" if spec.batch.is_auto else "given",
        fill=epoch.batches.fill,
        worst_slots=epoch.worst_slots,
        parameters=count_parameters(spec.model, spec.task, card.signature),
        worker_bytes=epoch.worker_bytes,
        batch_digest=epoch.digest,
        batches=epoch.batches,
        warnings=epoch.warnings + _left_out(dropped, spec.task),
    )


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """Epoch 0 as the plan tells it, whichever way its rows are read."""

    batches: Explained
    worst_slots: int
    digest: str
    worker_bytes: int
    warnings: tuple[str, ...]


def _batches(spec: JobSpec, card: DataCard, rows: NDArray[np.int64], capacity: Capacity) -> _Epoch:
    epoch, size = fitting_epoch(spec, card, rows, capacity)
    if epoch.pieces(0) > 1:
        _check_pieces(spec)
    explained = explain(epoch, ranks=max(1, spec.cluster.workers))
    return _Epoch(
        batches=explained,
        worst_slots=epoch.worst_slots,
        digest=epoch.digest,
        worker_bytes=size,
        warnings=_warnings(spec, explained, int(epoch.padded_GL.max())),
    )


def _streams(spec: JobSpec, card: DataCard, rows: NDArray[np.int64]) -> _Epoch:
    plan, size = streams_plan(spec, card, rows)
    short = (
        f"an epoch is one update of {plan.num_streams} streams: no state is carried; "
        "a smaller batch.chunk or batch.streams"
    )
    return _Epoch(
        batches=explain_streams(plan, ranks=max(1, spec.cluster.workers)),
        worst_slots=plan.worst_frames,
        digest=plan.digest,
        worker_bytes=size,
        warnings=(short,) if plan.num_updates == 1 else (),
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


def _check_language(spec: JobSpec, card: DataCard) -> None:
    """Refuse a language model of what are no symbols, or one that sees the symbol it predicts."""
    if not isinstance(spec.task, LanguageSpec):
        return
    if card.signature.input_kind is not InputKind.tokens:
        raise ConfigError(f"task: got language on data {card.name}, which are frames of numbers, expected symbols")
    if spec.model.bidirectional:
        raise ConfigError(
            "model.bidirectional: got true beside task=language, expected false: it would see what it predicts"
        )
    if spec.augment != AugmentSpec():
        raise ConfigError("augment: got changes of rows beside task=language, expected none: inputs are the targets")


def _check_rows(num_rows: int, lanes: int, world: int) -> None:
    if lanes < world:
        raise ConfigError(
            f"batch.lanes: got {lanes}, expected at least cluster.workers = {world}",
            hint=f"batch.lanes={world} or cluster.workers={lanes}",
        )
    if not num_rows:
        raise DataError(
            "task: every target is longer than its input allows, every row too short, or every weight is 0",
            hint="for task=ctc a larger task.frames_per_step",
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


def _left_out(dropped: int, task: TaskSpec) -> tuple[str, ...]:
    if not dropped:
        return ()
    why = "one symbol alone" if isinstance(task, LanguageSpec) else "targets too long for their inputs"
    return (f"{dropped} training rows have {why}, or no weight, and are left out",)


def _warnings(spec: JobSpec, batches: Explained, most_padded: int) -> tuple[str, ...]:
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
    if spec.batch.class_balance and getattr(spec.task, "class_weights", None) is ClassWeights.balanced:
        found.append("batch.class_balance and task.class_weights both make rare labels count more")
    if spec.batch.budget is Budget.frames and pads(spec) and most_padded > MANY_PADDED * batches.limit:
        what = "ctc" if isinstance(spec.model, MinSpec) else spec.model.kind
        found.append(
            f"batch.budget counts frames, but {what} pads its rows: of {batches.limit:,} frames it makes up to "
            f"{most_padded:,} time steps; batch.budget=slots"
        )
    if spec.batch.budget is Budget.frames and spec.batch.multiple_of > 1:
        found.append("batch.multiple_of does nothing where the budget counts frames: nothing is padded")
    return tuple(found)
