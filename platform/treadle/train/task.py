"""What a network learns: the loss of a batch, its answers, and how right they are.

Shape letters: B rows, T time steps, K label classes, U labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treadle.data import Batch, Form
from treadle.nn import classify_loss_sum, ctc_greedy, ctc_loss_sum
from treadle.plan import SplitCard
from treadle.spec import ClassifySpec, ClassWeights, CtcSpec, TaskSpec
from treadle.train.align import align

__all__ = ["Answer", "Task", "build_task", "class_weights", "run_network"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network says of one row: label ids, and how sure it is (0 to 1)."""

    labels: tuple[int, ...]
    confidence: float


class Task(ABC):
    """One kind of target. Sums go in and out, so that ranks and batches of any size add up.

    Args:
        num_labels: labels (classes) of the data set.
    """

    has_alternatives: ClassVar[bool]
    """Whether a question may have several right answers, each written as a row of its own, such as the pronunciations
    of a word. A class that is another in another row of the same inputs is a contradiction instead."""

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    @abstractmethod
    def normaliser(self, *, frames: float, rows: float) -> float:
        """What the summed loss of so many time steps in so many rows is divided by: label frames, or rows.

        Args:
            frames, rows: counted by the weights of the rows, so that what is left is a weighted mean.
        """

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """The normaliser of what `loss_sum` adds up of `batch`."""

    @abstractmethod
    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each row times what it counts, summed; rows whose target has no alignment add nothing."""

    def row_weights(self, weights_B: NDArray[np.float32], labels_B: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each row counts in the loss.

        Args:
            weights_B: of the data set. labels_B: of each row, where there is one per row, else anything.
        """
        del labels_B
        return weights_B.astype(np.float64)

    @abstractmethod
    def answers(self, logits: Tensor, lengths_B: Tensor) -> list[Answer]:
        """The most likely labels of each row."""

    @abstractmethod
    def metrics(self, totals: Scores) -> dict[str, float]:
        """The evaluation's numbers, headline first, out of summed scores."""

    def score(self, answer: Answer, references: Sequence[tuple[int, ...]]) -> Score:
        """How far `answer` is from the nearest of the accepted references."""
        found = [Score(pairs=tuple(align(reference, answer.labels))) for reference in references]
        return min(found, key=lambda s: s.edits)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One answer aligned with its reference: (label or None, answered label or None) pairs."""

    pairs: tuple[tuple[int | None, int | None], ...]

    @property
    def edits(self) -> int:
        return sum(want != got for want, got in self.pairs)


class Scores:
    """Alignments summed over rows as one matrix, so that ranks add theirs up.

    `counts[want, got]`; the last row and column stand for "nothing": insertions and deletions.
    """

    def __init__(self, num_labels: int) -> None:
        self.counts = torch.zeros(num_labels + 1, num_labels + 1, dtype=torch.float64)
        self.rows = 0.0
        self.wrong_rows = 0.0
        self.loss_sum = 0.0
        self.loss_count = 0.0

    def add(self, score: Score) -> None:
        nothing = len(self.counts) - 1
        for want, got in score.pairs:
            self.counts[nothing if want is None else want, nothing if got is None else got] += 1
        self.rows += 1
        self.wrong_rows += score.edits > 0

    @property
    def references(self) -> float:
        return float(self.counts[:-1].sum())

    @property
    def edits(self) -> float:
        return float(self.counts.sum() - self.counts.diagonal().sum())


class CtcTask(Task):
    """Labels without alignment; best path decoding (Graves et al. 2006, section 3.2)."""

    has_alternatives = True

    def __init__(self, spec: CtcSpec, num_labels: int) -> None:
        super().__init__(num_labels)
        self.spec = spec

    def normaliser(self, *, frames: float, rows: float) -> float:
        return float(frames * self.spec.frames_per_step)

    def count(self, batch: Batch) -> float:
        kept = self._aligned(batch)
        weights_B = batch.weights_B[kept].astype(np.float64)
        return self.normaliser(frames=float(weights_B @ batch.lengths_B[kept]), rows=float(weights_B.sum()))

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        kept = self._aligned(batch)
        if not kept.any():
            return logits.new_zeros((), dtype=torch.float32)
        if not kept.all():  # in evaluation only: training leaves such rows out
            logits = logits[torch.from_numpy(kept).to(logits.device)]
        lengths = torch.from_numpy(batch.lengths_B[kept]) * self.spec.frames_per_step
        targets_BU = torch.from_numpy(batch.labels_BU[kept]) + 1  # 0 is the blank
        target_lengths = torch.from_numpy(batch.label_lengths_B[kept])
        weights_B = _weights_on(logits.device, batch.weights_B[kept])
        return ctc_loss_sum(logits, lengths, targets_BU.to(logits.device), target_lengths, weights_B)

    def _aligned(self, batch: Batch) -> NDArray[np.bool_]:
        """Which rows have an alignment: a frame per label, and a blank between equal neighbours."""
        labels_BU = batch.labels_BU
        real = np.arange(1, labels_BU.shape[1]) < batch.label_lengths_B[:, None]
        repeats = ((labels_BU[:, 1:] == labels_BU[:, :-1]) & real).sum(1)
        return batch.label_lengths_B + repeats <= batch.lengths_B * self.spec.frames_per_step

    def answers(self, logits: Tensor, lengths_B: Tensor) -> list[Answer]:
        lengths = lengths_B * self.spec.frames_per_step
        best = logits.float().log_softmax(-1).amax(-1).cpu()
        # Geometric mean of the best frame probabilities: 1 where every frame is certain.
        sure = [float(best[i, : int(n)].mean().exp()) for i, n in enumerate(lengths)]
        labels = ctc_greedy(logits, lengths)
        return [Answer(labels=tuple(v - 1 for v in row), confidence=c) for row, c in zip(labels, sure, strict=True)]

    def metrics(self, totals: Scores) -> dict[str, float]:
        return {
            f"{self.spec.label_name}_error_rate": totals.edits / totals.references,
            f"{self.spec.sequence_name}_error_rate": totals.wrong_rows / totals.rows,
        }


class ClassifyTask(Task):
    """One class per row.

    Args:
        class_weights_K: what a row counts by its label, beside its own weight; 1 where None.
    """

    has_alternatives = False

    def __init__(self, spec: ClassifySpec, num_labels: int, class_weights_K: NDArray[np.float64] | None = None) -> None:
        super().__init__(num_labels)
        self.spec = spec
        self.class_weights_K = class_weights_K

    def normaliser(self, *, frames: float, rows: float) -> float:
        return float(rows)

    def count(self, batch: Batch) -> float:
        return self.normaliser(frames=batch.frames, rows=float(self._weights(batch).sum()))

    def loss_sum(self, logits: Tensor, batch: Batch) -> Tensor:
        targets_B = torch.from_numpy(batch.labels_BU[:, 0]).to(logits.device)
        weights_B = _weights_on(logits.device, self._weights(batch))
        return classify_loss_sum(logits, targets_B, self.spec.label_smoothing, weights_B=weights_B)

    def row_weights(self, weights_B: NDArray[np.float32], labels_B: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = weights_B.astype(np.float64)
        return weights if self.class_weights_K is None else weights * self.class_weights_K[labels_B]

    def _weights(self, batch: Batch) -> NDArray[np.float64]:
        return self.row_weights(batch.weights_B, batch.labels_BU[:, 0])

    def answers(self, logits: Tensor, lengths_B: Tensor) -> list[Answer]:
        sure, best = logits.float().softmax(-1).max(-1)
        pairs = zip(best.tolist(), sure.tolist(), strict=True)
        return [Answer(labels=(label,), confidence=confidence) for label, confidence in pairs]

    def metrics(self, totals: Scores) -> dict[str, float]:
        counts = totals.counts[:-1, :-1]
        right, wanted, given = counts.diagonal(), counts.sum(1), counts.sum(0)
        f1 = 2 * right / (wanted + given).clamp(min=1)
        return {
            "accuracy": (totals.rows - totals.wrong_rows) / totals.rows,
            "macro_f1": float(f1[wanted > 0].mean()),
        }


_TASKS: dict[type[TaskSpec], Any] = {CtcSpec: CtcTask, ClassifySpec: ClassifyTask}


def build_task(spec: TaskSpec, num_labels: int, class_weights_K: NDArray[np.float64] | None = None) -> Task:
    """The task that `spec` asks for; with the weights of `class_weights`, where a network is trained or judged."""
    if class_weights_K is not None:
        assert isinstance(spec, ClassifySpec)
        return ClassifyTask(spec, num_labels, class_weights_K)
    return _TASKS[type(spec)](spec, num_labels)


def class_weights(spec: TaskSpec, train: SplitCard, num_labels: int) -> NDArray[np.float64] | None:
    """What rows of each label count, so that all labels count alike; None where the task does not ask for it.

    A label that K labels' training rows have n times of N in all counts N / (K n): 1 where all are as frequent.
    """
    if not isinstance(spec, ClassifySpec) or spec.class_weights is ClassWeights.none:
        return None
    counts_K = np.bincount(train.labels_N[train.labels_N >= 0], minlength=num_labels)
    return counts_K.sum() / (num_labels * np.maximum(counts_K, 1))


def run_network(network: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The logits of a batch."""
    inputs, lengths_B = torch.from_numpy(batch.inputs).to(device, non_blocking=True), torch.from_numpy(batch.lengths_B)
    return network(inputs, lengths_B, packed=True) if batch.form is Form.packed else network(inputs, lengths_B)


def _weights_on(device: torch.device, weights_B: NDArray[Any]) -> Tensor | None:
    """None where all rows count 1: the sum is then what it is without weights, to the last bit."""
    return None if (weights_B == 1).all() else torch.from_numpy(weights_B).to(device)
