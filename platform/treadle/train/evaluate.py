"""How good a network is on a split, added up over all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from treadle.data import Batch, Buffers, Form, Lease, Manifest, RowReader, ahead
from treadle.plan import plan_epoch
from treadle.spec import BatchSpec, JobSpec
from treadle.train.frame_tasks import NUM_SHOWN
from treadle.train.precision import PrecisionChoice
from treadle.train.sharding import whole
from treadle.train.task import Answer, Scores, Task, run_network
from treadle.train.world import World

__all__ = ["Evaluation", "Evaluator", "Judged", "Sample"]

NUM_SAMPLES = 40

Judged = tuple[NDArray[np.int64], list[tuple[int, ...]], Answer]
"""The rows of a question, what was accepted, and what was answered."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row as people read it; frames of numbers are shown by the row's name and length."""

    entity: str
    inputs: tuple[str, ...]
    expected: tuple[tuple[str, ...], ...]
    answered: tuple[str, ...]
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Numbers over a whole split, equal on all ranks.

    Args:
        metrics: "loss" first, then the task's, headline next.
        num_rows: questions judged, see `Evaluator`.
        confusion: counts [K + 1, K + 1] of (wanted, answered) labels, the last of each for "nothing".
        samples: some rows of this rank.
    """

    metrics: dict[str, float]
    num_rows: int
    confusion: tuple[tuple[int, ...], ...]
    samples: tuple[Sample, ...]


class Evaluator:
    """Evaluates on one split. Each row is a question; of tasks of frames, each frame that has a target.

    Where a task has alternatives, rows of one entity with equal inputs are one question, and any of their targets is
    right. Rows are dealt to the ranks sorted by length without noise, so that nearly nothing is padded.

    Args:
        spec: with a number of slots.
        form: packed, where the network takes that without laying it out anew.
    """

    def __init__(
        self,
        spec: JobSpec,
        manifest: Manifest,
        reader: RowReader,
        *,
        split: str,
        task: Task,
        world: World,
        form: Form = Form.padded,
    ) -> None:
        self._task = task
        self._reader = reader
        self._world = world
        self._form = form
        self._buffers = Buffers()
        self._names = task.names(manifest.preprocessing)
        self._symbols = manifest.header.content.symbols
        self._questions = _questions(manifest, manifest.rows_of(split), grouped=task.has_alternatives)
        self._lengths = manifest.columns["length"]
        self._batch = BatchSpec(max_slots=spec.batch.max_slots, max_rows=spec.batch.max_rows, noise=0.0)

    def __len__(self) -> int:
        return len(self._questions)

    @torch.no_grad()
    def __call__(self, network: nn.Module, precision: PrecisionChoice) -> Evaluation:
        """The evaluation of `network`, which is put into evaluation mode and back."""
        scores = Scores(self._task.num_labels)
        was_training = network.training
        network.eval()
        try:
            with whole(network):
                samples = self._judged(network, precision, scores)
        finally:
            network.train(was_training)
        return self._summed(scores, samples)

    def _judged(self, network: nn.Module, precision: PrecisionChoice, scores: Scores) -> list[Judged]:
        """Judge this rank's questions, into `scores`."""
        samples: list[Judged] = []
        for groups, batch, lease in ahead(self._batches):
            with precision.autocast():
                logits = run_network(network, batch, self._world.device)
                loss = self._task.loss_sum(logits, batch)
            scores.loss_sum += float(loss)
            scores.loss_count += self._task.count(batch)
            references = [] if self._task.is_per_frame else self._references(groups)
            judged = self._task.judge(scores, logits, batch, references)
            samples += [(group, *found) for group, found in zip(groups, judged, strict=True)]
            lease.release()  # the loss has been read: a device has what it needed
        return samples

    def _batches(self) -> Iterator[tuple[list[NDArray[np.int64]], Batch, Lease]]:
        firsts_N = np.array([group[0] for group in self._questions], np.int64)
        for rows in self._dealt(self._lengths[firsts_N].astype(np.int64)):
            lease = self._buffers.lease()
            batch = self._reader.batch(firsts_N[rows], form=self._form, lease=lease)
            yield [self._questions[i] for i in rows], batch, lease

    def _dealt(self, lengths_N: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """This rank's batches: at most as many slots as in training, but for rows that alone have more."""
        world, is_long_N = self._world, lengths_N > self._batch.slots
        if not is_long_N.all():
            short = np.flatnonzero(~is_long_N)
            plan = plan_epoch(lengths_N[short], self._batch, lanes=world.size, seed=0, epoch=0)
            dealt = (plan.lane_rows(number, world.rank) for number in range(plan.num_rounds))
            yield from (short[rows] for rows in dealt if len(rows))
        yield from np.flatnonzero(is_long_N)[world.rank :: world.size, None]

    def _references(self, groups: list[NDArray[np.int64]]) -> list[list[tuple[int, ...]]]:
        """The accepted labels of each group."""
        labels_BU, lengths_B = self._reader.labels(np.concatenate(groups))
        found = iter([tuple(row[:n].tolist()) for row, n in zip(labels_BU, lengths_B, strict=True)])
        return [list(itertools.islice(found, len(group))) for group in groups]

    def _summed(self, scores: Scores, samples: list[Judged]) -> Evaluation:
        world = self._world
        scores.set_sums(world.sum(scores.sums()))
        scores.counts = world.sum_tensor(scores.counts.to(world.device)).cpu()
        step = max(1, len(samples) // NUM_SAMPLES)
        return Evaluation(
            metrics={"loss": scores.loss_sum / (scores.loss_count or 1.0), **self._task.metrics(scores)},
            num_rows=int(scores.rows),
            confusion=tuple(tuple(int(v) for v in row) for row in scores.counts.tolist()),
            samples=tuple(self._sample(*item) for item in samples[::step][:NUM_SAMPLES]),
        )

    def _inputs(self, group: NDArray[np.int64]) -> tuple[str, ...]:
        if not self._symbols:
            return (self._reader.entity(int(group[0])), f"{self._lengths[group[0]]} frames")
        values = self._reader.raw(group[:1]).values
        return tuple(self._symbols[i] for i in (values[:NUM_SHOWN] if self._task.is_per_frame else values))

    def _sample(self, group: NDArray[np.int64], references: list[tuple[int, ...]], answer: Answer) -> Sample:
        names = self._names
        return Sample(
            entity=self._reader.entity(int(group[0])),
            inputs=self._inputs(group),
            expected=tuple(tuple(names[i] if i >= 0 else "" for i in reference) for reference in references),
            answered=tuple(names[i] for i in answer.labels),
            confidence=answer.confidence,
        )


def _questions(manifest: Manifest, rows_N: NDArray[np.int64], *, grouped: bool) -> list[NDArray[np.int64]]:
    """The rows of each question, by entity: one, or where `grouped` all of one entity with equal inputs."""
    if not len(rows_N):
        return []
    entities_N, inputs_N = manifest.columns["entity"][rows_N], manifest.columns["inputs"][rows_N]
    order_N = np.lexsort((inputs_N, entities_N))
    changes = (np.diff(entities_N[order_N]) != 0) | (np.diff(inputs_N[order_N]) != 0)
    starts = np.flatnonzero(changes | (not grouped)) + 1
    return np.split(rows_N[order_N], starts)
