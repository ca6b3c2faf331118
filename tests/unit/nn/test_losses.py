"""CTC and classification losses against path sums and known answers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from treadle.nn import classify_loss_sum, ctc_greedy, ctc_loss_sum


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
