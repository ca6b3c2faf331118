"""Budgets found on a real network: they fit, they are fast enough, and finding them leaves no trace."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from train_rig import FP32, Toy, toy_spec

from treadle.data import Draft, Form, Frames, Labels, Row, RowReader, Tokens
from treadle.errors import InfeasibleError
from treadle.plan.size import training_bytes
from treadle.spec import (
    BatchSpec,
    Budget,
    ClassifySpec,
    CtcSpec,
    LongRows,
    LstmSpec,
    MinGruSpec,
    SgdSpec,
    SplitSpec,
    TargetPer,
)
from treadle.train import budget, build_optimizer, pack
from treadle.train.budget import Learner, find_budget, memory_limit, peak_of_update
from treadle.train.state import snapshot

ROOMY = 1 << 30


def frames_draft(num: int, *, longer: int = 0) -> Draft:
    """Noise with a hint of its class, in rows that get longer."""
    rng = np.random.default_rng(3)
    rows = [
        Row(entity=str(i), inputs=rng.normal(0.1 * (i % 3), 1, (2 + i % 5 + longer * i, 4)), target="xyz"[i % 3])
        for i in range(num)
    ]
    return Draft(rows=rows, inputs=Frames(channels=tuple("abcd")), target=Labels(names=tuple("xyz")), licence="none")


def long_draft() -> Draft:
    return frames_draft(30, longer=2)


class Found:
    """A toy job with a learner of its own."""

    def __init__(self, draft=None, **changes):
        model = LstmSpec(hidden_size=8, num_layers=2, dropout=0.2)
        spec = toy_spec(**{"task": ClassifySpec(), "model": model} | changes)
        self.toy = Toy(spec, draft or frames_draft(400))
        self.spec = spec
        network = self.toy.network()
        self.reader = RowReader(self.toy.blobs, self.toy.manifest)
        self.learner = Learner(
            network=network,
            optimizer=build_optimizer(spec.optim, network),
            task=self.toy.task(),
            precision=FP32,
            device=torch.device("cpu"),
            read=lambda rows: self.reader.batch(rows, form=Form.packed if network.packed else Form.padded),
        )
        self.rows = self.toy.manifest.rows_of("train")
        self.lengths = self.toy.manifest.columns["length"][self.rows]
        self.targets = self.toy.manifest.columns["targets"][self.rows]

    def find(self, *, limit=ROOMY, batch=None, lanes=1, **options):
        batch = batch or BatchSpec(max_slots="auto")
        return find_budget(
            self.learner, batch, self.rows, self.lengths, self.targets, lanes=lanes, limit_bytes=limit, **options
        )


@pytest.fixture
def many_rounds(monkeypatch):
    monkeypatch.setattr(budget, "FEW_ROUNDS", 1)
    monkeypatch.setattr(budget, "LEAST_SLOTS", 16)


@pytest.mark.usefixtures("many_rounds")
def test_a_budget_fits_its_limit_and_leaves_room_for_no_larger_one():
    made = Found(long_draft())
    most = made.find().measured_bytes
    limit = most // 2
    found = made.find(limit=limit)
    assert found.measured_bytes <= limit
    assert all(trial.fits for trial in found.trials if trial.slots <= found.largest_slots)
    refused = [trial for trial in found.trials if not trial.fits]
    assert all(trial.peak_bytes > limit for trial in refused)
    assert found.slots <= found.largest_slots < min((trial.slots for trial in refused), default=1 << 40)
    for trial in found.trials:
        assert trial.rows * trial.time_steps <= max(trial.slots, trial.time_steps)


@pytest.mark.usefixtures("many_rounds")
def test_the_worst_shapes_are_among_those_tried():
    made = Found(long_draft())
    found = made.find()
    steps = {trial.time_steps for trial in found.trials}
    ordered = np.sort(made.lengths)
    assert {int(ordered[-1]), int(ordered[(len(ordered) - 1) // 2])} <= steps


def draft_of(lengths) -> Draft:
    """Rows of these lengths, of classes that no row tells."""
    rows = [
        Row(entity=str(i), inputs=np.full((length, 4), 0.01 * i), target="xyz"[i % 3])
        for i, length in enumerate(lengths)
    ]
    return Draft(rows=rows, inputs=Frames(channels=tuple("abcd")), target=Labels(names=tuple("xyz")), licence="none")


@pytest.mark.usefixtures("many_rounds")
@pytest.mark.parametrize("model", [LstmSpec(hidden_size=8), MinGruSpec(hidden_size=8)])
def test_where_frames_are_counted_the_most_padded_microbatch_is_tried(model):
    made = Found(draft_of([40, 20, *[1] * 300]), model=model, split=SplitSpec())
    predicted = []

    def predict(rows, steps, frames):
        predicted.append((rows, steps, frames))
        return 0

    found = made.find(batch=BatchSpec(max_slots="auto", budget=Budget.frames), predict=predict)
    first = [trial for trial in found.trials if trial.slots == 40]
    assert (21, 20, 40) in [(trial.rows, trial.time_steps, trial.frames) for trial in first]
    assert (21, 20, 40) in predicted
    if isinstance(model, LstmSpec):  # pads its rows
        limit = max(trial.peak_bytes for trial in first)
        assert limit == next(trial.peak_bytes for trial in first if trial.rows == 21)
        with pytest.raises(InfeasibleError, match="auto finds none: 21 x 20 time steps"):
            made.find(batch=BatchSpec(max_slots="auto", budget=Budget.frames), limit=limit - 1)


@pytest.mark.usefixtures("many_rounds")
def test_the_shortest_rows_are_tried_as_many_as_there_are():
    made = Found(draft_of([40, *[8] * 200, *[1] * 90]), split=SplitSpec())
    found = made.find(batch=BatchSpec(max_slots="auto", max_rows=50))
    for slots in {trial.slots for trial in found.trials}:
        rows = [trial.rows for trial in found.trials if (trial.slots, trial.time_steps) == (slots, 1)]
        assert rows == [min(50, slots)]


@pytest.mark.usefixtures("many_rounds")
def test_the_smallest_of_the_fastest_is_taken(monkeypatch):
    """Speeds are made up here, as nothing else is: they would differ from run to run."""
    made = Found(frames_draft(400))
    speeds = {16: 0.5, 32: 0.9, 64: 0.98, 128: 1.0, 256: 0.99}

    def seconds(self, batch):
        slots = 16 << (len(self.trials) // 4)
        return batch.frames / (1000 * speeds[slots])

    monkeypatch.setattr(budget._Search, "_seconds", seconds)
    found = made.find()
    assert [t.slots for t in found.trials[::4]] == [16, 32, 64, 128, 256]
    assert found.slots == 64
    assert "98% of the best speed" in found.why
    assert "no faster" in found.why


def test_an_epoch_keeps_enough_rounds(monkeypatch):
    monkeypatch.setattr(budget, "LEAST_SLOTS", 4)
    monkeypatch.setattr(budget, "SETTLED", 99)  # whatever the speeds of three budgets happen to be
    made = Found()
    frames = int(made.lengths.sum())
    for lanes in (1, 2):
        found = made.find(lanes=lanes)
        assert found.largest_slots == frames // (budget.FEW_ROUNDS * lanes)
    assert "fewer than 80 rounds" in found.why


@pytest.mark.parametrize("optim", [None, SgdSpec(momentum=0.0)])
@pytest.mark.parametrize("stepped", [False, True])
def test_finding_leaves_no_trace(optim, stepped):
    made = Found(**({"optim": optim} if optim else {}))
    network, optimizer = made.learner.network, made.learner.optimizer
    if stepped:
        made.learner.update(made.learner.read(made.rows[:4]))
    network.eval()
    before, stream = pack(snapshot(network, optimizer)), torch.get_rng_state()
    rates = [group["lr"] for group in optimizer.param_groups]
    made.find()
    assert pack(snapshot(network, optimizer)) == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert not network.training
    assert all(p.grad is None for p in network.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_a_trace_is_removed_when_a_trial_fails():
    made = Found()
    before = pack(snapshot(made.learner.network, made.learner.optimizer))
    reads = []

    def read(rows):
        reads.append(rows)
        if len(reads) > 1:
            raise OSError("the store is away")
        return made.reader.batch(rows)

    learner = dataclasses.replace(made.learner, read=read)
    with pytest.raises(OSError, match="away"):
        find_budget(learner, BatchSpec(), made.rows, made.lengths, made.targets, lanes=1, limit_bytes=ROOMY)
    assert pack(snapshot(learner.network, learner.optimizer)) == before


@pytest.mark.usefixtures("many_rounds")
def test_every_shape_is_tried_with_the_longest_target_that_it_may_have():
    words = itertools.islice(itertools.product("abc", repeat=6), 40)
    rows = [
        Row(entity=str(i), inputs=list(word), target=["A"] * (6 if i in (3, 17) else 1 + i % 3))
        for i, word in enumerate(words)
    ]
    draft = Draft(rows=rows, inputs=Tokens(), target=Labels(names=("A",), per=TargetPer.sequence), licence="none")
    made = Found(draft, task=CtcSpec(frames_per_step=4), model=LstmSpec(hidden_size=8, embedding_size=4))
    seen = []

    def read(rows):
        batch = made.reader.batch(rows)
        seen.append((len(rows), int(batch.label_lengths_B.max())))
        return batch

    made.learner = dataclasses.replace(made.learner, read=read)
    made.find()
    most = int(made.targets.max())
    assert most == 6
    assert {num for num, _ in seen if num > 1}
    assert all(longest == most for num, longest in seen if num > 1)


def test_what_cannot_fit_is_refused_with_its_size():
    with pytest.raises(InfeasibleError, match=r"auto finds none: .* take .* KiB, expected at most 1\.0 KiB"):
        Found().find(limit=1024)


def test_what_arithmetic_puts_far_above_the_limit_is_not_tried():
    made = Found()
    learner = dataclasses.replace(made.learner, read=lambda rows: pytest.fail("tried"))
    with pytest.raises(InfeasibleError):
        find_budget(
            learner,
            BatchSpec(),
            made.rows,
            made.lengths,
            made.targets,
            lanes=1,
            limit_bytes=1000,
            predict=lambda rows, steps, frames: 10_000 * rows * steps,
        )


@pytest.mark.usefixtures("many_rounds")
def test_rows_above_the_budget_are_tried_as_pieces():
    made = Found(long_draft())
    batch = BatchSpec(max_slots="auto", long_rows=LongRows.chunk)
    found = made.find(batch=batch)
    assert found.trials[0].slots == 16
    assert all(trial.rows * trial.time_steps <= trial.slots for trial in found.trials)
    refused = made.find(batch=BatchSpec(max_slots="auto"))
    assert refused.trials[0].slots == made.lengths.max()


@pytest.mark.parametrize("model", [LstmSpec(hidden_size=24, num_layers=2), MinGruSpec(hidden_size=32)])
def test_arithmetic_predicts_what_is_measured(model):
    made = Found(model=model)
    learner, toy, spec = made.learner, made.toy, made.spec
    batch = learner.read(made.rows[:200])
    learner.update(batch)
    signature = toy.manifest.preprocessing.signature(64)
    steps = int(batch.lengths_B.max())
    predicted = training_bytes(
        model, spec.task, signature, spec.optim, rows=200, time_steps=steps, frames=batch.frames, world=1
    )
    assert batch.frames < 200 * steps
    assert abs(predicted / peak_of_update(learner, batch) - 1) < 0.15


def test_memory_is_shared_by_the_workers_of_a_host():
    one, four = (memory_limit(torch.device("cpu"), workers) for workers in (1, 4))
    assert one > 1 << 20
    assert 0.8 < 4 * four / one < 1.25
