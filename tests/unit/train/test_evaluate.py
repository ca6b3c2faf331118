"""Evaluation: questions count once, the nearest answer counts, impossible targets count as wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_rig import FP32, Toy, frames_draft, toy_spec

from treadle.data import Buffers, Draft, Form, Labels, Row, RowReader, Tokens
from treadle.spec import BatchSpec, ClassifySpec, CtcSpec, DataSpec, Leak, MinGruSpec, SplitSpec, TargetPer
from treadle.train import Evaluator, World, build_task

LABELS = ("A", "B", "C")


class Speller(nn.Module):
    """Says of every letter its label, then a blank; counts how many rows it was asked."""

    def __init__(self, frames_per_step: int = 2) -> None:
        super().__init__()
        self.frames_per_step = frames_per_step
        self.num_rows = 0
        self.slots: list[int] = []

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        self.num_rows += len(lengths_B)
        self.slots.append(tokens_BT.numel())
        assert not self.training
        frames = torch.zeros(*tokens_BT.shape, self.frames_per_step, dtype=torch.long)
        frames[..., 0] = tokens_BT  # symbol ids start at 1, as labels do above the blank
        return nn.functional.one_hot(frames.flatten(1), len(LABELS) + 1).float() * 20


def evaluated(rows, *, slots=64, task=None):
    """What is found on these test rows, beside one row to train on that holds every letter."""
    task_spec = task or CtcSpec(frames_per_step=2, label_name="phone", sequence_name="word")
    rows = [Row(entity="abc", inputs=list("abc"), target=list("ABC"), split="train"), *rows]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(names=LABELS, per=TargetPer.sequence), licence="none")
    spec = toy_spec(
        task=task_spec,
        # The word to train on and those to test with overlap on purpose.
        data=DataSpec(name="toy", allow_leaks=[Leak.content]),
        split=SplitSpec(),
        batch=BatchSpec(max_slots=str(slots)),
    )
    toy = Toy(spec, draft)
    judge = Evaluator(
        spec,
        toy.manifest,
        RowReader(toy.blobs, toy.manifest),
        split="test",
        task=build_task(task_spec, len(LABELS)),
        world=World(),
    )
    judge._buffers = Buffers(poison=True)
    network = Speller(getattr(task_spec, "frames_per_step", 1)).train()
    found = judge(network, FP32)
    assert network.training
    return found, network


def says(entity, inputs, target):
    return Row(entity=entity, inputs=list(inputs), target=list(target), split="test")


def test_any_listed_target_is_right_and_the_question_counts_once():
    found, network = evaluated([says("ab", "ab", "CC"), says("ab", "ab", "AB"), says("ca", "ca", "CA")])
    assert found.num_rows == network.num_rows == 2
    assert found.metrics["word_error_rate"] == 0.0
    assert found.metrics["phone_error_rate"] == 0.0
    assert sum(map(sum, found.confusion)) == 4
    sample = next(s for s in found.samples if s.entity == "ab")
    assert set(sample.expected) == {("C", "C"), ("A", "B")}
    assert (sample.inputs, sample.answered) == (("a", "b"), ("A", "B"))


def test_the_nearest_target_is_charged():
    found, _ = evaluated([says("ab", "ab", "CCC"), says("ab", "ab", "ABB")])
    assert found.metrics["word_error_rate"] == 1.0
    assert found.metrics["phone_error_rate"] == pytest.approx(1 / 3)


def test_an_entity_with_several_inputs_is_several_questions():
    found, _ = evaluated([says("ann", "ab", "AB"), says("ann", "ca", "BB"), says("bob", "ab", "AB")])
    assert found.num_rows == 3
    assert found.metrics["word_error_rate"] == pytest.approx(1 / 3)
    found, _ = evaluated([says("ann", "ab", "CC"), says("ann", "ba", "BA"), says("ann", "ab", "AB")])
    assert found.num_rows == 2
    assert found.metrics["word_error_rate"] == 0.0


@pytest.mark.parametrize("slots", [3, 64])
def test_targets_without_an_alignment_are_wrong_and_add_no_loss(slots):
    # "AAA" needs five label frames of "ab"'s four; with three slots its batch holds nothing else.
    found, _ = evaluated([says("ab", "ab", "AAA"), says("ca", "ca", "CA")], slots=slots)
    assert found.num_rows == 2
    assert found.metrics["word_error_rate"] == 0.5
    assert 0 <= found.metrics["loss"] < 0.1
    assert all(np.isfinite(value) for value in found.metrics.values())


def test_nothing_but_impossible_targets():
    found, _ = evaluated([says("ab", "ab", "AAA"), says("b", "b", "BB")])
    assert found.metrics == {"loss": 0.0, "phone_error_rate": pytest.approx(3 / 5), "word_error_rate": 1.0}


def test_an_evaluation_leaves_network_and_stream_as_they_were():
    toy = Toy(toy_spec())
    run = toy.run()
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    stream = torch.get_rng_state()
    first, second = run.valid(run.network, FP32), run.valid(run.network, FP32)
    assert first == second
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[name], value) for name, value in run.network.state_dict().items())
    assert all(p.grad is None for p in run.network.parameters())
    assert len(run.valid) == first.num_rows == 10


def test_frames_are_shown_by_name_and_length():
    spec = toy_spec(task=ClassifySpec(), split=SplitSpec(test=6))
    toy = Toy(spec, frames_draft(30))
    run = toy.run()
    found = run.test(run.network, FP32)
    assert set(found.metrics) == {"loss", "accuracy", "macro_f1"}
    assert found.num_rows == len(found.samples) == 6
    assert all(sample.inputs == (sample.entity, f"{2 + int(sample.entity) % 6} frames") for sample in found.samples)


def test_rows_longer_than_the_slots_of_training_are_evaluated():
    rows = [says("abcabc", "abcabc", "ABCABC")]
    found, _ = evaluated(rows, slots=3)
    assert found.metrics["word_error_rate"] == 0.0


def test_samples_are_few_and_from_everywhere():
    spec = toy_spec(split=SplitSpec(test=80))
    toy = Toy(dataclasses.replace(spec))
    run = toy.run()
    found = run.test(run.network, FP32)
    assert len(found.samples) == 40
    assert len({sample.entity for sample in found.samples}) == 40


@pytest.mark.parametrize("task", [CtcSpec(frames_per_step=2), ClassifySpec()])
def test_packed_batches_are_judged_alike(task):
    model = MinGruSpec(hidden_size=6, num_layers=2, bidirectional=True, embedding_size=5)
    toy = Toy(toy_spec(task=task, model=model))
    padded, packed = toy.run(), toy.run(form=Form.packed)
    first, second = padded.valid(padded.network, FP32), packed.valid(packed.network, FP32)
    assert first.metrics == pytest.approx(second.metrics, rel=1e-5)
    assert first.samples == second.samples or task != ClassifySpec()
    assert [s.entity for s in first.samples] == [s.entity for s in second.samples]


def test_rows_count_by_their_weight_in_the_loss_alone():
    rows = [says("ab", "ab", "CC"), says("ca", "ca", "CA")]
    (light, _), (heavy, _) = (
        evaluated([dataclasses.replace(rows[0], weight=weight), rows[1]]) for weight in (0.5, 4.0)
    )
    wrong, right = 40.0, 0.0  # 20 for each of two labels that are wrong; none for those that are right
    for found, weight in ((light, 0.5), (heavy, 4.0)):
        wanted = (weight * wrong + right) / (weight * 4 + 4)  # two label frames for each of two steps
        assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-3)
        assert found.metrics["word_error_rate"] == 0.5


def test_small_weights_do_not_make_a_small_loss():
    rows = [says("ab", "ab", "CC"), says("ca", "ca", "CA")]
    plain, _ = evaluated(rows)
    light, _ = evaluated([dataclasses.replace(row, weight=0.001) for row in rows])
    assert light.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)


def test_a_long_row_does_not_make_the_batches_of_others_long():
    rows = [says(str(i), "ab", "AB") for i in range(30)] + [says("long", "abc" * 20, "ABC" * 20)]
    found, network = evaluated(rows, slots=8)
    assert (found.num_rows, found.metrics["word_error_rate"]) == (31, 0.0)
    assert max(network.slots[:-1]) <= 8
    assert network.slots[-1] == 60


class FirstClass(nn.Module):
    """Says the first class of every row."""

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        return torch.tensor([[9.0, 0.0, 0.0]]).expand(len(lengths_B), -1)


def test_classes_that_contradict_each_other_are_no_alternatives():
    rows = [
        Row(entity=name, inputs=list("ab"), target=label, split="test")
        for name in ("ann", "bob")
        for label in ("A", "A", "B", "C")
    ]
    rows.append(Row(entity="cid", inputs=list("abc"), target="A", split="train"))
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(names=LABELS), licence="none")
    spec = toy_spec(task=ClassifySpec(), data=DataSpec(name="toy", allow_leaks=list(Leak)), split=SplitSpec())
    toy = Toy(spec, draft)
    reader = RowReader(toy.blobs, toy.manifest)
    judge = Evaluator(spec, toy.manifest, reader, split="test", task=toy.task(), world=World())
    found = judge(FirstClass(), FP32)
    assert len(judge) == found.num_rows == 8
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["loss"] == pytest.approx(4.5, abs=0.01)
    assert [row[0] for row in found.confusion] == [4, 2, 2, 0]
    assert all(len(sample.expected) == 1 for sample in found.samples)
