"""Drawn rows are what a task says they are, and its answers are right: worked out again row by row in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from treadle.errors import ConfigError
from treadle.nn.losses import IGNORED
from treadle.testing.tasks import (
    AddingTask,
    CopyTask,
    DelayedLabelTask,
    ParityTask,
    SelectiveCopyTask,
    Task,
    TaskBatch,
)

TASKS: list[Task] = [
    CopyTask(num_values=5, num_items=3, shortest_delay=0, longest_delay=9),
    SelectiveCopyTask(num_values=5, num_items=3, shortest_delay=0, longest_delay=9),
    AddingTask(shortest=2, longest=13),
    ParityTask(shortest=1, longest=12),
    ParityTask(shortest=1, longest=12, running=False),
    DelayedLabelTask(num_cues=5, num_distractors=3, cue_within=4, shortest=4, longest=15),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
seeds = st.integers(0, 2**32)


def drawn(task: Task, seed: int, num_rows: int = 16) -> TaskBatch:
    return task.draw(num_rows, Generator().manual_seed(seed))


def real_rows(batch: TaskBatch) -> list[list]:
    """The frames of each row, nothing of its padding."""
    return [row[:length].tolist() for row, length in zip(batch.x, batch.lengths_B.tolist(), strict=True)]


def copied(row: list[int], _: Task) -> list[int]:
    symbols = [token - 2 for token in row if token >= 2]
    assert row[len(row) - len(symbols) :] == [1] * len(symbols)
    assert row.count(1) == len(symbols)
    return [IGNORED] * (len(row) - len(symbols)) + symbols


def added(row: list[list[float]], _: Task) -> float:
    marked = [step for step, (_, mark) in enumerate(row) if mark == 1]
    assert len(marked) == 2
    assert marked[0] < len(row) // 2 <= marked[1]
    return sum(row[step][0] for step in marked)


def parity(row: list[int], task: Task) -> list[int] | int:
    odd = [sum(row[: step + 1]) & 1 for step in range(len(row))]
    return odd if task.form.per_frame else odd[-1]


def cued(row: list[int], task: Task) -> int:
    (cue,) = [token for token in row if token < 5]
    assert row.index(cue) < 4
    return cue


ANSWERS = {
    CopyTask: copied,
    SelectiveCopyTask: copied,
    AddingTask: added,
    ParityTask: parity,
    DelayedLabelTask: cued,
}


@every_task
@given(seed=seeds)
def test_answers_are_right_and_rows_are_well_formed(task, seed):
    batch = drawn(task, seed)
    assert batch.x.shape[1] == batch.lengths_B.max()
    answer = ANSWERS[type(task)]
    for row, (frames, target) in enumerate(zip(real_rows(batch), batch.targets, strict=True)):
        wanted = answer(frames, task)
        got = target[: len(frames)].tolist() if task.form.per_frame else target.item()
        assert got == (pytest.approx(wanted, abs=1e-6) if isinstance(wanted, float) else wanted), row
        if task.form.per_frame:
            assert set(target[len(frames) :].tolist()) <= {IGNORED}


@every_task
@given(seed=seeds)
def test_answers_depend_on_nothing_behind_a_row(task, seed):
    batch = drawn(task, seed)
    padding_BT = torch.arange(batch.x.shape[1]) >= batch.lengths_B[:, None]
    other = drawn(task, seed + 1)
    for content in (batch.x.max(), batch.x.min(), other.x[0, 0]):
        changed = batch.x.clone()
        changed[padding_BT] = content
        assert torch.equal(task.solve(changed, batch.lengths_B), batch.targets)


@every_task
@given(seed=seeds)
def test_what_is_drawn_fits_the_form(task, seed):
    batch, form = drawn(task, seed), task.form
    if form.num_symbols:
        assert batch.x.dtype == torch.int64
        assert (batch.x >= 0).all()
        assert (batch.x < form.num_symbols).all()
    else:
        assert batch.x.shape[2] == form.frame_size
        assert batch.x.dtype == torch.float32
    assert batch.targets.dtype == (torch.int64 if form.num_classes else torch.float32)
    assert batch.targets.ndim == (2 if form.per_frame else 1)
    if form.num_classes:
        assert batch.targets.max() < form.num_classes


@every_task
def test_the_seed_decides(task):
    first, again, other = drawn(task, 3), drawn(task, 3), drawn(task, 4)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.lengths_B, again.lengths_B)
    assert torch.equal(first.targets, again.targets)
    assert first.x.shape != other.x.shape or not torch.equal(first.x, other.x)


@every_task
def test_every_length_and_every_answer_comes_up_equally_often(task):
    num_rows = 8000
    batch = drawn(task, 5, num_rows)
    lengths = Counter(batch.lengths_B.tolist())
    assert max(lengths) - min(lengths) + 1 == len(lengths)
    assert_even(list(lengths.values()))
    if task.form.num_classes:
        # Parities of one row hang together, so only its last is counted.
        asked = batch.targets if batch.targets.ndim == 1 else batch.targets.gather(1, batch.lengths_B[:, None] - 1)
        counts = asked.flatten().bincount(minlength=task.form.num_classes)
        assert_even(counts.tolist())


def assert_even(counts: list[int]) -> None:
    """Within five standard deviations of the mean: a fair draw fails once in 10^6."""
    mean = sum(counts) / len(counts)
    assert max(abs(count - mean) for count in counts) < 5 * math.sqrt(mean), counts


@every_task
def test_chance_is_what_a_guess_scores(task):
    batch = drawn(task, 6, 20_000)
    targets = batch.targets[batch.targets != IGNORED] if task.form.num_classes else batch.targets
    if not task.form.num_classes:
        assert task.chance.accuracy is None
        assert ((targets - 1) ** 2).mean().item() == pytest.approx(task.chance.loss, rel=0.03)
        return
    shares = targets.bincount() / len(targets)
    entropy = -(shares * shares.log()).sum().item()
    assert task.chance.loss == pytest.approx(entropy, rel=0.01)
    assert task.chance.accuracy == pytest.approx(shares.max().item(), rel=0.06)


def places(x_BT: Tensor, chosen: Tensor) -> list[int]:
    """How many rows have a chosen token at each time step."""
    return chosen.sum(0).tolist()[: x_BT.shape[1]]


def test_symbols_stand_anywhere_among_the_blanks():
    task = SelectiveCopyTask(num_values=4, num_items=3, shortest_delay=9, longest_delay=9)
    x_BT = drawn(task, 7, 8000).x
    assert_even(places(x_BT, x_BT[:, :12] >= 2))


def test_symbols_to_copy_stand_first():
    task = CopyTask(num_values=4, num_items=3, shortest_delay=9, longest_delay=9)
    x_BT = drawn(task, 7, 100).x
    assert places(x_BT, x_BT >= 2) == [100] * 3 + [0] * 12


def test_cues_and_marks_stand_anywhere_they_may():
    task = DelayedLabelTask(num_cues=3, cue_within=6, shortest=10, longest=10)
    x_BT = drawn(task, 8, 8000).x
    counts = places(x_BT, x_BT < 3)
    assert_even(counts[:6])
    assert counts[6:] == [0] * 4
    frames_BTD = drawn(AddingTask(shortest=11, longest=11), 8, 8000).x
    counts = places(frames_BTD[..., 1], frames_BTD[..., 1] > 0)
    assert_even(counts[:5])
    assert_even(counts[5:])


def test_padding_tempts():
    """A layer that reads padded slots meets there what would change its answer."""
    for task in (TASKS[0], TASKS[1], TASKS[2], TASKS[4]):
        batch = drawn(task, 9, 64)
        full_B = torch.full_like(batch.lengths_B, batch.x.shape[1])
        assert not torch.equal(task.solve(batch.x, full_B), batch.targets)
    batch = drawn(TASKS[5], 9, 64)
    padding_BT = torch.arange(batch.x.shape[1]) >= batch.lengths_B[:, None]
    assert (batch.x[padding_BT] < 5).all()  # cues only


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CopyTask(num_values=1), "num_values: got 1, expected 2 or more"),
        (lambda: CopyTask(num_items=0), "num_items: got 0, expected 1 or more"),
        (lambda: CopyTask(shortest_delay=-1), "shortest delay: got -1, expected 0 or more"),
        (lambda: SelectiveCopyTask(shortest_delay=4, longest_delay=3), "longest delay: got 3, expected 4 or more"),
        (lambda: AddingTask(shortest=1), "shortest length: got 1, expected 2 or more"),
        (lambda: ParityTask(shortest=0), "shortest length: got 0, expected 1 or more"),
        (lambda: DelayedLabelTask(cue_within=9, shortest=8), "shortest length: got 8, expected 9 or more"),
        (lambda: replace(DelayedLabelTask(), num_cues=1), "num_cues: got 1, expected 2 or more"),
        (lambda: ParityTask().draw(0, Generator()), "num_rows: got 0, expected 1 or more"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
