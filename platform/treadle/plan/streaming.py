"""Whether a job's sequences can be read as streams whose state goes on from update to update, and what that takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError
from treadle.plan.activations import output_width, state_size
from treadle.plan.cards import DataCard
from treadle.plan.size import training_bytes
from treadle.plan.streams import StreamPlan, plan_streams
from treadle.spec import AugmentSpec, BatchSpec, InputKind, JobSpec, LanguageSpec, LstmSpec, ModelSpec, TagSpec

__all__ = ["carried_values", "check_streams", "streams_of", "streams_plan"]


def streams_plan(spec: JobSpec, card: DataCard, rows: NDArray[np.int64]) -> tuple[StreamPlan, int]:
    """The streams of epoch 0, and what a microbatch of them takes of a worker's memory with the states it carries.

    Args:
        rows: that are trained on, of the card's split "train".

    Raises:
        ConfigError: a network, task or batch that cannot carry a state, or fewer frames than streams.
    """
    train, world = card.splits["train"], max(1, spec.cluster.workers)
    check_streams(spec, train.weights_N[rows])
    lanes = spec.batch.lanes or world
    plan = streams_of(spec.batch, train.lengths_N[rows], lanes=lanes, seed=spec.train.seed, epoch=0)
    width = spec.model.embedding_size if card.signature.input_kind is InputKind.tokens else card.signature.input_size
    carried = -(-lanes // world) * plan.rows_per_lane * carried_values(spec.model, width)
    size = training_bytes(
        spec.model,
        spec.task,
        card.signature,
        spec.optim,
        rows=plan.rows_per_lane,
        time_steps=plan.chunk,
        world=world,
        recompute=spec.train.recompute,
    )
    return plan, size + 4 * carried


def streams_of(batch: BatchSpec, lengths_N: NDArray[np.int64], *, lanes: int, seed: int, epoch: int) -> StreamPlan:
    """The streams of an epoch, of a batch spec that asks for them."""
    assert batch.streams is not None
    return plan_streams(lengths_N, lanes=lanes, rows_per_lane=batch.streams, chunk=batch.chunk, seed=seed, epoch=epoch)


def check_streams(spec: JobSpec, weights_N: NDArray[np.float32]) -> None:
    """Nothing, where this job can carry its state from update to update.

    Args:
        weights_N: of the rows that are trained on.

    Raises:
        ConfigError: otherwise; a line for each reason.
    """
    problems = [*_of_model(spec), *_of_batch(spec.batch)]
    if spec.augment != AugmentSpec():
        problems.append("augment: got changes of rows, expected none")
    if (weights_N != 1).any():
        problems.append(f"data.{spec.data.name}: got rows of weight {weights_N[weights_N != 1][0]:g}, expected 1 each")
    if problems:
        raise ConfigError(
            f"batch.streams: got {spec.batch.streams}, which this job cannot carry a state through\n"
            + "\n".join(problems),
            hint="the keys above as expected, or batch.streams=null to read whole rows",
        )


def _of_model(spec: JobSpec) -> list[str]:
    problems: list[str] = []
    if not isinstance(spec.task, LanguageSpec | TagSpec):
        problems.append(f"task: got {spec.task.kind}, expected language or tag: one target a frame")
    if spec.model.bidirectional:
        problems.append("model.bidirectional: got true, expected false: nothing is known of what comes later")
    if spec.model.attention_every and spec.model.attention_window is None:
        problems.append("model.attention_window: got null, expected a number of frames")
    return problems


def _of_batch(batch: BatchSpec) -> list[str]:
    problems: list[str] = []
    slots = (batch.streams or 0) * batch.chunk
    if batch.is_auto:
        problems.append(f"batch.max_slots: got auto, expected a number, such as {slots}")
    elif slots > batch.slots:
        problems.append(
            f"batch.max_slots: got {batch.slots}, expected at least {slots}, {batch.streams} streams x {batch.chunk} "
            "frames (batch.chunk)"
        )
    for name, alone in (("rounds_per_update", 1), ("multiple_of", 1), ("class_balance", 0)):
        if (value := getattr(batch, name)) != alone:
            problems.append(f"batch.{name}: got {value:g}, expected {alone}")
    return problems


def carried_values(model: ModelSpec, width: int) -> int:
    """Numbers that one stream carries from update to update: states, the frames of convolutions and windows.

    Args:
        width: of what the first layer reads.
    """
    layers, out = model.num_layers, output_width(model)
    total = layers * state_size(model) * (2 if isinstance(model, LstmSpec) else 1)
    if model.conv_size:
        total += (model.conv_size - 1) * (width + (layers - 1) * out)
    if model.attention_every and model.attention_window is not None:
        total += layers // model.attention_every * (2 * (model.attention_window - 1) * out + 1)
    return total
