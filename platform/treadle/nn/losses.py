"""Losses summed over a batch, and the labels that a CTC output stands for.

Shape letters: B rows, T label frames, K classes (for CTC: the blank, 0, and labels 1 to K - 1), U labels.

Losses are sums: the caller divides by the frames of the whole update, so that neither padding nor
the split into microbatches weighs on a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from treadle.nn.rows import Lengths

__all__ = ["BLANK", "classify_loss_sum", "ctc_greedy", "ctc_loss_sum"]

BLANK = 0
"""The CTC class that stands for no label."""


def ctc_loss_sum(logits_BTK: Tensor, label_lengths_B: Lengths, targets: Tensor, target_lengths_B: Lengths) -> Tensor:
    """Negative log-likelihood of the targets, summed over rows, in fp32.

    Source: Graves et al. 2006.

    Args:
        logits_BTK: scores before the softmax, any float format.
        label_lengths_B: label frames of each row, on the CPU.
        targets: labels from 1, padded [B, U] or of all rows end to end [sum of target lengths].
        target_lengths_B: labels of each row, on the CPU.

    Returns:
        A scalar; infinite where a row has fewer label frames than labels and neighbouring repeats.
    """
    # Sum, not torch's mean: that divides every row by its own target length first.
    log_probs_TBK = functional.log_softmax(logits_BTK.float(), dim=-1).transpose(0, 1)
    frames_B, labels_B = _on_host(label_lengths_B), _on_host(target_lengths_B)
    return functional.ctc_loss(log_probs_TBK, targets, frames_B, labels_B, blank=BLANK, reduction="sum")


def ctc_greedy(logits_BTK: Tensor, label_lengths_B: Lengths) -> list[list[int]]:
    """The labels (from 1) of each row's likeliest alignment: repeats collapsed, then blanks dropped."""
    with torch.no_grad():
        best_BT = logits_BTK.argmax(dim=-1).cpu()
    changed_BT = torch.ones_like(best_BT, dtype=torch.bool)
    changed_BT[:, 1:] = best_BT[:, 1:] != best_BT[:, :-1]
    valid_BT = torch.arange(best_BT.shape[1]) < _on_host(label_lengths_B)[:, None]
    kept_BT = changed_BT & valid_BT & (best_BT != BLANK)
    return [best_T[kept_T].tolist() for best_T, kept_T in zip(best_BT, kept_BT, strict=True)]


def classify_loss_sum(logits_BK: Tensor, targets_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the targets (classes from 0), summed over rows, in fp32."""
    return functional.cross_entropy(logits_BK.float(), targets_B, reduction="sum", label_smoothing=label_smoothing)


def _on_host(lengths_B: Lengths) -> Tensor:
    return torch.as_tensor(lengths_B, dtype=torch.int64, device="cpu")
