"""Tasks with a target for each frame: the next symbol, or a label. Their logits and targets are packed.

Shape letters: B rows, T time steps, N frames of all rows laid end to end, K classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from treadle.data import Batch, Form, Preprocessing, StreamBatch
from treadle.spec import LanguageSpec, TagSpec
from treadle.train.scores import Answer, Scores, Task

__all__ = ["NUM_SHOWN", "FrameTask", "LanguageTask", "TagTask"]

Ints = NDArray[np.int64]

_NONE = -1
"""The target of a frame that has none."""
NUM_SHOWN = 64
"""Frames of a row that people are shown."""
_LIKELIEST = 5
_MOST_NATS = 700.0
"""Above it the perplexity is beyond the largest float."""


class FrameTask(Task):
    """One target for each frame; where there is none, nothing is learned and nothing judged."""

    has_alternatives = False
    is_per_frame = True
    label_smoothing = 0.0

    @abstractmethod
    def targets(self, batch: Batch | StreamBatch) -> Ints:
        """The class of each frame [N], -1 for none."""

    def count(self, batch: Batch | StreamBatch) -> float:
        has_N = self.targets(batch) != _NONE
        weights_N = _weights(batch)
        return float(has_N.sum()) if weights_N is None else float(weights_N[has_N].sum(dtype=np.float64))

    def loss_sum(self, logits: Tensor, batch: Batch | StreamBatch) -> Tensor:
        targets_N = torch.from_numpy(self.targets(batch)).to(logits.device, non_blocking=True)
        weights_N, smoothing = _weights(batch), self.label_smoothing
        reduction = "sum" if weights_N is None else "none"
        loss = functional.cross_entropy(
            _wide(logits), targets_N, ignore_index=_NONE, label_smoothing=smoothing, reduction=reduction
        )
        return loss if weights_N is None else loss @ torch.from_numpy(weights_N).to(loss)

    def judge(
        self,
        scores: Scores,
        logits: Tensor,
        batch: Batch | StreamBatch,
        references_B: Sequence[list[tuple[int, ...]]],
    ) -> list[tuple[list[tuple[int, ...]], Answer]]:
        """Add a batch to the scores; gives the beginning of what was wanted and answered of each row."""
        del references_B
        targets_N, sure_N, best_N = self.targets(batch), *_best(logits)
        has_N = targets_N != _NONE
        starts_B = np.cumsum(batch.lengths_B) - batch.lengths_B
        scores.rows += len(starts_B)
        self.add_frames(scores, targets_N[has_N], best_N[has_N])
        return [
            ([tuple(targets_N[a:b].tolist())], Answer(labels=tuple(best_N[a:b].tolist()), confidence=float(sure_N[a])))
            for a, b in zip(starts_B, starts_B + np.minimum(batch.lengths_B, NUM_SHOWN), strict=True)
        ]

    @abstractmethod
    def add_frames(self, scores: Scores, wanted_N: Ints, given_N: Ints) -> None:
        """Count frames that have a target."""


class LanguageTask(FrameTask):
    """The next symbol of the same row. A symbol that training did not know is a class of its own, as it is an input."""

    def __init__(self, spec: LanguageSpec, num_labels: int) -> None:
        super().__init__(0)  # a vocabulary may have too many symbols for a matrix of them
        del num_labels
        self.spec = spec

    def names(self, preprocessing: Preprocessing) -> tuple[str, ...]:
        return preprocessing.symbols

    def normaliser(self, *, frames: float, rows: float) -> float:
        # The last symbol of a row predicts none. At least 1: an update may hold nothing but ends of rows.
        return max(1.0, frames - rows)

    def targets(self, batch: Batch | StreamBatch) -> Ints:
        if isinstance(batch, StreamBatch):
            assert batch.next_N is not None
            return batch.next_N
        inputs_N = batch.inputs if batch.form is Form.packed else _packed(batch.inputs, batch.lengths_B)
        next_N = np.empty_like(inputs_N)
        next_N[:-1] = inputs_N[1:]
        next_N[np.cumsum(batch.lengths_B) - 1] = _NONE
        return next_N

    def add_frames(self, scores: Scores, wanted_N: Ints, given_N: Ints) -> None:
        scores.judged += len(wanted_N)
        scores.right += int((wanted_N == given_N).sum())

    def answers(self, logits: Tensor, lengths_B: Tensor) -> list[Answer]:
        """The symbol after each row's last; symbol 0, which stands for unknown ones, is nobody's answer."""
        probabilities_BK = _wide(logits[lengths_B.cumsum(0) - 1]).softmax(-1)[:, 1:]
        sure_BK, best_BK = probabilities_BK.topk(min(_LIKELIEST, probabilities_BK.shape[1]))
        found = zip((best_BK + 1).tolist(), sure_BK.tolist(), strict=True)
        return [
            Answer(labels=(best[0],), confidence=sure[0], likeliest=tuple(zip(best, sure, strict=True)))
            for best, sure in found
        ]

    def metrics(self, totals: Scores) -> dict[str, float]:
        nats = totals.loss_sum / (totals.loss_count or 1.0)
        return {
            "perplexity": math.exp(min(nats, _MOST_NATS)),
            "bits_per_symbol": nats / math.log(2),
            "accuracy": totals.right / (totals.judged or 1.0),
        }


class TagTask(FrameTask):
    """One label for each frame that has one."""

    counts_ahead = False  # a plan knows frames, not which of them have a label

    def __init__(self, spec: TagSpec, num_labels: int) -> None:
        super().__init__(num_labels)
        self.spec = spec
        self.label_smoothing = spec.label_smoothing

    def normaliser(self, *, frames: float, rows: float) -> float:
        del rows
        return frames

    def targets(self, batch: Batch | StreamBatch) -> Ints:
        if isinstance(batch, StreamBatch):
            assert batch.labels_N is not None
            return batch.labels_N
        return _packed(batch.labels_BU, batch.lengths_B)

    def add_frames(self, scores: Scores, wanted_N: Ints, given_N: Ints) -> None:
        size = self.num_labels + 1
        pairs = np.bincount(wanted_N * size + given_N, minlength=size * size)
        scores.counts += torch.from_numpy(pairs).view(size, size)

    def answers(self, logits: Tensor, lengths_B: Tensor) -> list[Answer]:
        """The label of each frame; as sure as of a frame on average."""
        sure_N, best_N = _best(logits)
        ends_B = np.cumsum(lengths_B.numpy())
        return [
            Answer(labels=tuple(best_N[a:b].tolist()), confidence=float(sure_N[a:b].mean()))
            for a, b in zip(ends_B - lengths_B.numpy(), ends_B, strict=True)
        ]

    def metrics(self, totals: Scores) -> dict[str, float]:
        return {
            "accuracy": float(totals.counts.diagonal().sum()) / (totals.references or 1.0),
            "macro_f1": totals.macro_f1,
        }


def _best(logits: Tensor) -> tuple[NDArray[np.float32], Ints]:
    """How likely the likeliest class of each frame is, and which it is."""
    sure_N, best_N = _wide(logits).softmax(-1).max(-1)
    return sure_N.cpu().numpy(), best_N.cpu().numpy()


def _wide(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return logits if logits.dtype is torch.float64 else logits.float()


def _packed(values_BT: Ints, lengths_B: Ints) -> Ints:
    """The values at real frames, row by row."""
    return values_BT[np.arange(values_BT.shape[1]) < lengths_B[:, None]]


def _weights(batch: Batch | StreamBatch) -> NDArray[np.float32] | None:
    """What each frame counts; None where all count 1."""
    if isinstance(batch, StreamBatch) or (batch.weights_B == 1).all():
        return None
    return np.repeat(batch.weights_B, batch.lengths_B)
