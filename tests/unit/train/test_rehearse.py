"""A rehearsal runs the largest microbatches of an epoch, says when they do not fit, and leaves no trace."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from train_rig import FP32, SGD, Toy, toy_spec

from treadle.data import Form, RowReader
from treadle.errors import InfeasibleError
from treadle.plan import plan_epoch
from treadle.spec import BatchSpec, Budget, ClassifySpec, CtcSpec, LongRows, LstmSpec, MinGruSpec
from treadle.train import build_optimizer, pack
from treadle.train.budget import Learner, peak_of_update
from treadle.train.rehearse import rehearse
from treadle.train.state import snapshot


class Rehearsed:
    """A toy job, its epoch, and a learner of its own."""

    def __init__(self, **changes):
        spec = toy_spec(**{"task": ClassifySpec(), "model": LstmSpec(hidden_size=8, dropout=0.3)} | changes)
        toy = Toy(spec)
        network, reader = toy.network(), RowReader(toy.blobs, toy.manifest)
        form = Form.packed if network.packed else Form.padded
        self.learner = Learner(
            network=network,
            optimizer=build_optimizer(spec.optim, network),
            task=toy.task(),
            precision=FP32,
            device=torch.device("cpu"),
            read=lambda rows: reader.batch(rows, form=form),
        )
        self.rows = toy.manifest.rows_of("train")
        self.targets = toy.manifest.columns["targets"][self.rows]
        lengths = toy.manifest.columns["length"][self.rows].astype(np.int64)
        self.plan = plan_epoch(lengths, spec.batch, lanes=2, seed=0, epoch=0)

    def peak(self, learner=None):
        return rehearse(learner or self.learner, self.plan, self.rows, self.targets)

    def state(self):
        return pack(snapshot(self.learner.network, self.learner.optimizer))


@pytest.mark.parametrize("budget", list(Budget))
@pytest.mark.parametrize("model", [LstmSpec(hidden_size=32), MinGruSpec(hidden_size=32)])
@pytest.mark.parametrize("task", [ClassifySpec(), CtcSpec(frames_per_step=2)])
def test_no_microbatch_takes_more_than_was_rehearsed(budget, model, task):
    made = Rehearsed(model=model, task=task, batch=BatchSpec(max_slots="60", budget=budget))
    rehearsed = made.peak()
    learner, plan, peaks = made.learner, made.plan, []
    for place in itertools.product(range(plan.num_rounds), range(plan.lanes)):
        if len(rows := plan.lane_rows(*place)):
            batch = learner.read(made.rows[rows])
            learner.update(batch)
            peaks.append(peak_of_update(learner, batch))
    assert max(peaks) > 1.05 * min(peaks)
    assert 0.98 * max(peaks) <= rehearsed <= max(peaks)


@pytest.mark.parametrize("optim", [{}, {"optim": SGD}])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_rehearsal_leaves_no_trace(optim, stepped):
    made = Rehearsed(**optim)
    if stepped:
        made.learner.update(made.learner.read(made.rows[:4]))
    made.learner.network.eval()
    before, stream = made.state(), torch.get_rng_state()
    assert made.peak() > 0
    assert made.state() == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert not made.learner.network.training
    assert all(p.grad is None for p in made.learner.network.parameters())


def test_an_update_that_does_not_fit_is_said_before_training_begins():
    made = Rehearsed()
    before, lengths = made.state(), []

    def read(rows):
        batch = made.learner.read(rows)
        lengths.append(len(rows))
        if len(lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return batch

    with pytest.raises(InfeasibleError, match=r"memory: an update of \d+ rows x \d+ time steps .*2\.00 GiB\.\)") as no:
        made.peak(dataclasses.replace(made.learner, read=read))
    assert f"of {lengths[-1]} rows" in no.value.message
    assert "batch.max_slots" in no.value.hint
    assert made.state() == before


def test_rows_that_are_read_in_pieces_are_left_out():
    batch = BatchSpec(max_slots="4", long_rows=LongRows.chunk)
    made = Rehearsed(batch=batch)
    lengths = []

    def read(rows):
        batch = made.learner.read(rows)
        lengths.extend(batch.lengths_B.tolist())
        return batch

    learner = dataclasses.replace(made.learner, read=read)
    made.peak(learner)
    assert len(made.plan.pieces_G)
    assert 0 < max(lengths) <= 4
    all_long = dataclasses.replace(made.plan, pieces_G=np.full(made.plan.num_rounds, 2, np.uint32))
    assert rehearse(learner, all_long, made.rows, made.targets) == 0
