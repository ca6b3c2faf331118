"""What a network learns of whole rows, and which task a job asks for.

Shape letters: B rows, T time steps, K label classes, U labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treadle.data import Batch, Form
from treadle.nn import classify_loss_sum, ctc_greedy, ctc_loss_sum
from treadle.plan import SplitCard
from treadle.spec import ClassifySpec, ClassWeights, CtcSpec, LanguageSpec, TagSpec, TaskSpec
from treadle.train.frame_tasks import LanguageTask, TagTask
from treadle.train.scores import Answer, Score, Scores, Task

__all__ = ["Answer", "Score", "Scores", "Task", "build_task", "class_weights", "run_network"]


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
        return {"accuracy": (totals.rows - totals.wrong_rows) / totals.rows, "macro_f1": totals.macro_f1}


_TASKS: dict[type[TaskSpec], Any] = {
    CtcSpec: CtcTask,
    ClassifySpec: ClassifyTask,
    LanguageSpec: LanguageTask,
    TagSpec: TagTask,
}


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
