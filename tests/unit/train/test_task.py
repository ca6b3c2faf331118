"""Losses, answers and scores of both tasks, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from treadle.data import Batch
from treadle.plan import SplitCard
from treadle.spec import ClassifySpec, ClassWeights, CtcSpec
from treadle.train import Answer, build_task
from treadle.train.task import Score, Scores, class_weights

CTC = build_task(CtcSpec(frames_per_step=2, label_name="phone", sequence_name="word"), 3)
CLASSIFY = build_task(ClassifySpec(), 3)


def batch_of(lengths, labels, weights=None):
    """A batch with these lengths, targets and weights; its inputs are zeros."""
    width = max(map(len, labels))
    return Batch(
        inputs=np.zeros((len(lengths), max(lengths)), np.int64),
        lengths_B=np.array(lengths, np.int64),
        labels_BU=np.array([[*row, *[0] * (width - len(row))] for row in labels], np.int64),
        label_lengths_B=np.array([len(row) for row in labels], np.int64),
        rows_B=np.arange(len(lengths)),
        weights_B=np.array(weights or [1.0] * len(lengths), np.float32),
    )


def scores_of(task, answered):
    """Scores of (answer, accepted references) pairs."""
    scores = Scores(task.num_labels)
    for answer, references in answered:
        scores.add(task.score(Answer(labels=tuple(answer), confidence=1.0), [tuple(r) for r in references]))
    return scores


def test_error_rates_by_hand():
    scores = scores_of(
        CTC,
        [
            ([0, 1, 2], [[0, 1, 2]]),  # right
            ([0, 2, 2], [[0, 1, 2]]),  # one substitution
            ([0], [[0, 1]]),  # one deletion
            ([0, 1, 1, 1], [[0, 1]]),  # two insertions
            ([], [[2]]),  # one deletion
        ],
    )
    assert CTC.metrics(scores) == pytest.approx({"phone_error_rate": 5 / 11, "word_error_rate": 4 / 5})
    wrong = {
        (w, g): int(n) for w, line in enumerate(scores.counts.tolist()) for g, n in enumerate(line) if n and w != g
    }
    assert wrong == {(1, 2): 1, (1, 3): 1, (3, 1): 2, (2, 3): 1}


def test_the_nearest_accepted_reference_counts():
    scores = scores_of(CTC, [([0, 1], [[2, 2, 2], [0, 1]]), ([0, 1], [[2, 2, 2], [0, 1, 1], [1]])])
    assert CTC.metrics(scores) == {"phone_error_rate": pytest.approx(1 / 5), "word_error_rate": 0.5}


def test_accuracy_and_f1_by_hand():
    # Class 0: 2 of 3 found, 2 of 2 given right. Class 1: 1 of 1 found, 1 of 2 given right. Class 2 is never wanted.
    scores = scores_of(CLASSIFY, [([0], [[0]]), ([0], [[0]]), ([1], [[0]]), ([1], [[1]])])
    f1 = {0: 2 * (1.0 * 2 / 3) / (1.0 + 2 / 3), 1: 2 * (0.5 * 1.0) / 1.5}
    assert CLASSIFY.metrics(scores) == pytest.approx({"accuracy": 3 / 4, "macro_f1": (f1[0] + f1[1]) / 2})


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_f1_by_its_definition(pairs):
    scores = scores_of(CLASSIFY, [([got], [[want]]) for want, got in pairs])
    found = []
    for label in {want for want, _ in pairs}:
        hits = sum(want == got == label for want, got in pairs)
        given_ = sum(got == label for _, got in pairs)
        wanted = sum(want == label for want, _ in pairs)
        precision, recall = hits / given_ if given_ else 0.0, hits / wanted
        found.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    metrics = CLASSIFY.metrics(scores)
    assert metrics["macro_f1"] == pytest.approx(sum(found) / len(found))
    assert metrics["accuracy"] == pytest.approx(sum(w == g for w, g in pairs) / len(pairs))


def test_the_ctc_loss_is_the_sum_over_rows():
    batch = batch_of([3, 2, 4], [[0, 1], [2], [1, 1, 2]])
    logits = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    whole = float(CTC.loss_sum(logits, batch))
    parts = 0.0
    for i, (length, labels) in enumerate(zip([3, 2, 4], [[0, 1], [2], [1, 1, 2]], strict=True)):
        log_probs = logits[i, : 2 * length].log_softmax(-1)[:, None]
        target = torch.tensor([[label + 1 for label in labels]])
        one = functional.ctc_loss(
            log_probs, target, torch.tensor([2 * length]), torch.tensor([len(labels)]), reduction="sum"
        )
        parts += float(one)
    assert whole == pytest.approx(parts, rel=1e-5)
    assert CTC.count(batch) == 18


def test_rows_without_an_alignment_add_neither_loss_nor_frames():
    # Two label frames for a step: three labels do not fit, two equal ones need a blank between them.
    odd = batch_of([1, 1, 3], [[0, 1, 2], [1, 1], [0]])
    logits = torch.randn(3, 6, 4, requires_grad=True)
    loss = CTC.loss_sum(logits, odd)
    loss.backward()
    alone = CTC.loss_sum(logits[2:].detach(), batch_of([3], [[0]]))
    assert float(loss.detach()) == pytest.approx(float(alone), rel=1e-6)
    assert CTC.count(odd) == 6
    assert not logits.grad[:2].any()
    assert torch.isfinite(logits.grad).all()
    none = batch_of([1, 1], [[0, 1, 2], [1, 1]])
    assert float(CTC.loss_sum(logits[:2, :2], none)) == 0.0
    assert CTC.count(none) == 0.0


def test_a_row_that_just_fits_counts():
    tight = batch_of([1, 2], [[0, 1], [1, 1, 2]])
    assert CTC.count(tight) == 6
    assert np.isfinite(float(CTC.loss_sum(torch.zeros(2, 4, 4), tight)))


def test_ctc_answers_look_at_real_frames_alone():
    # Row 0 says 1, 1, blank, 1 -> labels 0, 0; row 1 has one step: 2, blank -> label 1; the rest is padding.
    best = torch.tensor([[1, 1, 0, 1], [2, 0, 3, 3]])
    logits = functional.one_hot(best, 4).float() * 9
    answers = CTC.answers(logits, torch.tensor([2, 1]))
    assert [answer.labels for answer in answers] == [(0, 0), (1,)]
    assert all(0.99 < answer.confidence < 1 for answer in answers)


def test_class_answers_and_their_confidence():
    logits = torch.tensor([[0.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    answers = CLASSIFY.answers(logits, torch.tensor([5, 5]))
    assert answers[0].labels == (1,)
    assert answers[0].confidence == pytest.approx(float(logits[0].softmax(-1)[1]))
    assert answers[1].confidence == pytest.approx(1 / 3)


def test_the_class_loss_is_the_sum_over_rows():
    logits = torch.randn(4, 3)
    batch = batch_of([1, 1, 1, 1], [[0], [2], [1], [1]])
    rows = [float(-logits[i].log_softmax(-1)[label]) for i, label in enumerate([0, 2, 1, 1])]
    assert float(CLASSIFY.loss_sum(logits, batch)) == pytest.approx(sum(rows), rel=1e-5)
    assert CLASSIFY.count(batch) == 4


def test_a_score_without_edits_is_right():
    assert Score(pairs=((1, 1), (2, 2))).edits == 0
    assert Score(pairs=((None, 1), (2, None), (1, 2))).edits == 3


# ---- weights ----

WEIGHTS = [0.5, 3.0, 1.0]


@pytest.mark.parametrize(("task", "width"), [(CTC, 8), (CLASSIFY, 0)])
def test_a_weighted_loss_is_the_sum_of_what_rows_count(task, width):
    lengths, labels = [3, 2, 4], [[0, 1], [2], [1]]
    shape = (3, width, 4) if width else (3, 3)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    batch = batch_of(lengths, labels, WEIGHTS)
    loss = task.loss_sum(logits, batch)
    loss.backward()
    parts, counts = 0.0, 0.0
    for i, weight in enumerate(WEIGHTS):
        one = batch_of(lengths[i : i + 1], labels[i : i + 1])
        alone = logits[i : i + 1].detach().requires_grad_()
        part = task.loss_sum(alone, one)
        part.backward()
        torch.testing.assert_close(logits.grad[i : i + 1], weight * alone.grad)
        parts += weight * float(part.detach())
        counts += weight * task.count(one)
    assert float(loss.detach()) == pytest.approx(parts, rel=1e-5)
    assert task.count(batch) == pytest.approx(counts)


@pytest.mark.parametrize(("task", "width"), [(CTC, 8), (CLASSIFY, 0)])
def test_rows_that_all_count_one_give_the_bits_of_no_weights(task, width):
    # The weighted sum rounds otherwise: were it taken, losses of old jobs would change in their last bits.
    shape = (40, width, 4) if width else (40, 3)
    logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    labels = [[i % 3] for i in range(40)]
    batch = batch_of([4] * 40, labels)
    if width:
        targets = torch.tensor(labels) + 1
        lengths = torch.full((40,), 8)
        wanted = functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), targets, lengths, torch.ones(40, dtype=torch.int64), reduction="sum"
        )
    else:
        wanted = functional.cross_entropy(logits, torch.tensor(labels)[:, 0], reduction="sum")
    assert task.loss_sum(logits, batch).item() == wanted.item()


def card(labels):
    labels_N = np.array(labels)
    ones = np.ones(len(labels))
    return SplitCard(
        lengths_N=ones.astype(np.int64),
        targets_N=ones.astype(np.int64),
        label_frames_N=ones.astype(np.int64),
        labels_N=labels_N,
        weights_N=ones.astype(np.float32),
        num_entities=len(labels),
    )


def test_balanced_labels_count_alike():
    spec = ClassifySpec(class_weights=ClassWeights.balanced)
    labels = [0] * 6 + [1] * 3 + [2]
    weights = class_weights(spec, card(labels), 3)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    summed = np.bincount(labels, weights=weights[labels])
    assert summed == pytest.approx([10 / 3] * 3)
    assert class_weights(ClassifySpec(), card(labels), 3) is None
    assert class_weights(CtcSpec(), card(labels), 3) is None
    assert np.isfinite(class_weights(spec, card([0, 0]), 3)).all()


def test_class_weights_and_row_weights_multiply():
    spec = ClassifySpec(class_weights=ClassWeights.balanced, label_smoothing=0.1)
    task = build_task(spec, 3, np.array([2.0, 1.0, 0.25]))
    batch = batch_of([1, 1, 1], [[0], [2], [1]], WEIGHTS)
    assert task.count(batch) == pytest.approx(0.5 * 2 + 3 * 0.25 + 1)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    rows = functional.cross_entropy(logits, torch.tensor([0, 2, 1]), reduction="none", label_smoothing=0.1)
    wanted = rows @ torch.tensor([1.0, 0.75, 1.0])
    assert float(task.loss_sum(logits, batch)) == pytest.approx(float(wanted), rel=1e-6)
