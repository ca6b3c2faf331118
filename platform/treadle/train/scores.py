"""What a task is: the loss of a batch, its answers, and how right they are, in sums that add up over batches and ranks.

Shape letters: B rows, K label classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.data import Batch, Preprocessing
from treadle.train.align import align

__all__ = ["Answer", "Score", "Scores", "Task"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network says of one row.

    Args:
        labels: ids. confidence: how sure it is, 0 to 1.
        likeliest: ids with their probabilities, the likeliest first, where a task answers with several.
    """

    labels: tuple[int, ...]
    confidence: float
    likeliest: tuple[tuple[int, float], ...] = ()


class Task(ABC):
    """One kind of target. Sums go in and out, so that ranks and batches of any size add up.

    Args:
        num_labels: labels (classes) of the data set.
    """

    has_alternatives: ClassVar[bool]
    """Whether a question may have several right answers, each written as a row of its own, such as the pronunciations
    of a word. A class that is another in another row of the same inputs is a contradiction instead."""
    is_per_frame: ClassVar[bool] = False
    """Whether targets belong to frames and come with the batch; see `treadle.train.frame_tasks`."""
    counts_ahead: ClassVar[bool] = True
    """Whether `normaliser` knows the count of an update from its frames and rows alone; else batches are counted."""

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def names(self, preprocessing: Preprocessing) -> tuple[str, ...]:
        """What an answered id is called."""
        return preprocessing.labels

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

    def judge(
        self, scores: Scores, logits: Tensor, batch: Batch, references_B: Sequence[list[tuple[int, ...]]]
    ) -> list[tuple[list[tuple[int, ...]], Answer]]:
        """Add a batch to the scores; gives what was accepted of each row, and what was answered.

        Args:
            references_B: accepted labels of each row; empty for tasks of frames, which have them in the batch.
        """
        answers = self.answers(logits, torch.from_numpy(batch.lengths_B))
        judged = list(zip(references_B, answers, strict=True))
        for references, answer in judged:
            scores.add(self.score(answer, references))
        return judged

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

    `counts[want, got]`; the last row and column stand for "nothing": insertions and deletions. Tasks with too many
    labels for a matrix count `judged` and `right` alone.
    """

    def __init__(self, num_labels: int) -> None:
        self.counts = torch.zeros(num_labels + 1, num_labels + 1, dtype=torch.float64)
        self.rows = 0.0
        self.wrong_rows = 0.0
        self.judged = 0.0
        self.right = 0.0
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

    @property
    def macro_f1(self) -> float:
        """F1 of each label, averaged over the labels that occur."""
        counts = self.counts[:-1, :-1]
        right, wanted, given = counts.diagonal(), counts.sum(1), counts.sum(0)
        f1 = 2 * right / (wanted + given).clamp(min=1)
        return float(f1[wanted > 0].mean())

    def sums(self) -> list[float]:
        """All but `counts`, as one list of numbers to be added up over ranks."""
        return [self.rows, self.wrong_rows, self.judged, self.right, self.loss_sum, self.loss_count]

    def set_sums(self, sums: Sequence[float]) -> None:
        """Take back what `sums` gave."""
        self.rows, self.wrong_rows, self.judged, self.right, self.loss_sum, self.loss_count = sums
