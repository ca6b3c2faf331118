"""Tasks of frames: targets alike in every form of a batch, losses by definition, and what evaluations make of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from streams_rig import StreamToy, stream_spec, texts_draft, waves_draft
from train_rig import ADAMW, FP32, Toy, toy_spec, weights

from treadle.data import Form, RowReader
from treadle.spec import BatchSpec, GruSpec, LanguageSpec, LstmSpec, MinGruSpec, SplitSpec, TagSpec, TrainSpec
from treadle.train import World, build_task, fit
from treadle.train.evaluate import Evaluator
from treadle.train.scores import Scores
from treadle.train.task import run_network

BATCHES = BatchSpec(max_slots="60", lanes=2)


def rows_toy(task, **changes):
    given = dict(
        task=task,
        model=GruSpec(hidden_size=6, embedding_size=5),
        split=SplitSpec(valid=3, test=3),
        batch=BATCHES,
        optim=ADAMW,
        train=TrainSpec(epochs=2, seed=5),
    )
    return Toy(toy_spec(**given | changes), waves_draft() if isinstance(task, TagSpec) else texts_draft())


def first_rows(toy, form):
    return RowReader(toy.blobs, toy.manifest).batch(toy.manifest.rows_of("train")[:6], form=form)


@pytest.mark.parametrize("spec", [LanguageSpec(), TagSpec()])
def test_targets_are_the_same_in_every_form(spec):
    toy = rows_toy(spec)
    task = toy.task()
    padded, packed = (first_rows(toy, form) for form in (Form.padded, Form.packed))
    assert np.array_equal(task.targets(padded), task.targets(packed))
    assert len(task.targets(padded)) == padded.lengths_B.sum()
    assert task.count(padded) == (task.targets(packed) >= 0).sum()
    network = toy.network()
    device = torch.device("cpu")
    losses = [task.loss_sum(run_network(network, batch, device), batch) for batch in (padded, packed)]
    assert torch.allclose(*losses)


def test_the_next_symbol_is_the_rows_own():
    toy = rows_toy(LanguageSpec())
    batch = first_rows(toy, Form.padded)
    targets, at = toy.task().targets(batch), 0
    for row, length in zip(batch.inputs, batch.lengths_B, strict=True):
        assert targets[at : at + length].tolist() == [*row[1:length].tolist(), -1]
        at += length


@pytest.mark.parametrize("spec", [LanguageSpec(), TagSpec(), TagSpec(label_smoothing=0.2)])
def test_the_loss_is_that_of_the_frames_with_a_target(spec):
    toy = rows_toy(spec)
    task, batch = toy.task(), first_rows(toy, Form.packed)
    targets = torch.from_numpy(task.targets(batch))
    logits = torch.randn(len(targets), 6)
    log_p = logits.double().log_softmax(-1)
    share = getattr(spec, "label_smoothing", 0.0)
    nats = [
        0.0 if t < 0 else -float((1 - share) * log_p[i, t] + share * log_p[i].mean())
        for i, t in enumerate(targets.tolist())
    ]
    assert float(task.loss_sum(logits, batch)) == pytest.approx(sum(nats), rel=1e-5)
    assert task.loss_sum(logits.double(), batch).dtype == torch.float64
    weights_B = np.array([2, 1, 0.5, 1, 0, 3], np.float32)
    weighted, frames_N = batch._replace(weights_B=weights_B), np.repeat(weights_B, batch.lengths_B)
    assert float(task.loss_sum(logits, weighted)) == pytest.approx(float(np.array(nats) @ frames_N), rel=1e-5)
    assert task.count(weighted) == pytest.approx(frames_N[targets.numpy() >= 0].sum())


def test_perplexity_and_bits_are_the_loss():
    task = build_task(LanguageSpec(), 0)
    scores = Scores(0)
    scores.loss_sum, scores.loss_count, scores.judged, scores.right = 3 * math.log(8), 3.0, 4.0, 1.0
    assert task.metrics(scores) == pytest.approx({"perplexity": 8.0, "bits_per_symbol": 3.0, "accuracy": 0.25})
    scores.loss_sum = 1e9
    assert math.isfinite(task.metrics(scores)["perplexity"])


def test_a_language_model_of_a_large_vocabulary_makes_no_matrix_of_it():
    assert Scores(build_task(LanguageSpec(), 100_000).num_labels).counts.numel() == 1


def test_tags_are_judged_frame_by_frame():
    toy = rows_toy(TagSpec())
    task, batch = toy.task(), first_rows(toy, Form.padded)
    targets = task.targets(batch)
    answered = np.where(np.arange(len(targets)) % 3 == 0, 0, np.maximum(targets, 0))
    logits = torch.nn.functional.one_hot(torch.from_numpy(answered), 2).float() * 9
    scores = Scores(task.num_labels)
    judged = task.judge(scores, logits, batch, [])
    has = targets >= 0
    assert float(scores.counts.sum()) == has.sum()
    assert task.metrics(scores)["accuracy"] == pytest.approx((answered == targets)[has].mean())
    wanted = [
        2 * ((answered == k) & (targets == k)).sum() / (((answered == k) & has).sum() + (targets == k).sum())
        for k in range(2)
    ]
    assert task.metrics(scores)["macro_f1"] == pytest.approx(np.mean(wanted))
    assert scores.rows == len(batch.lengths_B) == len(judged)
    (references, answer), *_ = judged
    assert references == [tuple(targets[: batch.lengths_B[0]].tolist())]
    assert answer.labels == tuple(answered[: batch.lengths_B[0]].tolist())
    answers = task.answers(logits, torch.from_numpy(batch.lengths_B))
    assert [len(a.labels) for a in answers] == batch.lengths_B.tolist()


def test_a_language_model_answers_with_what_comes_next():
    task = build_task(LanguageSpec(), 0)
    logits = torch.log(torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.4, 0.1, 0.2, 0.3], [0.0, 0.5, 0.25, 0.25]]))
    first, second = task.answers(logits, torch.tensor([2, 1]))
    assert (first.labels, second.labels) == ((3,), (1,))  # never 0, which is no symbol
    assert first.confidence == pytest.approx(0.3)
    assert dict(first.likeliest) == pytest.approx({3: 0.3, 2: 0.2, 1: 0.1})


@pytest.mark.parametrize("task", [LanguageSpec(), LanguageSpec(tied=True), TagSpec()])
@pytest.mark.parametrize("form", [Form.padded, Form.packed])
def test_whole_rows_train_and_resume_without_streams(task, form):
    toy = rows_toy(task)
    run = toy.run(form=form)
    outcome = fit(run)
    assert outcome.test.num_rows == 3
    resumed = toy.run(form=form, saved=run.checkpoints.states[3])
    assert fit(resumed) == outcome
    assert torch.equal(weights(resumed), weights(run))


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize(
    "model",
    [
        LstmSpec(hidden_size=6, embedding_size=5, learned_state=True, conv_size=3),
        MinGruSpec(hidden_size=6, embedding_size=5, attention_every=1, attention_heads=1, attention_window=4),
    ],
)
def test_evaluation_by_chunks_is_that_of_whole_rows(chunk, model):
    batch = BatchSpec(max_slots="1000", streams=4, chunk=chunk)
    for task in (LanguageSpec(), TagSpec()):
        toy = StreamToy(stream_spec(task=task, model=model, batch=batch, split=SplitSpec(valid=9, test=3)))
        run = toy.run()
        with torch.no_grad():
            for name, p in run.network.named_parameters():
                if ".initial" in name:
                    p.normal_()
        reader = RowReader(toy.blobs, toy.manifest)
        whole = Evaluator(toy.spec, toy.manifest, reader, split="valid", task=run.task, world=World())
        wanted, found = whole(run.network, FP32), run.valid(run.network, FP32)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5)
        assert (found.num_rows, found.confusion) == (9, wanted.confusion)
        assert len(found.samples) == 9
        assert run.network.training


def test_sampled_rows_are_read_by_people():
    toy = rows_toy(LanguageSpec())
    run = toy.run()
    sample = run.test(run.network, FP32).samples[0]
    assert sample.expected == ((*sample.inputs[1:], ""),)
    assert len(sample.answered) == len(sample.inputs)
    tags = rows_toy(TagSpec()).run()
    sample = tags.test(tags.network, FP32).samples[0]
    assert set(sample.expected[0]) <= {"up", "down", ""}
    assert dataclasses.asdict(sample)["inputs"][1].endswith("frames")
