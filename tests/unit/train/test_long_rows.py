"""Rows above the slot limit: read in pieces within one update, to the gradients of the whole row."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from train_rig import ADAMW, SGD, Toy, toy_spec

from treadle.data import Draft, Form, Frames, Labels, Row
from treadle.errors import ConfigError
from treadle.plan import Capacity, make_plan
from treadle.spec import (
    BatchSpec,
    ClassifySpec,
    ClusterSpec,
    GruSpec,
    LongRows,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    Pooling,
    RnnSpec,
    SplitSpec,
    TrainSpec,
)
from treadle.train import World, fit
from treadle.train.fit import by_rows, go_back

CHUNKED = BatchSpec(max_slots="24", lanes=2, rounds_per_update=2, long_rows=LongRows.chunk)
HERE = Capacity(where="here", cpus=8, gpus=0, memory_bytes=1 << 34)


def long_draft():
    rng = np.random.default_rng(2)
    rows = []
    for i in range(40):
        frames = rng.normal(i % 2, 0.5, (int(rng.choice([3, 7, 20, 50, 90])), 2))
        rows.append(Row(entity=str(i), inputs=frames, target="xy"[i % 2]))
    return Draft(rows=rows, inputs=Frames(channels=("a", "b")), target=Labels(names=("x", "y")), licence="none")


def long_toy(**changes):
    given = dict(
        task=ClassifySpec(),
        model=GruSpec(hidden_size=5, num_layers=2),
        split=SplitSpec(valid=4, test=4),
        batch=CHUNKED,
        optim=SGD,
    )
    return Toy(toy_spec(**given | changes), long_draft())


# Every cell with every pooling; and each of both with rows padded and packed.
CELLS, POOLINGS = (RnnSpec, LstmSpec, GruSpec, MinGruSpec, MinLstmSpec), (Pooling.last, Pooling.mean, Pooling.max)
PAIRS = [*itertools.product(CELLS, POOLINGS)]


@pytest.mark.parametrize(
    ("cell", "pooling", "form"),
    [(*pair, form) for pair, form in zip(PAIRS, itertools.cycle([Form.padded, Form.packed]), strict=False)],
)
def test_pieces_of_a_row_give_the_gradients_of_the_whole_row(cell, pooling, form):
    model = cell(hidden_size=5, num_layers=2)
    run = long_toy(model=model, task=ClassifySpec(pooling=pooling)).run(double=False, form=form)
    run.network.double().eval()
    seen = 0
    for update in run.feed.starting_at(0, 0):
        if seen >= 3:
            break
        for micros in by_rows(update.micros):
            if len(micros) == 1:
                continue
            seen += 1
            parts = [
                dataclasses.replace(m, batch=m.batch._replace(inputs=m.batch.inputs.astype(np.float64))) for m in micros
            ]
            loss = go_back(run, parts, 2.0)
            found = [p.grad.clone() for p in run.network.parameters()]
            run.network.zero_grad()
            axis = 0 if form is Form.packed else 1
            whole = parts[-1].batch._replace(
                inputs=np.concatenate([part.batch.inputs for part in parts], axis=axis),
                lengths_B=sum(part.batch.lengths_B for part in parts),
            )
            wanted = go_back(run, [dataclasses.replace(parts[0], batch=whole)], 2.0)
            assert torch.allclose(loss.double(), wanted.double(), rtol=1e-6)
            for p, grad in zip(run.network.parameters(), found, strict=True):
                assert torch.allclose(p.grad, grad, rtol=1e-6, atol=1e-9)
            run.network.zero_grad()
    assert seen >= 3


def test_every_frame_is_read_once_an_epoch_and_no_batch_is_above_the_limit():
    toy = long_toy()
    feed = toy.feed(World())
    frames = 0
    for update in feed.starting_at(0, 0):
        if update.epoch:
            break
        frames += sum(micro.batch.frames for micro in update.micros)
        assert max(micro.batch.slots for micro in update.micros) <= 24
    rows = toy.manifest.rows_of("train")
    assert frames == toy.manifest.columns["length"][rows].sum()


def test_a_run_over_long_rows_resumes_to_the_same_weights():
    toy = long_toy(optim=ADAMW, train=TrainSpec(epochs=2, seed=1))
    whole = toy.run()
    assert fit(whole).status == "finished"
    for update in (1, 4):
        again = toy.run(saved=whole.checkpoints.states[update])
        fit(again)
        for name, value in again.network.state_dict().items():
            assert torch.equal(value, whole.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": GruSpec(hidden_size=4, bidirectional=True)}, "model.bidirectional: got true"),
        ({"task": ClassifySpec(pooling=Pooling.attention)}, "task.pooling: got attention"),
        ({"model": GruSpec(hidden_size=4, attention_every=1, attention_heads=2)}, "model.attention_window: got null"),
    ],
)
def test_a_network_that_needs_whole_rows_is_refused_by_the_plan(changes, words):
    toy = long_toy(**changes)
    spec = dataclasses.replace(toy.spec, cluster=ClusterSpec(workers=0))
    with pytest.raises(ConfigError, match=words):
        make_plan(spec, toy.manifest.card("d" * 64), HERE)
    roomy = dataclasses.replace(spec, batch=dataclasses.replace(CHUNKED, max_slots="100"))
    assert make_plan(roomy, toy.manifest.card("d" * 64), HERE).worst_slots <= 100


def test_without_leave_a_long_row_is_refused_by_name():
    toy = long_toy(batch=BatchSpec(max_slots="24"))
    spec = dataclasses.replace(toy.spec, cluster=ClusterSpec(workers=0))
    with pytest.raises(ConfigError, match=r"batch\.max_slots: got 24, expected at least 90") as caught:
        make_plan(spec, toy.manifest.card("d" * 64), HERE)
    assert "long_rows=chunk" in caught.value.hint
