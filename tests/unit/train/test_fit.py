"""The loop: same bits, exact resumption, one normaliser, divergence, stopping."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from train_rig import ADAMW, FP32, SGD, Toy, toy_draft, toy_spec, weights

from treadle.data import RowReader
from treadle.errors import NotFoundError
from treadle.spec import (
    BatchSpec,
    ClassifySpec,
    CtcSpec,
    LstmSpec,
    Schedule,
    SgdSpec,
    SplitSpec,
    TrainSpec,
)
from treadle.train import fit
from treadle.train.task import build_task, run_network

PLAIN = SgdSpec(lr=1.0, momentum=0.0, schedule=Schedule.constant, warmup_share=0.0, clip_norm=None)


@pytest.fixture(scope="module", params=[ADAMW, SGD], ids=["adamw", "sgd"])
def unbroken(request):
    """A whole run with the state of each of its updates."""
    toy = Toy(toy_spec(optim=request.param))
    run = toy.run()
    outcome = fit(run)
    return toy, run, outcome


def test_the_same_spec_gives_the_same_bits(unbroken):
    toy, run, outcome = unbroken
    again = toy.run()
    torch.manual_seed(123)  # whatever the stream was at
    assert fit(again) == outcome
    assert torch.equal(weights(again), weights(run))
    assert again.checkpoints.states == run.checkpoints.states
    other = Toy(dataclasses.replace(toy.spec, train=TrainSpec(epochs=3, seed=6))).run()
    fit(other)
    assert not torch.equal(weights(other), weights(run))


def test_dropout_is_on_and_counts(unbroken):
    toy, run, _ = unbroken
    model = dataclasses.replace(toy.spec.model, dropout=0.0)
    without = Toy(dataclasses.replace(toy.spec, model=model)).run()
    fit(without)
    assert not torch.equal(weights(without), weights(run))


def test_going_on_from_any_update_gives_the_same_bits(unbroken):
    toy, run, outcome = unbroken
    states = run.checkpoints.states
    last = outcome.state.update
    per_epoch = toy.feed(run.world).plan(0).num_updates
    assert sorted(states) == list(range(1, last + 1))
    assert 1 < per_epoch < last
    for update in (1, per_epoch - 1, per_epoch, per_epoch + 1, last - 1, last):
        resumed = toy.run(saved=states[update])
        assert fit(resumed) == outcome
        assert torch.equal(weights(resumed), weights(run)), update
        for later, files in resumed.checkpoints.states.items():
            assert files == states[later], (update, later)
        assert sorted(resumed.checkpoints.states) == list(range(min(update + 1, last), last + 1))


def test_stopping_twice_gives_the_same_bits_and_leaves_a_checkpoint(unbroken):
    toy, run, outcome = unbroken
    saved = None
    for stop_after in (2, 5):
        part = toy.run(saved=saved, stop_after=stop_after)
        stopped = fit(part)
        assert (stopped.status, stopped.state.update, stopped.test) == ("stopped", stop_after, None)
        assert max(part.checkpoints.states) == stop_after
        saved = part.checkpoints.states[stop_after]
    resumed = toy.run(saved=saved)
    assert fit(resumed) == outcome
    assert resumed.checkpoints.states[outcome.state.update] == run.checkpoints.states[outcome.state.update]


def test_a_stop_at_the_last_update_is_a_stop_and_resumes_to_the_end(unbroken):
    toy, run, outcome = unbroken
    last = outcome.state.update
    part = toy.run(stop_after=last)
    assert fit(part).status == "stopped"
    resumed = toy.run(saved=part.checkpoints.states[last])
    assert fit(resumed) == outcome
    assert torch.equal(weights(resumed), weights(run))


def test_what_is_told_does_not_depend_on_a_stop(unbroken):
    toy, run, outcome = unbroken
    names = ("train/loss", "train/lr", "train/grad_norm", "trainer/frames_seen", "val/letter_error_rate", "data/fill")
    part = toy.run(stop_after=2)
    fit(part)
    resumed = toy.run(saved=part.checkpoints.states[2])
    fit(resumed)
    for name in names:
        whole = run.track.column(name)
        assert part.track.column(name) | resumed.track.column(name) == whole
        assert whole
    assert max(run.track.column("train/lr").values()) <= toy.spec.optim.lr
    assert run.track.column("test/word_error_rate") == {outcome.state.update: outcome.test.metrics["word_error_rate"]}


def test_no_thread_outlives_the_loop(unbroken):
    toy, _, _ = unbroken
    fit(toy.run(stop_after=1))
    assert not [t for t in threading.enumerate() if t.name == "treadle-loader"]


def test_every_frame_once_an_epoch():
    toy = Toy(toy_spec())
    run = toy.run()
    fit(run)
    columns, train = toy.manifest.columns, toy.manifest.rows_of("train")
    train = train[columns["label_frames"][train] <= 2 * columns["length"][train]]
    frames = int(columns["length"][train].sum())
    seen = run.track.column("trainer/frames_seen")
    epochs = run.track.column("trainer/epoch")
    assert [seen[u] for u in seen if epochs[u] == int(epochs[u])] == [frames, 2 * frames, 3 * frames]
    rows: dict[int, list[int]] = {}
    for update in toy.feed(run.world).starting_at(0, 0):
        rows.setdefault(update.epoch, []).extend(r for m in update.micros for r in m.batch.rows_B.tolist())
    assert sorted(rows) == [0, 1, 2]
    assert all(sorted(found) == train.tolist() for found in rows.values())


def first_gradient(toy, *, double):
    """What one update subtracts from the weights at rate 1: the gradient the loop made."""
    run = toy.run(stop_after=1, double=double)
    before = weights(run)
    fit(run)
    return before - weights(run)


def whole_gradient(toy, *, double):
    """The same in one batch: summed loss over the count."""
    run = toy.run(double=double)
    update = next(toy.feed(run.world).starting_at(0, 0))
    rows = np.concatenate([micro.batch.rows_B for micro in update.micros])
    batch = RowReader(toy.blobs, toy.manifest).batch(rows)
    loss = run.task.loss_sum(run_network(run.network, batch, run.world.device), batch) / run.task.count(batch)
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in run.network.parameters()])


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("lanes", [1, 5])
def test_an_update_is_the_gradient_of_one_big_batch(rounds, lanes):
    model = LstmSpec(hidden_size=6, bidirectional=True, embedding_size=5)
    batch = BatchSpec(max_slots="40", lanes=lanes, rounds_per_update=rounds)
    toy = Toy(toy_spec(task=ClassifySpec(), model=model, batch=batch, optim=PLAIN, train=TrainSpec(epochs=1)))
    found, wanted = first_gradient(toy, double=True), whole_gradient(toy, double=True)
    assert found.dtype == torch.float64
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


def test_an_update_is_the_gradient_of_one_big_batch_in_ctc():
    model = LstmSpec(hidden_size=6, bidirectional=True, embedding_size=5)
    batch = BatchSpec(max_slots="40", lanes=3, rounds_per_update=2)
    toy = Toy(toy_spec(model=model, batch=batch, optim=PLAIN, train=TrainSpec(epochs=1)))
    found, wanted = first_gradient(toy, double=False), whole_gradient(toy, double=False)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", [CtcSpec(frames_per_step=2), ClassifySpec()], ids=["ctc", "classify"])
def test_the_loss_that_is_told_is_the_mean_over_the_update(task):
    model = LstmSpec(hidden_size=6, embedding_size=5)
    run = Toy(toy_spec(task=task, model=model, train=TrainSpec(epochs=1))).run(stop_after=1)
    update = next(run.feed.starting_at(0, 0))
    batches = [micro.batch for micro in update.micros]
    with torch.no_grad():
        losses = [
            float(run.task.loss_sum(run_network(run.network, batch, run.world.device), batch)) for batch in batches
        ]
    fit(run)
    assert run.track.column("train/loss")[1] == pytest.approx(
        sum(losses) / sum(run.task.count(batch) for batch in batches), rel=1e-5
    )


def test_gradients_are_clipped_to_the_norm():
    toy = Toy(toy_spec(optim=dataclasses.replace(SGD, clip_norm=0.01)))
    run = toy.run()
    for p in run.network.parameters():
        p.grad = torch.ones_like(p)
    norm = run.updater.clip()
    assert float(norm) == pytest.approx(len(weights(run)) ** 0.5, rel=1e-5)
    clipped = torch.cat([p.grad.reshape(-1) for p in run.network.parameters()])
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_batch_that_cannot_be_read_ends_the_run_with_its_error():
    toy = Toy(toy_spec())
    key = toy.manifest.header.blocks[0].key
    toy.blobs.delete(key)
    with pytest.raises(NotFoundError, match="no such key"):
        fit(toy.run())


def test_training_rows_without_an_alignment_are_left_out():
    # One label frame a step: words whose letters repeat, and all of them (the last letter is doubled), need more.
    draft = toy_draft(40)
    rows = [dataclasses.replace(r, target=r.target[:2]) if i % 2 else r for i, r in enumerate(draft.rows)]
    spec = toy_spec(task=CtcSpec(), split=SplitSpec(), train=TrainSpec(epochs=1))
    toy = Toy(spec, dataclasses.replace(draft, rows=rows))
    run = toy.run()
    fit(run)
    seen = {r for u in toy.feed(run.world).starting_at(0, 0) for m in u.micros for r in m.batch.rows_B.tolist()}
    columns = toy.manifest.columns
    fits = set(np.flatnonzero(columns["label_frames"] <= columns["length"]).tolist())
    assert seen == fits
    assert 0 < len(fits) < 40
    assert all(np.isfinite(v) for _, metrics in run.track.rows for v in metrics.values())


def test_precision_names_the_format_that_runs():
    toy = Toy(toy_spec(train=TrainSpec(epochs=1)))
    run = toy.run(precision=dataclasses.replace(FP32, name="bf16"))
    outcome = fit(run)
    assert outcome.state.precision == "bf16"
    plain = toy.run()
    fit(plain)
    assert not torch.equal(weights(run), weights(plain))
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}


def test_task_table_is_complete():
    for spec in (CtcSpec(), ClassifySpec()):
        assert build_task(spec, 3).num_labels == 3
