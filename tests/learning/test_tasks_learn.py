"""Cells learn, in seconds, tasks whose answers are known, and are scored on rows that they never saw.

The bounds leave room: of eight seeds, 0 to 7, the worst scored 0.999 in copying, 0.980 in adding, 0.998 in selective
copying and 0.998 of cues; in parity 1.000 on short rows, and on rows of 64 bits 0.979 (RNN) and 1.000 (LSTM, GRU).
MinGRU and MinLSTM scored 0.64 to 0.88 on short parities, 0.48 to 0.52 on long ones, where a guess scores 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Generator

from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.losses import IGNORED
from treadle.nn.stack import RecurrentStack
from treadle.testing.learning import Learned, Recipe, Solver, learn, score
from treadle.testing.tasks import (
    AddingTask,
    CopyTask,
    DelayedLabelTask,
    ParityTask,
    SelectiveCopyTask,
    Task,
    TaskBatch,
)

SEED = 0
PARITY = ParityTask(longest=16)
COPY = CopyTask(num_values=4, num_items=3, longest_delay=12)
ADDING = AddingTask(shortest=4, longest=32)
SELECTIVE = SelectiveCopyTask(num_values=4, num_items=4, longest_delay=16)
CUE = DelayedLabelTask(num_cues=4, num_distractors=4, cue_within=3, shortest=3, longest=24)
BLOCK = {"norm": True, "residual": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell that learns a task, and the score that it must reach."""

    task: Task
    cell: type[RecurrentStack]
    least: float
    recipe: Recipe
    hidden_size: int = 32
    num_layers: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.cell.__name__}-{type(self.task).__name__}"

    def run(self, seed: int) -> tuple[Solver, Learned]:
        torch.manual_seed(seed)
        solver = Solver(self.task, self.cell(self.hidden_size, self.hidden_size, self.num_layers, **self.options))
        return solver, learn(solver, self.task, replace(self.recipe, seed=seed))


FAST = Recipe(updates=600, learning_rate=1e-2, goal=0.999)
SLOW = replace(FAST, learning_rate=3e-3)
CASES = [
    Case(task=COPY, cell=LSTM, least=0.99, recipe=FAST, hidden_size=48),
    Case(task=COPY, cell=GRU, least=0.99, recipe=FAST, hidden_size=48),
    Case(task=ADDING, cell=LSTM, least=0.96, recipe=replace(FAST, goal=0.98), options=BLOCK, num_layers=2),
    Case(task=ADDING, cell=GRU, least=0.96, recipe=replace(FAST, goal=0.98), options=BLOCK, num_layers=2),
    Case(task=ADDING, cell=MinGRU, least=0.96, recipe=replace(FAST, goal=0.98), options=BLOCK, num_layers=2),
    Case(task=ADDING, cell=MinLSTM, least=0.96, recipe=replace(FAST, goal=0.98), options=BLOCK, num_layers=2),
    Case(task=SELECTIVE, cell=MinGRU, least=0.99, recipe=FAST, options=BLOCK, hidden_size=64, num_layers=3),
    Case(task=SELECTIVE, cell=MinLSTM, least=0.99, recipe=FAST, options=BLOCK, hidden_size=64, num_layers=3),
    Case(task=CUE, cell=RNN, least=0.99, recipe=SLOW),
    Case(task=CUE, cell=LSTM, least=0.99, recipe=FAST),
    Case(task=CUE, cell=GRU, least=0.99, recipe=FAST),
    Case(task=CUE, cell=MinGRU, least=0.99, recipe=FAST),
    Case(task=CUE, cell=MinLSTM, least=0.99, recipe=FAST),
]
TRACKING = [
    Case(task=PARITY, cell=RNN, least=0.99, recipe=replace(FAST, learning_rate=5e-3, goal=1.0)),
    Case(task=PARITY, cell=LSTM, least=0.99, recipe=replace(FAST, goal=1.0)),
    Case(task=PARITY, cell=GRU, least=0.99, recipe=replace(FAST, goal=1.0)),
]
NOT_TRACKING = [
    Case(
        task=PARITY,
        cell=cell,
        least=0.6,
        recipe=replace(FAST, updates=300),
        options=BLOCK,
        num_layers=2,
        hidden_size=64,
    )
    for cell in (MinGRU, MinLSTM)
]


def at_the_end(length: int) -> TaskBatch:
    """Rows of one length of which only the last parity is asked."""
    batch = ParityTask(shortest=length, longest=length).draw(1000, Generator().manual_seed(77))
    earlier_T = torch.arange(length) < length - 1
    return replace(batch, targets=batch.targets.masked_fill(earlier_T, IGNORED))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learns(case: Case) -> None:
    _, learned = case.run(SEED)
    assert learned.score >= case.least, learned


@pytest.mark.parametrize("case", TRACKING, ids=str)
def test_parity_is_learned_on_short_rows_and_holds_on_rows_four_times_as_long(case: Case) -> None:
    solver, learned = case.run(SEED)
    assert learned.score >= case.least, learned
    assert score(solver, at_the_end(64)) >= 0.95


@pytest.mark.parametrize("case", NOT_TRACKING, ids=str)
def test_parity_is_beyond_cells_whose_gates_see_only_the_input(case: Case) -> None:
    """They fit short rows in part, and guess on longer ones: no setting mends that, another cell does."""
    solver, learned = case.run(SEED)
    assert case.least <= learned.score < 0.99, learned
    assert score(solver, at_the_end(64)) < 0.6
