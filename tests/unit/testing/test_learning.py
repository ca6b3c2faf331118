"""How a task is trained and scored, apart from whether a cell learns it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Generator

from treadle.errors import DivergenceError
from treadle.nn import GRU, MinGRU
from treadle.testing.learning import Recipe, Solver, learn, loss_of, score
from treadle.testing.tasks import AddingTask, CopyTask, DelayedLabelTask, ParityTask

SHORT = Recipe(updates=6, num_rows=4, check_every=2)
TASKS = [ParityTask(longest=6), CopyTask(num_items=2, longest_delay=3), AddingTask(shortest=2, longest=6)]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


def fresh(task, cell=MinGRU, size=4):
    torch.manual_seed(0)
    return Solver(task, cell(size, size))


@every_task
def test_scores_of_a_row_are_those_it_has_alone(task):
    solver, batch = fresh(task), task.draw(5, Generator().manual_seed(1))
    whole = solver(batch)
    alone = [
        solver(
            replace(
                batch, x=batch.x[i : i + 1, :n], lengths_B=batch.lengths_B[i : i + 1], targets=batch.targets[i : i + 1]
            )
        )
        for i, n in enumerate(batch.lengths_B.tolist())
    ]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-6)


def test_loss_and_score_of_an_untrained_head_are_chance():
    task = DelayedLabelTask(num_cues=5)
    solver = fresh(task)
    torch.nn.init.zeros_(solver.head.weight)
    torch.nn.init.zeros_(solver.head.bias)
    batch = task.draw(4000, Generator().manual_seed(2))
    assert loss_of(solver(batch), batch).item() == pytest.approx(math.log(5), rel=1e-5)
    assert score(solver, batch) == pytest.approx(0.2, abs=0.03)


def test_only_frames_that_are_asked_count():
    task = CopyTask(num_values=3, num_items=2, longest_delay=4)
    solver, batch = fresh(task), task.draw(50, Generator().manual_seed(3))
    asked, losses = [], []
    for row, n in enumerate(batch.lengths_B.tolist()):
        one = replace(batch, x=batch.x[row : row + 1, :n], lengths_B=batch.lengths_B[row : row + 1])
        scores_NK = solver(one)
        losses += [-scores_NK[step].log_softmax(-1)[batch.targets[row, step]].item() for step in range(n - 2, n)]
        best_N = scores_NK.argmax(-1)
        asked += [best_N[step].item() == batch.targets[row, step].item() for step in range(n - 2, n)]
    assert len(asked) == 100
    assert score(solver, batch) == pytest.approx(sum(asked) / 100)
    assert loss_of(solver(batch), batch).item() == pytest.approx(sum(losses) / 100, rel=1e-5)


def test_a_row_is_answered_at_its_last_frame():
    task = DelayedLabelTask(cue_within=2, shortest=2, longest=6)
    solver, batch = fresh(task, GRU), task.draw(4, Generator().manual_seed(5))
    for row, n in enumerate(batch.lengths_B.tolist()):
        h_BTH, _ = solver.stack(solver.embedding(batch.x[row : row + 1, :n]))
        torch.testing.assert_close(solver(batch)[row], solver.head(h_BTH[0, -1]), rtol=1e-5, atol=1e-6)


def test_a_number_scores_by_the_variance_explained():
    task = AddingTask(shortest=2, longest=6)
    solver, batch = fresh(task), task.draw(4000, Generator().manual_seed(4))
    torch.nn.init.zeros_(solver.head.weight)
    torch.nn.init.ones_(solver.head.bias)
    assert score(solver, batch) == pytest.approx(0.0, abs=0.01)
    exact = replace(batch, targets=batch.targets * 0 + 1 + torch.randn(4000) * 1e-9)
    assert loss_of(solver(exact), exact).item() == pytest.approx(0.0, abs=1e-9)


def test_training_is_decided_by_its_seeds():
    task = ParityTask(longest=6)

    def weights(seed):
        solver = fresh(task)
        learn(solver, task, replace(SHORT, seed=seed), held_out=8)
        return torch.cat([p.detach().flatten() for p in solver.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_training_stops_at_the_goal_or_at_the_last_update():
    task = ParityTask(longest=4)
    done = learn(fresh(task), task, replace(SHORT, goal=0.0), held_out=8)
    assert (done.updates, done.reached) == (2, True)
    done = learn(fresh(task), task, replace(SHORT, goal=2.0, updates=5), held_out=8)
    assert (done.updates, done.reached) == (5, False)
    assert learn(fresh(task), task, SHORT, held_out=8).reached is False


def test_the_learning_rate_grows_then_falls_to_a_tenth():
    recipe = Recipe(updates=100, warmup=20, learning_rate=1.0)
    rates = [recipe.learning_rate_at(update) for update in range(1, 101)]
    assert rates.index(max(rates)) == 19
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[-1] == pytest.approx(0.1)
    assert sorted(rates[19:], reverse=True) == rates[19:]


def test_a_loss_that_is_not_finite_ends_training():
    task = ParityTask(longest=4)
    solver = fresh(task, GRU)
    torch.nn.init.constant_(solver.head.bias, math.nan)
    with pytest.raises(DivergenceError, match="loss: got nan"):
        learn(solver, task, SHORT, held_out=8)
