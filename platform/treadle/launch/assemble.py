"""A rank's run, put together from what the store holds: data, network, state, precision and budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from treadle import wire
from treadle.data import Form, Manifest, RowReader, load_manifest
from treadle.errors import ConflictError, InternalError, TransientError
from treadle.launch.datasets import open_reader
from treadle.nn import Network, build_network
from treadle.plan import Plan, PlanInputs, plan_inputs, trainable_rows, with_slots
from treadle.plan.size import longest_target, training_bytes
from treadle.spec import JobSpec
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
from treadle.train.rehearse import rehearse
from treadle.train.task import class_weights

__all__ = ["Surroundings", "assemble", "budget_key"]

Ints = NDArray[np.int64]

_BUDGET = ("budget", 1)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where a rank stands.

    Args:
        run: its id. spec, plan: as submitted.
        checkpoints: of the run, to start from; saver: where new ones go.
    """

    blobs: Blobs
    run: str
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
    optimizer = build_optimizer(spec.optim, network)
    form = _form(network, spec, world)
    state = _restored(around, network, optimizer)

    def feed_of(batches: JobSpec) -> Feed:
        return Feed(batches, manifest, reader, lanes=plan.lanes, world=world, form=form, task=task)

    planned = replace(spec, batch=with_slots(spec.batch, plan.max_slots))
    precision = _precision(around, network, task, feed_of(planned), state)
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
    if world.device.type == "cuda":  # a host swaps where a device stops, and its updates are slow
        rows, _, targets = _trained(around, manifest)
        rehearse(learner, feed.plan(0), rows, targets)
    inputs = _inputs(planned, plan, manifest)
    state = TrainState(precision=precision.name) if state is None else state
    state.check(inputs)
    world.share_weights(network)

    def evaluator(split: str) -> Evaluator:
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
        control=around.control,
        track=track,
        start=replace(state, inputs=inputs),
        log_every_s=spec.train.log_every_s,
    )
    return run, manifest, reader


def _form(network: nn.Module, spec: JobSpec, world: World) -> Form:
    """Packed where nothing lays that out anew, or where a device can pad what it was sent without padding."""
    on_device = world.device.type == "cuda" and spec.batch.multiple_of == 1
    return Form.packed if on_device or (isinstance(network, Network) and network.packed) else Form.padded


def _task(spec: JobSpec, plan: Plan, manifest: Manifest) -> Task:
    num_labels = plan.signature.num_labels
    train = manifest.card(plan.data_digest).splits["train"]
    return build_task(spec.task, num_labels, class_weights(spec.task, train, num_labels))


def _restored(around: Surroundings, network: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState | None:
    """The state of the newest checkpoint, its weights and moments put in; None where there is none."""
    found = around.checkpoints.restore()
    if not around.world.agree(wire.digest(found[0].prefix if found else "")):
        raise TransientError("checkpoint: the ranks read different ones", hint=f"treadle resume {around.run}")
    if found is None:
        return None
    kept, files = found
    unpack(files, network, optimizer)
    state = TrainState.from_json(kept.state, where=f"{kept.prefix}: state")
    around.track.event("restored", update=state.update, epoch=state.epoch)
    return state


def _precision(
    around: Surroundings, network: nn.Module, task: Task, feed: Feed, state: TrainState | None
) -> PrecisionChoice:
    """The format of the checkpoint, else the one that the job asks for or that is faster here."""
    if state is not None:
        device = around.world.device.type
        choice = PrecisionChoice(name=state.precision, device=device, why="as before the restart", probe_ms={})
    else:
        choice = choose_precision(around.spec.precision.mode, network, task, feed.largest(), around.world)
    around.track.event("precision", format=choice.name, why=choice.why, probe_ms=choice.probe_ms)
    return choice


def _budget(around: Surroundings, learner: Learner, manifest: Manifest) -> int:
    """The slots that this run found when it began, or finds now; rank 0's answer for all ranks."""
    slots = 0
    if around.world.rank == 0:
        found = _recorded(around, lambda: _found(around, learner, manifest))
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


def _recorded(around: Surroundings, find: Callable[[], FoundBudget]) -> FoundBudget:
    """What the run's record says; `find` makes it where there is none yet."""
    key, blobs = budget_key(around.run), around.blobs
    if blobs.head(key) is None:
        found = wire.record(*_BUDGET, find())
        with contextlib.suppress(ConflictError):  # another attempt was first: its budget holds
            blobs.create(key, found)
    return wire.unrecord(FoundBudget, blobs.get(key), kind=_BUDGET[0], schema=_BUDGET[1], where=key)


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


def _check_batches(around: Surroundings, feed: Feed) -> None:
    """Nothing, where all ranks plan the same batches, and those that were submitted if the slots were given."""
    batches = feed.plan(0).digest
    as_planned = around.spec.batch.is_auto or batches == around.plan.batch_digest
    if not around.world.agree(batches) or not as_planned:
        raise InternalError("batches: this rank plans other batches than the plan says; do all nodes run one version?")


def _inputs(spec: JobSpec, plan: Plan, manifest: Manifest) -> PlanInputs:
    card = manifest.card(plan.data_digest).splits["train"]
    lengths = card.lengths_N[trainable_rows(card, spec.task)]
    return plan_inputs(spec.batch, lengths, data=plan.data_digest, lanes=plan.lanes, seed=spec.train.seed)
