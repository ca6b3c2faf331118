"""Losses against path sums, plain float64 formulas and known answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from treadle.errors import ConfigError, DataError
from treadle.nn.losses import (
    binary_focal_loss_sum,
    class_weight_sum,
    classify_loss_sum,
    ctc_greedy,
    ctc_loss_sum,
    focal_loss_sum,
    gaussian_nll_sum,
    huber_loss_sum,
    logit_adjusted_loss_sum,
    pinball_loss_sum,
    squared_loss_sum,
    tag_loss_sum,
)


def collapse(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != 0]


def brute_force_nll(logits_TK: Tensor, labels: list[int]) -> float:
    """Minus the log of the summed probability of every alignment that reads as `labels`."""
    probs = logits_TK.double().softmax(-1).tolist()
    paths = itertools.product(range(logits_TK.shape[1]), repeat=logits_TK.shape[0])
    chances = (math.prod(probs[t][k] for t, k in enumerate(path)) for path in paths if collapse(path) == labels)
    return -math.log(sum(chances))


@pytest.mark.parametrize("padded", [True, False])
def test_ctc_sums_over_every_alignment(padded: bool) -> None:
    torch.manual_seed(0)
    logits_BTK = torch.randn(4, 5, 3)
    frames, targets = [5, 3, 4, 1], [[1, 1], [2], [1, 2, 1], []]
    expected = sum(brute_force_nll(logits_BTK[b, : frames[b]], targets[b]) for b in range(4))
    flat = [label for row in targets for label in row]
    given = [row + [2] * (3 - len(row)) for row in targets] if padded else flat
    loss = ctc_loss_sum(logits_BTK, frames, torch.tensor(given), [len(row) for row in targets])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_ctc_target_longer_than_the_frames_is_infinite_and_shows() -> None:
    loss = ctc_loss_sum(torch.zeros(1, 2, 3), [2], torch.tensor([[1, 1]]), [2])  # the repeat needs a blank between
    assert torch.isinf(loss)


def test_ctc_ignores_padded_frames_and_repeats_bit_for_bit() -> None:
    torch.manual_seed(0)
    values_BTK = torch.randn(6, 12, 9)
    frames = torch.tensor([12, 7, 9, 12, 8, 10])
    targets = torch.randint(1, 9, (6, 3))

    def run(logits_BTK: Tensor) -> tuple[Tensor, Tensor]:
        logits_BTK = logits_BTK.clone().requires_grad_()
        loss = ctc_loss_sum(logits_BTK, frames, targets, [3] * 6)
        return loss.detach(), torch.autograd.grad(loss, logits_BTK)[0]

    loss, grad = run(values_BTK)
    assert all(torch.equal(again, first) for again, first in zip(run(values_BTK), (loss, grad), strict=True))
    assert not grad[1, 7:].any()
    values_BTK[1, 7:] = 5.0
    assert torch.equal(run(values_BTK)[0], loss)


def test_losses_of_bf16_scores_are_fp32() -> None:
    logits = torch.randn(2, 6, 4).bfloat16()
    assert ctc_loss_sum(logits, [6, 6], torch.ones(2, 1, dtype=torch.int64), [1, 1]).dtype == torch.float32
    assert classify_loss_sum(logits[:, 0], torch.tensor([0, 3])).dtype == torch.float32


@pytest.mark.parametrize(
    ("path", "length", "labels"),
    [
        ([1, 1, 0, 1, 2], 5, [1, 1, 2]),
        ([1, 1, 0, 1, 2], 4, [1, 1]),
        ([1, 1, 0, 1, 2], 2, [1]),
        ([0, 0, 0, 0, 0], 5, []),
        ([3, 2, 2, 3, 3], 5, [3, 2, 3]),
        ([0, 0, 1, 1, 1], 2, []),
        ([0, 2, 0, 0, 2], 5, [2, 2]),
    ],
)
def test_ctc_greedy(path: list[int], length: int, labels: list[int]) -> None:
    logits_BTK = torch.nn.functional.one_hot(torch.tensor([path, path]), 4).float()
    assert ctc_greedy(logits_BTK, [length, 5]) == [labels, collapse(tuple(path))]
    assert ctc_greedy(logits_BTK, torch.tensor([length, 5]))[0] == labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classify_loss(smoothing: float) -> None:
    logits_BK, targets = torch.randn(5, 4), [0, 3, 1, 1, 2]
    log_p = logits_BK.double().log_softmax(-1)
    per_row = [-(1 - smoothing) * log_p[b, k] - smoothing * log_p[b].mean() for b, k in enumerate(targets)]
    loss = classify_loss_sum(logits_BK, torch.tensor(targets), smoothing)
    assert loss.item() == pytest.approx(torch.stack(per_row).sum().item(), rel=1e-6)


# Losses of classes

TARGETS = [0, 3, 1, 1, 2]
WEIGHTS = [0.5, 2.0, 0.0, 4.0]
LEVELS = (0.1, 0.5, 0.95)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits)) + top
    return [x - total for x in logits]


def make_logits() -> Tensor:
    torch.manual_seed(1)
    return 2 * torch.randn(5, 4)


def smoothed(log_p: list[float], target: int, smoothing: float) -> float:
    return -(1 - smoothing) * log_p[target] - smoothing * sum(log_p) / len(log_p)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_weigh_whole_rows(smoothing: float) -> None:
    logits_BK, targets_B, weights_K = make_logits(), torch.tensor(TARGETS), torch.tensor(WEIGHTS)
    rows = [log_softmax(row) for row in logits_BK.double().tolist()]
    expected = sum(WEIGHTS[k] * smoothed(row, k, smoothing) for row, k in zip(rows, TARGETS, strict=True))
    loss = classify_loss_sum(logits_BK, targets_B, smoothing, weights_K)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert class_weight_sum(targets_B, weights_K).item() == sum(WEIGHTS[k] for k in TARGETS)
    assert class_weight_sum(torch.tensor([[-1, 0], [3, -1]]), weights_K).item() == 4.5
    if smoothing == 0:  # then the quotient is torch's weighted mean
        mean = torch.nn.functional.cross_entropy(logits_BK, targets_B, weight=weights_K)
        assert (loss / class_weight_sum(targets_B, weights_K)).item() == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_tags(shape: tuple[int, ...], weighted: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 4), [2, -1, 0, 3, 1, 1]
    valid = torch.tensor([True, True, True, False, True, False])
    logits[3], logits[5] = torch.nan, 1e30
    expected = 0.0
    for n in (0, 2, 4):
        weight = WEIGHTS[targets[n]] if weighted else 1.0
        expected += weight * smoothed(log_softmax(logits[n].double().tolist()), targets[n], smoothing)
    given = logits.view(*shape, 4).requires_grad_()
    loss = tag_loss_sum(
        given,
        torch.tensor(targets).view(shape),
        valid_N=valid.view(shape),
        class_weights_K=torch.tensor(WEIGHTS) if weighted else None,
        label_smoothing=smoothing,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, given)
    assert not grad.reshape(6, 4)[[1, 3, 5]].any()  # zero, not NaN
    assert tag_loss_sum(torch.zeros(3, 2, 4), torch.full((3, 2), -1)).item() == 0.0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal(gamma: float) -> None:
    logits_BK, targets_B = make_logits(), torch.tensor(TARGETS)
    rows = [log_softmax(row) for row in logits_BK.double().tolist()]
    losses = [-((1 - math.exp(row[k])) ** gamma) * row[k] for row, k in zip(rows, TARGETS, strict=True)]
    assert focal_loss_sum(logits_BK, targets_B, gamma).item() == pytest.approx(sum(losses), rel=1e-5)
    weighted = sum(WEIGHTS[k] * loss for k, loss in zip(TARGETS, losses, strict=True))
    assert focal_loss_sum(logits_BK, targets_B, gamma, torch.tensor(WEIGHTS)).item() == pytest.approx(
        weighted, rel=1e-5
    )
    if gamma == 0:
        torch.testing.assert_close(focal_loss_sum(logits_BK, targets_B, 0.0), classify_loss_sum(logits_BK, targets_B))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_binary_focal(gamma: float, alpha: float | None) -> None:
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(3, 2), torch.tensor([[0, 1], [1, 1], [0, 0]])
    expected = 0.0
    for x, y in zip(logits.double().flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x if y else x))
        share = 1.0 if alpha is None else alpha if y else 1 - alpha
        expected -= share * (1 - p) ** gamma * math.log(p)
    for given in (targets, targets.bool(), targets.float()):
        assert binary_focal_loss_sum(logits, given, gamma, alpha).item() == pytest.approx(expected, rel=1e-5)
    # Two classes under a softmax are one sigmoid of their difference.
    if alpha is None:
        both = torch.stack((torch.zeros(6), logits.flatten()), dim=-1)
        torch.testing.assert_close(focal_loss_sum(both, targets.flatten(), gamma).item(), expected, rtol=1e-5, atol=0)


def test_logit_adjustment() -> None:
    logits_BK, targets_B = make_logits(), torch.tensor(TARGETS)
    plain = classify_loss_sum(logits_BK, targets_B)
    uniform = logit_adjusted_loss_sum(logits_BK, targets_B, torch.full((4,), 0.25))
    torch.testing.assert_close(uniform, plain, rtol=1e-6, atol=0)
    counts = torch.tensor([10, 1, 5, 84])
    torch.testing.assert_close(logit_adjusted_loss_sum(logits_BK, targets_B, counts, tau=0.0), plain)
    expected = 0.0
    for row, k in zip(logits_BK.double().tolist(), TARGETS, strict=True):
        expected -= log_softmax([x + 1.5 * math.log(n / 100) for x, n in zip(row, counts.tolist(), strict=True)])[k]
    for prior in (counts, counts / 100):
        loss = logit_adjusted_loss_sum(logits_BK, targets_B, prior, tau=1.5)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


# Losses of numbers


def test_losses_of_numbers() -> None:
    torch.manual_seed(0)
    predictions, targets = 2 * torch.randn(3, 2), 2 * torch.randn(3, 2)
    pairs = list(zip(predictions.double().flatten().tolist(), targets.double().flatten().tolist(), strict=True))
    assert squared_loss_sum(predictions, targets).item() == pytest.approx(sum((p - y) ** 2 for p, y in pairs), rel=1e-6)
    for delta in (0.3, 1.0, 50.0):
        errors = [abs(p - y) for p, y in pairs]
        expected = sum(e * e / 2 if e <= delta else delta * (e - delta / 2) for e in errors)
        assert huber_loss_sum(predictions, targets, delta).item() == pytest.approx(expected, rel=1e-6)
    log_variances = torch.randn(3, 2)
    expected = 0.0
    for (mean, y), log_variance in zip(pairs, log_variances.double().flatten().tolist(), strict=True):
        sigma = math.exp(log_variance / 2)
        expected -= math.log(math.exp(-((y - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)))
    assert gaussian_nll_sum(predictions, log_variances, targets).item() == pytest.approx(expected, rel=1e-5)


def test_pinball() -> None:
    torch.manual_seed(0)
    predictions, targets = torch.randn(4, 2, 3), torch.randn(4, 2)
    expected = 0.0
    for row, y in zip(predictions.double().view(-1, 3).tolist(), targets.double().flatten().tolist(), strict=True):
        for level, p in zip(LEVELS, row, strict=True):
            expected += level * (y - p) if y >= p else (1 - level) * (p - y)
    assert pinball_loss_sum(predictions, targets, LEVELS).item() == pytest.approx(expected, rel=1e-6)
    # The best constant is the quantile.
    sample, grid = torch.randn(2001), torch.linspace(-3, 3, 601)
    losses = [pinball_loss_sum(value.expand(2001, 1), sample, [0.8]).item() for value in grid]
    best = grid[losses.index(min(losses))].item()
    assert best == pytest.approx(sample.quantile(0.8).item(), abs=0.02)


# All of them

CLASSES = torch.tensor(TARGETS)
NUMBERS = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.2])
WEIGHT_TENSOR = torch.tensor(WEIGHTS)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "classify": lambda x: classify_loss_sum(x, CLASSES, 0.1),
    "weighted": lambda x: classify_loss_sum(x, CLASSES, 0.1, WEIGHT_TENSOR),
    "tags": lambda x: tag_loss_sum(x, CLASSES, valid_N=CLASSES != 3, class_weights_K=WEIGHT_TENSOR),
    "focal": lambda x: focal_loss_sum(x, CLASSES, 2.0, WEIGHT_TENSOR),
    "focal 0": lambda x: focal_loss_sum(x, CLASSES, 0.0),
    "focal half": lambda x: focal_loss_sum(x, CLASSES, 0.5),
    "binary focal": lambda x: binary_focal_loss_sum(x[:, 0], CLASSES > 1, 0.5, 0.25),
    "logit adjusted": lambda x: logit_adjusted_loss_sum(x, CLASSES, torch.tensor([1, 2, 3, 4])),
    "squared": lambda x: squared_loss_sum(x[:, 0], NUMBERS),
    "huber": lambda x: huber_loss_sum(x[:, 0], NUMBERS, 0.7),
    "pinball": lambda x: pinball_loss_sum(x[:, :3], NUMBERS, LEVELS),
    "gaussian": lambda x: gaussian_nll_sum(x[:, 0], x[:, 1].clamp(-10, 10), NUMBERS),
    "ctc": lambda x: ctc_loss_sum(x[None], [5], torch.tensor([[1, 2]]), [2]),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_gradients(loss: Callable[[Tensor], Tensor]) -> None:
    logits = make_logits().double().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)


@every_loss
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_are_finite(loss: Callable[[Tensor], Tensor], size: float) -> None:
    signs = make_logits().sign()
    signs[0], signs[1] = torch.tensor([1.0, -1, -1, -1]), torch.tensor([1.0, 1, 1, -1])  # certainly right, or wrong
    logits = (size * signs).requires_grad_()
    value = loss(logits)
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@every_loss
def test_nan_scores_show(loss: Callable[[Tensor], Tensor]) -> None:
    logits = make_logits()
    logits[2, :] = torch.nan
    assert not loss(logits).isfinite()


@every_loss
def test_bf16_scores_are_summed_in_fp32(loss: Callable[[Tensor], Tensor]) -> None:
    logits = make_logits().bfloat16()
    assert loss(logits).dtype == torch.float32
    assert loss(logits).item() == pytest.approx(loss(logits.float()).item(), rel=1e-6)


# Bad input


def test_classes_that_do_not_exist() -> None:
    logits, good = torch.zeros(3, 4), torch.tensor([0, 3, 1])
    for loss in (classify_loss_sum, focal_loss_sum):
        with pytest.raises(DataError, match=r"targets_B\[1\]: got 4, expected 0 to 3"):
            loss(logits, torch.tensor([0, 4, -1]))
        with pytest.raises(DataError, match=r"targets_B\[2\]: got -1, expected 0 to 3"):
            loss(logits, torch.tensor([0, 3, -1]))
        with pytest.raises(ConfigError, match=r"targets_B: got shape \(3,\) of torch.float32"):
            loss(logits, good.float())
        with pytest.raises(ConfigError, match=r"targets_B: got shape \(3,\) of torch.int64, expected \(2,\)"):
            loss(logits[:2], good)
    with pytest.raises(DataError, match=r"targets_B\[0\]: got 7"):
        logit_adjusted_loss_sum(logits, torch.tensor([7, 0, 0]), torch.ones(4))
    with pytest.raises(DataError, match=r"targets_N\[1, 0\]: got -2, expected 0 to 3, or -1 to leave it out"):
        tag_loss_sum(torch.zeros(2, 1, 4), torch.tensor([[-1], [-2]]))
    with pytest.raises(DataError, match=r"targets\[1\]: got 2, expected 0 or 1"):
        binary_focal_loss_sum(torch.zeros(2), torch.tensor([1, 2]))


def test_class_weights_and_priors_must_fit() -> None:
    logits, targets = torch.zeros(3, 4), torch.tensor([0, 3, 1])
    for loss in (classify_loss_sum, focal_loss_sum, tag_loss_sum):
        with pytest.raises(ConfigError, match=r"class_weights_K: got shape \(3,\), expected \(4,\), one a class"):
            loss(logits, targets, class_weights_K=torch.ones(3))
        with pytest.raises(ConfigError, match=r"class_weights_K\[2\]: got -1.0, expected a finite number, 0 or more"):
            loss(logits, targets, class_weights_K=torch.tensor([1.0, 0.0, -1.0, 1.0]))
    with pytest.raises(ConfigError, match=r"prior_K\[1\]: got 0.0, expected a finite number above 0"):
        logit_adjusted_loss_sum(logits, targets, torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("levels", [(), (0.5, 0.1), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0), (math.nan,)])
def test_levels_must_rise(levels: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"levels: got .*, expected rising numbers between 0 and 1"):
        pinball_loss_sum(torch.zeros(2, len(levels)), torch.zeros(2), levels)


def test_numbers_must_be_finite_and_fit() -> None:
    zeros, bad = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [math.nan, 0.0]])
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        squared_loss_sum,
        huber_loss_sum,
        lambda x, y: gaussian_nll_sum(x, x, y),
        lambda x, y: pinball_loss_sum(x[..., None], y, [0.5]),
    ]
    for loss in calls:
        with pytest.raises(DataError, match=r"targets\[1, 0\]: got nan, expected a finite number"):
            loss(zeros, bad)
        with pytest.raises(ConfigError, match=r"targets: got shape \(2,\), expected \(2, 2\)"):
            loss(zeros, zeros[0])
    with pytest.raises(ConfigError, match=r"log_variances: got shape \(2,\)"):
        gaussian_nll_sum(zeros, zeros[0], zeros)
    with pytest.raises(ConfigError, match=r"predictions_Q: got shape \(2, 2\), expected 1 levels last"):
        pinball_loss_sum(zeros, zeros[0], [0.5])


def test_options_must_fit() -> None:
    logits, targets = torch.zeros(3, 4), torch.tensor([0, 3, 1])
    with pytest.raises(ConfigError, match=r"label_smoothing: got 1.0, expected 0 to below 1"):
        classify_loss_sum(logits, targets, 1.0)
    with pytest.raises(ConfigError, match=r"gamma: got -1.0, expected a number not below 0"):
        focal_loss_sum(logits, targets, -1.0)
    with pytest.raises(ConfigError, match=r"logits_BK: got shape \(3, 1\), expected two or more classes"):
        focal_loss_sum(logits[:, :1], targets)
    with pytest.raises(ConfigError, match=r"alpha: got 1.5, expected 0 to 1"):
        binary_focal_loss_sum(logits[:, 0], targets > 0, alpha=1.5)
    with pytest.raises(ConfigError, match=r"delta: got 0.0, expected a number above 0"):
        huber_loss_sum(logits[0], logits[0], 0.0)
    with pytest.raises(ConfigError, match=r"valid_N: got torch.int64, expected torch.bool"):
        tag_loss_sum(logits, targets, valid_N=targets)
    with pytest.raises(ConfigError, match=r"valid_N: got shape \(1,\)"):
        tag_loss_sum(logits, targets, valid_N=torch.tensor([True]))
