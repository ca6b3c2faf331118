"""Microbatches in parts: nothing lost, the same sums, and an end where a single row does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from streams_rig import waves_draft
from train_rig import SGD, Toy, frames_draft, toy_spec, weights

from treadle.data import Form
from treadle.errors import InfeasibleError, TransientError
from treadle.spec import BatchSpec, ClassifySpec, GruSpec, LanguageSpec, MinGruSpec, SplitSpec, TagSpec, TrainSpec
from treadle.train import fit
from treadle.train.split import Splitter, out_of_memory, split_batch

SCRIPT = Path(__file__).with_name("short_of_memory.py")
CELLS = [GruSpec(hidden_size=6, embedding_size=5), MinGruSpec(hidden_size=6, embedding_size=5)]
GROSS = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"


def toy(model=CELLS[0], **changes):
    return Toy(toy_spec(model=model, batch=BatchSpec(max_slots="100", lanes=2), train=TrainSpec(epochs=1), **changes))


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("parts", [1, 2, 4, 64])
@pytest.mark.parametrize("kind", ["ctc", "classify", "frames", "language", "tag"])
def test_parts_are_the_batch(kind, parts, form):
    if kind == "frames":
        data = Toy(
            toy_spec(task=ClassifySpec(), model=GruSpec(hidden_size=4), split=SplitSpec(test=6)), frames_draft(30)
        )
    elif kind == "tag":
        data = Toy(toy_spec(task=TagSpec(), model=CELLS[0], split=SplitSpec(test=4)), waves_draft(20))
    else:
        tasks = {"classify": ClassifySpec(), "language": LanguageSpec()}
        data = toy(**({"task": tasks[kind]} if kind in tasks else {}))
    run = data.run(form=form)
    run.network.eval()
    batch = run.feed.largest()
    cut = split_batch(batch, parts)
    assert len(cut) == min(parts, len(batch.lengths_B))
    sizes = [len(part.lengths_B) for part in cut]
    assert max(sizes) - min(sizes) <= 1
    for name in ("lengths_B", "label_lengths_B", "rows_B", "weights_B"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in cut]), getattr(batch, name))
    assert sum(part.frames for part in cut) == batch.frames
    assert sum(part.slots for part in cut) == batch.slots
    assert all(np.shares_memory(part.inputs, batch.inputs) for part in cut)
    whole = loss_sum(run, batch)
    assert float(sum(loss_sum(run, part) for part in cut)) == pytest.approx(float(whole), rel=1e-6)


@torch.no_grad()
def loss_sum(run, batch):
    x, packed = torch.from_numpy(batch.inputs), {"packed": True} if batch.form is Form.packed else {}
    return run.task.loss_sum(run.network(x, torch.from_numpy(batch.lengths_B), **packed), batch)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError(GROSS), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError(GROSS[:15]), True),  # as seen where memory was gone altogether
        (RuntimeError("[enforce fail at other.cpp:1] x > 0"), False),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (TransientError("out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error, is_memory):
    assert bool(out_of_memory(error)) is is_memory


class Tight(torch.nn.Module):
    """A network that has no room for more than so many rows at once; each time, some gradients are there already."""

    def __init__(self, inner, most_rows):
        super().__init__()
        self.inner = inner
        self.most_rows = most_rows
        self.refused = 0

    def forward(self, x, lengths_B, **how):
        logits = self.inner(x, lengths_B, **how)
        if len(lengths_B) > self.most_rows:
            self.refused += 1
            logits.register_hook(_raise)  # on the way back
        return logits


def _raise(_):
    raise RuntimeError(GROSS)


def tight(data, most_rows):
    run = data.run()
    forward = run.network.forward
    holder = Tight(_Call(forward), most_rows)
    run.network.forward = holder.forward
    return run, holder


class _Call(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.forward = call


@pytest.mark.parametrize("model", CELLS, ids=["gru", "mingru"])
@pytest.mark.parametrize("most_rows", [1, 3])
def test_a_run_short_of_memory_ends_in_the_same_weights(model, most_rows):
    data = toy(model, optim=SGD, split=SplitSpec())  # evaluations are not cut
    whole = data.run()
    outcome = fit(whole)
    run, holder = tight(data, most_rows)
    again = fit(run)
    assert holder.refused > 1
    assert float((weights(run) - weights(whole)).abs().max()) < 1e-6
    assert again.state.update == outcome.state.update
    told = run.track.told("split")
    assert [facts["parts"] for facts in told] == [2 ** (n + 1) for n in range(len(told))]
    assert all(facts["level"] == "warning" and "can't allocate" in facts["wanted"] for facts in told)


def test_a_single_row_that_does_not_fit_ends_the_run():
    run, _ = tight(toy(), 0)
    with pytest.raises(InfeasibleError, match="memory: got too little for a single row of 12 time steps") as refused:
        fit(run)
    assert refused.value.exit_code == 3
    assert "batch.long_rows=chunk" in refused.value.hint
    assert run.checkpoints.states == {}


def test_other_errors_pass():
    run = toy().run()

    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    run.network.forward = broken
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(run)


def test_parts_stay_and_pieces_are_left_alone():
    run = toy().run()
    update = next(run.feed.starting_at(0, 0))
    splitter, micro = Splitter(), update.micros[0]
    assert splitter.shares([micro]) == [(micro,)]
    splitter.halve(update.micros, "x")
    parts = splitter.shares([micro])
    assert [part.part for (part,) in parts] == [0, 1]
    assert splitter.shares([micro, micro]) == [(micro, micro)]
    while splitter.parts < max(len(m.batch.lengths_B) for m in update.micros):
        splitter.halve(update.micros, "x")
    with pytest.raises(InfeasibleError):
        splitter.halve(update.micros, "x")


def test_a_real_lack_of_memory():
    """A process with a limit on its address space trains what does not fit at once (short_of_memory.py)."""
    lean = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)], env=os.environ | lean, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    parts, distance, *_ = first.split()
    assert int(parts) >= 2
    assert float(distance) < 1e-6
    assert "memory: got too little for a single row of 12000 time steps" in second
