"""A rank's run, put together from what the store holds: data, network, state, precision and budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from treadle import wire
from treadle.data import Form, Manifest, RowReader, load_manifest
from treadle.errors import ConflictError, InternalError
from treadle.launch.datasets import open_reader
from treadle.launch.restore import Restorer, read_newest
from treadle.nn import Network, build_network, recompute_layers
from treadle.plan import Plan, PlanInputs, plan_inputs, trainable_rows, with_slots
from treadle.plan.size import longest_target, training_bytes
from treadle.spec import JobSpec, Parallel
from treadle.store import Blobs, Checkpoints
from treadle.track import Tracker
from treadle.train import (
    Checkpointer,
    Control,
    Evaluator,
    Feed,
    PrecisionChoice,
    Run,
    Task,
    TrainState,
    World,
    build_optimizer,
    build_task,
    choose_precision,
    unpack,
)
from treadle.train.budget import FoundBudget, Learner, find_budget, memory_limit
from treadle.train.carry import Carried, Carry, NoCarry
from treadle.train.chunked import ChunkedEvaluator
from treadle.train.compiling import compiled
from treadle.train.rehearse import rehearse
from treadle.train.sharding import shard
from treadle.train.streams import StreamFeed
from treadle.train.task import class_weights
from treadle.train.updater import Updater

__all__ = ["Surroundings", "assemble", "budget_key"]

Ints = NDArray[np.int64]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where a rank stands.

    Args:
        run, attempt: which one. spec, plan: as submitted.
        checkpoints: of the run, to start from; saver: where new ones go.
    """

    blobs: Blobs
    run: str
    attempt: int
    spec: JobSpec
    plan: Plan
    world: World
    checkpoints: Checkpoints
    saver: Checkpointer
    control: Control
    track: Tracker


def budget_key(run: str) -> str:
    """Where the budget of a run is kept that was found on a device; written once."""
    return f"runs/{run}/budget.json"


def assemble(around: Surroundings) -> tuple[Run, Manifest, RowReader]:
    """The run, at the state of the newest checkpoint or at the beginning, its data set, and who reads it: close that.

    Raises:
        ConfigError: the checkpoint's batches are not those of this job. InternalError: the ranks' batches differ.
        IntegrityError: a damaged checkpoint or data set. TransientError: the ranks read different checkpoints.
        InfeasibleError: no budget fits, or the largest microbatch does not.
    """
    spec, plan, world, track = around.spec, around.plan, around.world, around.track
    manifest = load_manifest(around.blobs, spec.data.name, plan.data_digest)
    reader = open_reader(around.blobs, manifest)
    task = _task(spec, plan, manifest)
    torch.manual_seed(spec.train.seed)
    network = build_network(spec.model, spec.task, plan.signature).to(world.device)
    recompute_layers(network, spec.train.recompute)
    optimizer = build_optimizer(spec.optim, network)
    form = _form(network, spec, world)
    saved = read_newest(around)
    if saved.state is not None:
        unpack(saved.files, network, optimizer)
        track.event("restored", update=saved.state.update, epoch=saved.state.epoch)

    def feed_of(batches: JobSpec) -> Feed | StreamFeed:
        if batches.batch.streams:
            return StreamFeed(batches, manifest, reader, lanes=plan.lanes, world=world)
        return Feed(batches, manifest, reader, lanes=plan.lanes, world=world, form=form, task=task)

    planned = replace(spec, batch=with_slots(spec.batch, plan.max_slots))
    precision = _precision(around, network, task, feed_of(planned), saved.state)
    updater = Updater(spec, network, optimizer, precision)  # with its own copies of weights, before memory is measured
    learner = Learner(
        network=network,
        optimizer=optimizer,
        task=task,
        precision=precision,
        device=world.device,
        read=lambda rows: reader.batch(rows, form=form),
    )
    if spec.batch.is_auto:
        planned = replace(spec, batch=with_slots(spec.batch, _budget(around, learner, manifest)))
    feed = feed_of(planned)
    _check_batches(around, feed)
    if world.device.type == "cuda" and isinstance(feed, Feed):  # a host swaps where a device stops, and is slow
        rows, _, targets = _trained(around, manifest)
        rehearse(learner, feed.plan(0), rows, targets)
    inputs = _inputs(planned, plan, manifest)
    fresh = TrainState(precision=precision.name, inputs=inputs)
    state = saved.state or fresh
    state.check(inputs)
    world.share_weights(network)
    if spec.cluster.parallel is Parallel.sharded and world.size > 1:  # once all is measured that runs on one rank alone
        shard(network, world)
        optimizer = build_optimizer(spec.optim, network)
        if saved.state is not None:
            unpack(saved.files, network, optimizer)
        updater = Updater(spec, network, optimizer, precision)
    if spec.train.compile:
        track.event("compiled", parts=compiled(network, precision, world.device))
    updater.load_tensors(saved.files)
    updater.load(state.updater)
    carry = _carry(spec, network, world, lanes=plan.lanes)
    carry.load(saved.files, at=(state.epoch, state.index))

    def evaluator(split: str) -> Evaluator:
        if planned.batch.streams:
            return ChunkedEvaluator(planned, manifest, reader, split=split, task=task, world=world)
        return Evaluator(planned, manifest, reader, split=split, task=task, world=world, form=form)

    run = Run(
        spec=planned,
        world=world,
        task=task,
        network=network,
        optimizer=optimizer,
        precision=precision,
        feed=feed,
        valid=evaluator("valid"),
        test=evaluator("test"),
        checkpoints=around.saver,
        restore=Restorer(
            around=around, network=network, optimizer=optimizer, updater=updater, carry=carry, fresh=fresh
        ),
        control=around.control,
        track=track,
        start=replace(state, inputs=inputs),
        log_every_s=spec.train.log_every_s,
        updater=updater,
        carry=carry,
    )
    return run, manifest, reader


def _carry(spec: JobSpec, network: Network, world: World, *, lanes: int) -> Carry:
    streams = spec.batch.streams
    return Carried(network, world, lanes=lanes, streams=streams) if streams else NoCarry()


def _form(network: nn.Module, spec: JobSpec, world: World) -> Form:
    """Packed where nothing lays that out anew, or where a device can pad what it was sent without padding."""
    on_device = world.device.type == "cuda" and spec.batch.multiple_of == 1
    return Form.packed if on_device or (isinstance(network, Network) and network.packed) else Form.padded


def _task(spec: JobSpec, plan: Plan, manifest: Manifest) -> Task:
    num_labels = plan.signature.num_labels
    train = manifest.card(plan.data_digest).splits["train"]
    return build_task(spec.task, num_labels, class_weights(spec.task, train, num_labels))


def _precision(
    around: Surroundings, network: nn.Module, task: Task, feed: Feed | StreamFeed, state: TrainState | None
) -> PrecisionChoice:
    """The format of the checkpoint, else the one that the job asks for or that is faster here."""
    if state is not None:
        device = around.world.device.type
        choice = PrecisionChoice(name=state.precision, device=device, why="as before the restart", probe_ms={})
    else:
        # A measurement: a run that is lost before its first checkpoint must not measure anew, and choose otherwise.
        choice = _recorded(around, "precision", PrecisionChoice, lambda: _chosen(around, network, task, feed))
    around.track.event("precision", format=choice.name, why=choice.why, probe_ms=choice.probe_ms)
    return choice


def _chosen(around: Surroundings, network: nn.Module, task: Task, feed: Feed | StreamFeed) -> PrecisionChoice:
    return choose_precision(around.spec.precision.mode, network, task, feed.largest(), around.world)


def _budget(around: Surroundings, learner: Learner, manifest: Manifest) -> int:
    """The slots that this run found when it began, or finds now; rank 0's answer for all ranks."""
    slots = 0
    if around.world.rank == 0:
        found = _recorded(around, "budget", FoundBudget, lambda: _found(around, learner, manifest))
        slots = found.slots
        around.track.event(
            "budget",
            slots=slots,
            largest_slots=found.largest_slots,
            limit_bytes=found.limit_bytes,
            measured_bytes=found.measured_bytes,
            predicted_bytes=found.predicted_bytes,
            trials=len(found.trials),
            why=found.why,
        )
    (total,) = around.world.sum([float(slots)])
    return int(total)


def _recorded(around: Surroundings, kind: str, cls: type[T], find: Callable[[], T]) -> T:
    """What the run's record says; `find` makes it where there is none yet."""
    key, blobs = f"runs/{around.run}/{kind}.json", around.blobs
    if blobs.head(key) is None:
        found = wire.record(kind, 1, find())
        with contextlib.suppress(ConflictError):  # another was first: what it found holds
            blobs.create(key, found)
    return wire.unrecord(cls, blobs.get(key), kind=kind, schema=1, where=key)


def _found(around: Surroundings, learner: Learner, manifest: Manifest) -> FoundBudget:
    spec, plan, world = around.spec, around.plan, around.world
    rows, lengths, targets = _trained(around, manifest)

    def predict(num_rows: int, steps: int, frames: int | None) -> int:
        return training_bytes(
            spec.model,
            spec.task,
            plan.signature,
            spec.optim,
            rows=num_rows,
            time_steps=steps,
            frames=frames,
            labels=longest_target(lengths, targets, steps),
            world=world.size,
            recompute=spec.train.recompute,
        )

    return find_budget(
        learner,
        spec.batch,
        rows,
        lengths,
        targets,
        lanes=plan.lanes,
        limit_bytes=memory_limit(world.device, world.size),
        predict=predict,
    )


def _trained(around: Surroundings, manifest: Manifest) -> tuple[Ints, Ints, Ints]:
    """Training rows by number in the data set, their frames, and their targets."""
    card = manifest.card(around.plan.data_digest).splits["train"]
    rows = trainable_rows(card, around.spec.task)
    return manifest.rows_of("train")[rows], card.lengths_N[rows], card.targets_N[rows]


def _check_batches(around: Surroundings, feed: Feed | StreamFeed) -> None:
    """Nothing, where all ranks plan the same batches, and those that were submitted if the slots were given."""
    batches = feed.plan(0).digest
    as_planned = around.spec.batch.is_auto or batches == around.plan.batch_digest
    if not around.world.agree(batches) or not as_planned:
        raise InternalError("batches: this rank plans other batches than the plan says; do all nodes run one version?")


def _inputs(spec: JobSpec, plan: Plan, manifest: Manifest) -> PlanInputs:
    card = manifest.card(plan.data_digest).splits["train"]
    lengths = card.lengths_N[trainable_rows(card, spec.task)]
    return plan_inputs(spec.batch, lengths, data=plan.data_digest, lanes=plan.lanes, seed=spec.train.seed)
