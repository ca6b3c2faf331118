"""Losses summed over a batch, and the labels that a CTC output stands for.

Shape letters: B rows, T label frames, N frames of all rows laid end to end, K classes (for CTC: the blank, 0, and
labels 1 to K - 1), U labels, Q quantile levels. Where a shape begins with `...`, any leading shape will do.

Losses are sums in fp32 (fp64 beside fp64): the caller divides by the rows or frames of the whole update, so that
neither padding nor the split into microbatches weighs on a row. Losses of survival times are in `survival`.

Targets that stand on the host are checked, and the message names the first bad one; on a device they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from treadle.errors import ConfigError
from treadle.nn.checks import (
    IGNORED,
    check_at_least,
    check_classes,
    check_levels,
    check_numbers,
    check_same_shape,
    per_class,
    refuse,
)
from treadle.nn.gates import state_dtype
from treadle.nn.rows import Lengths

__all__ = [
    "BLANK",
    "IGNORED",
    "binary_focal_loss_sum",
    "class_weight_sum",
    "classify_loss_sum",
    "ctc_greedy",
    "ctc_loss_sum",
    "focal_loss_sum",
    "gaussian_nll_sum",
    "huber_loss_sum",
    "logit_adjusted_loss_sum",
    "pinball_loss_sum",
    "squared_loss_sum",
    "tag_loss_sum",
]

BLANK = 0
"""The CTC class that stands for no label."""


def ctc_loss_sum(
    logits_BTK: Tensor,
    label_lengths_B: Lengths,
    targets: Tensor,
    target_lengths_B: Lengths,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the targets, summed over rows, in fp32.

    Source: Graves et al. 2006.

    Args:
        logits_BTK: scores before the softmax, any float format.
        label_lengths_B: label frames of each row, on the CPU.
        targets: labels from 1, padded [B, U] or of all rows end to end [sum of target lengths].
        target_lengths_B: labels of each row, on the CPU.
        weights_B: what each row counts; 1 where None.

    Returns:
        A scalar; infinite where a row has fewer label frames than labels and neighbouring repeats.
    """
    # Sum, not torch's mean: that divides every row by its own target length first.
    log_probs_TBK = functional.log_softmax(_wide(logits_BTK), dim=-1).transpose(0, 1)
    frames_B, labels_B = _on_host(label_lengths_B), _on_host(target_lengths_B)
    if weights_B is None:
        return functional.ctc_loss(log_probs_TBK, targets, frames_B, labels_B, blank=BLANK, reduction="sum")
    losses_B = functional.ctc_loss(log_probs_TBK, targets, frames_B, labels_B, blank=BLANK, reduction="none")
    return (losses_B * weights_B.to(losses_B)).sum()


def ctc_greedy(logits_BTK: Tensor, label_lengths_B: Lengths) -> list[list[int]]:
    """The labels (from 1) of each row's likeliest alignment: repeats collapsed, then blanks dropped."""
    with torch.no_grad():
        best_BT = logits_BTK.argmax(dim=-1).cpu()
    changed_BT = torch.ones_like(best_BT, dtype=torch.bool)
    changed_BT[:, 1:] = best_BT[:, 1:] != best_BT[:, :-1]
    valid_BT = torch.arange(best_BT.shape[1]) < _on_host(label_lengths_B)[:, None]
    kept_BT = changed_BT & valid_BT & (best_BT != BLANK)
    return [best_T[kept_T].tolist() for best_T, kept_T in zip(best_BT, kept_BT, strict=True)]


def classify_loss_sum(
    logits_BK: Tensor,
    targets_B: Tensor,
    label_smoothing: float = 0.0,
    class_weights_K: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the targets, each times its weight and that of its class, summed over rows.

    Args:
        logits_BK: scores before the softmax.
        targets_B: classes from 0.
        label_smoothing: share of the target probability spread over all classes, 0 to below 1.
        class_weights_K: what a row of each class counts; 1 where None. A row's weight is its target's, for the
            smoothed share too (torch weighs that share by the class it falls on). Divide by the
            `class_weight_sum` of the whole update for a weighted mean; divided by the rows, rare classes with large
            weights raise the learning rate with them.
        weights_B: what each row counts; 1 where None.

    Raises:
        ConfigError: shapes that do not fit, weights that are not K numbers from 0, a smoothing out of range.
        DataError: a class that does not exist; the message names row and value.
    """
    check_classes("targets_B", targets_B, logits_BK.shape)
    _check_smoothing(label_smoothing)
    logits_BK = _wide(logits_BK)
    if class_weights_K is None and weights_B is None:
        return functional.cross_entropy(logits_BK, targets_B, reduction="sum", label_smoothing=label_smoothing)
    losses_B = functional.cross_entropy(logits_BK, targets_B, reduction="none", label_smoothing=label_smoothing)
    if class_weights_K is not None:
        losses_B = losses_B * per_class("class_weights_K", class_weights_K, logits_BK)[targets_B]
    return (losses_B if weights_B is None else losses_B * weights_B.to(losses_B)).sum()


def class_weight_sum(targets: Tensor, class_weights_K: Tensor) -> Tensor:
    """The sum of the targets' class weights: what a class-weighted loss sum is divided by for a weighted mean.

    Add it up over the microbatches of the update and divide once: torch's own `reduction="mean"` divides each
    microbatch by its own sum, which gives a rare class in a small microbatch more say than in a large one.

    Args:
        targets: classes from 0, any shape; IGNORED (-1) counts nothing.
        class_weights_K: what each class counts.
    """
    weights_K = _wide(class_weights_K)
    return (weights_K[targets.clamp_min(0)] * (targets != IGNORED)).sum()


def tag_loss_sum(
    logits_NK: Tensor,
    targets_N: Tensor,
    *,
    valid_N: Tensor | None = None,
    class_weights_K: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of a class a frame, each times the weight of its class, summed over frames.

    Args:
        logits_NK: [..., K], scores before the softmax.
        targets_N: [...], classes from 0; IGNORED (-1) leaves a frame out.
        valid_N: [...], True where there is a frame; what stands elsewhere, NaN too, is not read.
        class_weights_K: as in `classify_loss_sum`.
        label_smoothing: as in `classify_loss_sum`.

    Raises:
        ConfigError: shapes that do not fit, weights that are not K numbers from 0, a smoothing out of range.
        DataError: a class that does not exist; the message names place and value.
    """
    if valid_N is not None:
        check_same_shape("valid_N", valid_N, targets_N, "targets_N")
        if valid_N.dtype != torch.bool:
            raise ConfigError(f"valid_N: got {valid_N.dtype}, expected torch.bool")
        targets_N = targets_N.masked_fill(~valid_N, IGNORED)
        logits_NK = logits_NK.masked_fill(~valid_N[..., None], 0.0)
    check_classes("targets_N", targets_N, logits_NK.shape, ignored=IGNORED)
    _check_smoothing(label_smoothing)
    logits_NK, targets_N = _wide(logits_NK.flatten(0, -2)), targets_N.flatten()
    losses_N = functional.cross_entropy(
        logits_NK, targets_N, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED
    )
    if class_weights_K is not None:
        losses_N = losses_N * per_class("class_weights_K", class_weights_K, logits_NK)[targets_N.clamp_min(0)]
    return losses_N.sum()


def focal_loss_sum(
    logits_BK: Tensor, targets_B: Tensor, gamma: float = 2.0, class_weights_K: Tensor | None = None
) -> Tensor:
    """(1 - p)^gamma times the cross-entropy of the targets, p being their probability, summed over rows.

    Source: Lin et al. 2017, arXiv 1708.02002, eq. 4 and 5, with a softmax over K classes.

    Args:
        logits_BK: scores before the softmax, of two or more classes.
        targets_B: classes from 0.
        gamma: from 0, which gives the cross-entropy; the larger, the less an easy row counts.
        class_weights_K: the paper's alpha of each class; 1 where None.

    Raises:
        ConfigError: shapes that do not fit, a negative gamma, fewer than two classes.
        DataError: a class that does not exist; the message names row and value.
    """
    check_at_least("gamma", gamma, 0.0)
    if logits_BK.shape[-1] < 2:
        raise ConfigError(f"logits_BK: got shape {tuple(logits_BK.shape)}, expected two or more classes")
    check_classes("targets_B", targets_B, logits_BK.shape)
    logits_BK = _wide(logits_BK)
    at_B1 = targets_B[:, None]
    log_p_B = logits_BK.log_softmax(-1).gather(-1, at_B1)[:, 0]
    # (1 - p)^gamma through log(1 - p): the power itself has an infinite derivative at p = 1 where gamma < 1.
    others_B = logits_BK.scatter(-1, at_B1, -torch.inf).logsumexp(-1) - logits_BK.logsumexp(-1)
    losses_B = -torch.exp(gamma * others_B) * log_p_B
    if class_weights_K is not None:
        losses_B = losses_B * per_class("class_weights_K", class_weights_K, logits_BK)[targets_B]
    return losses_B.sum()


def binary_focal_loss_sum(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """(1 - p)^gamma times the cross-entropy of yes-or-no targets, summed over all of them.

    Source: Lin et al. 2017, arXiv 1708.02002, eq. 5.

    Args:
        logits: [...], scores before the sigmoid.
        targets: [...], 0 or 1.
        gamma: from 0, which gives the cross-entropy.
        alpha: what a target of 1 counts, between 0 and 1; a target of 0 counts 1 - alpha. None: both count 1.

    Raises:
        ConfigError: shapes that differ, a negative gamma, alpha out of range.
        DataError: a target that is neither 0 nor 1.
    """
    check_at_least("gamma", gamma, 0.0)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: got {alpha}, expected 0 to 1")
    check_same_shape("targets", targets, logits, "logits")
    refuse("targets", targets, lambda y: (y != 0) & (y != 1), "0 or 1")
    logits = _wide(logits)
    positive = targets != 0
    toward = torch.where(positive, logits, -logits)
    losses = -torch.exp(gamma * functional.logsigmoid(-toward)) * functional.logsigmoid(toward)
    if alpha is not None:
        losses = torch.where(positive, alpha * losses, (1 - alpha) * losses)
    return losses.sum()


def logit_adjusted_loss_sum(logits_BK: Tensor, targets_B: Tensor, prior_K: Tensor, tau: float = 1.0) -> Tensor:
    """Cross-entropy of scores to which tau times the log of the class prior was added, summed over rows.

    At prediction the scores go unadjusted: their largest is then the best class for the balanced error.

    Source: Menon et al. 2021, arXiv 2007.07314, eq. 10.

    Args:
        logits_BK: scores before the softmax.
        targets_B: classes from 0.
        prior_K: share of each class in the training rows, or counts: only their ratios matter.
        tau: strength; 0 gives the cross-entropy, 1 is the paper's choice.

    Raises:
        ConfigError: shapes that do not fit, or a prior that is not K numbers above 0.
        DataError: a class that does not exist; the message names row and value.
    """
    check_classes("targets_B", targets_B, logits_BK.shape)
    logits_BK = _wide(logits_BK)
    prior_K = per_class("prior_K", prior_K, logits_BK, above_zero=True)
    return functional.cross_entropy(logits_BK + tau * prior_K.log(), targets_B, reduction="sum")


def squared_loss_sum(predictions: Tensor, targets: Tensor) -> Tensor:
    """The squared error (no half), summed over all targets.

    Args:
        predictions: [...].
        targets: [...], in the same shape.

    Raises:
        ConfigError: shapes that differ.
        DataError: a target that is not finite; the message names its place.
    """
    predictions, targets = _pair(predictions, targets)
    return (predictions - targets).square().sum()


def huber_loss_sum(predictions: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """Half the squared error up to delta, delta (|error| - delta / 2) beyond, summed over all targets.

    Source: Huber 1964, eq. 6.

    Args:
        predictions: [...].
        targets: [...], in the same shape.
        delta: the error at which the square becomes a line, above 0, in the unit of the targets.

    Raises:
        ConfigError: shapes that differ, or a delta that is not above 0.
        DataError: a target that is not finite; the message names its place.
    """
    check_at_least("delta", delta, 0.0, above=True)
    predictions, targets = _pair(predictions, targets)
    return functional.huber_loss(predictions, targets, reduction="sum", delta=delta)


def pinball_loss_sum(predictions_Q: Tensor, targets: Tensor, levels: Sequence[float]) -> Tensor:
    """The quantile loss max(q e, (q - 1) e) of e = target - prediction, summed over targets and levels.

    Source: Koenker and Bassett 1978.

    Args:
        predictions_Q: [..., Q], a prediction for every level.
        targets: [...].
        levels: Q rising numbers between 0 and 1.

    Raises:
        ConfigError: shapes that do not fit, or levels that do not rise between 0 and 1.
        DataError: a target that is not finite; the message names its place.
    """
    check_levels(levels)
    if predictions_Q.ndim == 0 or predictions_Q.shape[-1] != len(levels):
        raise ConfigError(f"predictions_Q: got shape {tuple(predictions_Q.shape)}, expected {len(levels)} levels last")
    check_same_shape("targets", targets, predictions_Q[..., 0], "a level of predictions_Q")
    check_numbers("targets", targets)
    predictions_Q = _wide(predictions_Q)
    errors_Q = (targets.to(predictions_Q.dtype)[..., None] - predictions_Q).unbind(-1)
    # A level at a time: a tensor of the levels would be copied to the device, which waits for it.
    pairs = zip(levels, errors_Q, strict=True)
    return torch.stack([torch.maximum(level * error, (level - 1) * error).sum() for level, error in pairs]).sum()


def gaussian_nll_sum(means: Tensor, log_variances: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the targets under normal distributions, constant included, summed over targets.

    Source: Nix and Weigend 1994.

    Args:
        means: [...].
        log_variances: [...], natural logarithms; infinite loss far below -88, so give them a floor.
        targets: [...].

    Raises:
        ConfigError: shapes that differ.
        DataError: a target that is not finite; the message names its place.
    """
    check_same_shape("log_variances", log_variances, means, "means")
    means, targets = _pair(means, targets)
    log_variances = log_variances.to(means.dtype)
    squares = (targets - means).square() * torch.exp(-log_variances)
    return 0.5 * (squares + log_variances + math.log(2 * math.pi)).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))


def _pair(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets of one shape, both wide."""
    check_same_shape("targets", targets, predictions, "the predictions")
    check_numbers("targets", targets)
    predictions = _wide(predictions)
    return predictions, targets.to(predictions.dtype)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing: got {label_smoothing}, expected 0 to below 1")


def _on_host(lengths_B: Lengths) -> Tensor:
    return torch.as_tensor(lengths_B, dtype=torch.int64, device="cpu")
