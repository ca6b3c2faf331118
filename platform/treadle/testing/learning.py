"""Whether a recurrent stack learns a task: training on fresh rows, scored on rows held out.

Shape letters: B rows, T time steps, N frames of all rows laid end to end, S rows, H outputs of the stack, K classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from treadle.errors import DivergenceError
from treadle.nn.losses import IGNORED
from treadle.nn.rows import Rows
from treadle.nn.stack import RecurrentStack
from treadle.testing.tasks import Task, TaskBatch

__all__ = ["Learned", "Recipe", "Solver", "learn", "score"]


class Solver(nn.Module):
    """A stack with what a task needs around it: an embedding of tokens or frames, and a linear layer for answers.

    Frames of numbers are embedded too: a stack with `norm` divides its input by its size, which of two numbers
    leaves little.

    Args:
        task: what to solve.
        stack: reads the embedding.
    """

    def __init__(self, task: Task, stack: RecurrentStack) -> None:
        super().__init__()
        form, size = task.form, stack.input_size
        self.per_frame = form.per_frame
        self.embedding = nn.Embedding(form.num_symbols, size) if form.num_symbols else nn.Linear(form.frame_size, size)
        self.stack = stack
        self.head = nn.Linear(stack.output_size, form.num_classes or 1)

    def forward(self, batch: TaskBatch) -> Tensor:
        """Scores of the answers: [N, K] where frames are asked, else [S, K]; [S, 1] for a number."""
        rows = Rows.of_lengths(batch.lengths_B, device=batch.x.device, padded=(batch.x.shape[0], batch.x.shape[1]))
        h_NH, _ = self.stack(self.embedding(rows.pack(batch.x)), offsets=rows, final_state=False)
        return self.head(h_NH if self.per_frame else h_NH.index_select(0, rows.last_S))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Args:
        updates: at most so many.
        num_rows: rows of an update.
        learning_rate: the highest, of Adam: it grows for `warmup` updates and falls in a line to a tenth at the last.
        warmup: updates.
        clip: largest norm of the gradient.
        goal: stop once rows held out score this well, see `score`; None for all updates.
        check_every: updates between looks at them.
        seed: of the rows; weights come from torch's global stream.
    """

    updates: int = 500
    num_rows: int = 32
    learning_rate: float = 3e-3
    warmup: int = 20
    clip: float = 1.0
    goal: float | None = None
    check_every: int = 25
    seed: int = 0

    def learning_rate_at(self, update: int) -> float:
        """Of the update of that number, from 1."""
        growing = update / max(1, self.warmup)
        falling = 1 - 0.9 * (update - self.warmup) / max(1, self.updates - self.warmup)
        return self.learning_rate * min(growing, falling)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What came of it.

    Args:
        score: on rows that neither training nor stopping saw.
        updates: made.
        reached: whether the goal was reached on the way.
        cpu_s: process CPU time of the training, looks at held-out rows left out.
    """

    score: float
    updates: int
    reached: bool
    cpu_s: float


def loss_of(scores: Tensor, batch: TaskBatch) -> Tensor:
    """Mean cross-entropy of the answers asked for, or mean squared error."""
    if batch.targets.is_floating_point():
        return functional.mse_loss(scores[:, 0], batch.targets)
    return functional.cross_entropy(scores, _asked(batch), ignore_index=IGNORED)


def _asked(batch: TaskBatch) -> Tensor:
    """Targets as the solver's scores are laid out."""
    if batch.targets.ndim == 1:
        return batch.targets
    valid_BT = torch.arange(batch.x.shape[1]) < batch.lengths_B[:, None]
    return batch.targets[valid_BT]


@torch.no_grad()
def score(solver: Solver, batch: TaskBatch) -> float:
    """The share of right answers; for numbers R squared, 1 - error / variance. 1 is perfect."""
    scores = solver(batch)
    if batch.targets.is_floating_point():
        return 1 - (functional.mse_loss(scores[:, 0], batch.targets) / batch.targets.var(correction=0)).item()
    targets = _asked(batch)
    asked = targets != IGNORED
    return (scores[asked].argmax(-1) == targets[asked]).double().mean().item()


def learn(solver: Solver, task: Task, recipe: Recipe, *, held_out: int = 512) -> Learned:
    """Train `solver` in place on rows drawn afresh for every update.

    Args:
        solver: what to train.
        task: where rows come from.
        recipe: how.
        held_out: rows of the two batches held out, one to stop by, one to score.

    Raises:
        DivergenceError: the loss is not finite.
    """
    watched, scored = (task.draw(held_out, Generator().manual_seed(10**6 + 2 * recipe.seed + i)) for i in range(2))
    generator = Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(solver.parameters(), lr=recipe.learning_rate)
    cpu_s, update, reached = 0.0, 0, False
    while update < recipe.updates and not reached:
        started = time.process_time()
        for _ in range(min(recipe.check_every, recipe.updates - update)):
            update += 1
            optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(update)
            _update(solver, task.draw(recipe.num_rows, generator), optimizer, recipe.clip)
        cpu_s += time.process_time() - started
        reached = recipe.goal is not None and score(solver, watched) >= recipe.goal
    return Learned(score=score(solver, scored), updates=update, reached=reached, cpu_s=cpu_s)


def _update(solver: Solver, batch: TaskBatch, optimizer: torch.optim.Optimizer, clip: float) -> None:
    loss = loss_of(solver(batch), batch)
    if not bool(loss.isfinite()):
        raise DivergenceError(f"loss: got {loss.item()}, expected a finite number", hint="lower the learning rate")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(solver.parameters(), clip)
    optimizer.step()
