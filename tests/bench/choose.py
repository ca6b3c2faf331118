"""Which cell for which sequences: tasks with known answers, the cost of training and of one time step, and options.

Process CPU time on one thread. Scores are of rows that neither training nor stopping saw.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from recording import record
from torch import Generator

from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM, count_parameters
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
)

COMMAND = "python tests/bench/choose.py"
CELLS = (RNN, LSTM, GRU, MinGRU, MinLSTM)
SEEDS = (0, 1, 2)
HIDDEN, UPDATES = 64, 500
BLOCK: dict[str, Any] = {"norm": True, "residual": True}
SELECTIVE = SelectiveCopyTask(num_values=4, num_items=4, longest_delay=16)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A task, the layers that read it, and the score that counts as solved."""

    name: str
    task: Task
    num_layers: int
    goal: float | None


TRIALS = (
    Trial(name="parity so far, up to 16 bits", task=ParityTask(longest=16), num_layers=2, goal=1.0),
    Trial(
        name="a cue among the first 4 of up to 64 frames, asked at the end",
        task=DelayedLabelTask(cue_within=4, shortest=4, longest=64),
        num_layers=2,
        goal=0.99,
    ),
    Trial(
        name="sum of two marked numbers of up to 32 (R²)",
        task=AddingTask(shortest=4, longest=32),
        num_layers=2,
        goal=0.98,
    ),
    Trial(
        name="copy 4 symbols after up to 16 blanks",
        task=CopyTask(num_values=4, num_items=4, longest_delay=16),
        num_layers=3,
        goal=0.99,
    ),
    Trial(name="copy 4 symbols found among up to 16 blanks", task=SELECTIVE, num_layers=3, goal=0.99),
)


def trained(cell: type[RecurrentStack], trial: Trial, seed: int, **options: Any) -> tuple[Solver, Learned]:
    """The solver and what came of training it; options are those of the cell's stack."""
    torch.manual_seed(seed)
    solver = Solver(trial.task, cell(HIDDEN, HIDDEN, trial.num_layers, **options))
    rate = 3e-3 if cell is RNN else 1e-2
    recipe = Recipe(updates=UPDATES, learning_rate=rate, goal=trial.goal, seed=seed)
    return solver, learn(solver, trial.task, recipe)


def longer_parity(cell: type[RecurrentStack], length: int = 64) -> str:
    """Accuracy of the last parity of rows of that length, worst seed, after all updates on short ones."""
    whole = replace(TRIALS[0], goal=None)
    return f"{min(_at_the_end(trained(cell, whole, seed, **BLOCK)[0], length) for seed in SEEDS):.3f}"


def _at_the_end(solver: Solver, length: int) -> float:
    batch = ParityTask(shortest=length, longest=length).draw(1000, Generator().manual_seed(77))
    earlier_T = torch.arange(length) < length - 1
    return score(solver, replace(batch, targets=batch.targets.masked_fill(earlier_T, IGNORED)))


def summary(runs: list[Learned]) -> str:
    """The worst score, and how long training took on the average."""
    worst, seconds = min(run.score for run in runs), statistics.mean(run.cpu_s for run in runs)
    reached = all(run.reached for run in runs)
    return f"{worst:.3f} in {seconds:.1f} s" if reached else f"{worst:.3f}, not in {seconds:.0f} s"


def tasks() -> None:
    rows: list[list[str]] = []
    for trial in TRIALS:
        cells = [summary([trained(cell, trial, seed, **BLOCK)[1] for seed in SEEDS]) for cell in CELLS]
        guess = trial.task.chance.accuracy
        rows.append([trial.name, f"{guess:.2f}" if guess else "0", f"{trial.goal}", *cells])
        if trial is TRIALS[0]:
            name = f"parity of 64 bits, after {UPDATES} updates on up to 16"
            rows.append([name, "0.50", "", *(longer_parity(cell) for cell in CELLS)])
    title = (
        f"What a cell learns: worst score of {len(SEEDS)} seeds and mean CPU seconds to the goal, or not reached in "
        f"{UPDATES} updates; {HIDDEN} hidden, 2 layers (3 for copying) with norm and residual, 32 fresh rows an update"
    )
    record("choose_tasks", title, COMMAND, ["task", "chance", "goal", *(cell.__name__ for cell in CELLS)], rows)


def cpu_times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds; the runs take turns, and the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def speed() -> None:
    hidden, num_rows, num_steps, steps = 256, 32, 256, 200
    layers = {cell.__name__: cell(hidden, hidden) for cell in CELLS}
    x_BTD = torch.randn(num_rows, num_steps, hidden, requires_grad=True)
    frame_BD = torch.randn(1, hidden)

    def training(layer: RecurrentStack) -> Callable[[], object]:
        return lambda: layer(x_BTD, final_state=False)[0].sum().backward()

    def stepping(layer: RecurrentStack) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> None:
            state = None
            for _ in range(steps):
                _, state = layer.step(frame_BD, state)

        return run

    train_s = cpu_times({name: training(layer) for name, layer in layers.items()}, 11)
    step_s = cpu_times({name: stepping(layer) for name, layer in layers.items()}, 11)
    rows = [
        [
            name,
            f"{count_parameters(layer):,}",
            f"{num_rows * num_steps / train_s[name]:,.0f}",
            f"{train_s['GRU'] / train_s[name]:.1f}",
            f"{step_s[name] / steps * 1e6:.0f}",
            f"{step_s[name] / step_s['GRU']:.1f}",
            sum(part.numel() for part in layer.initial_state(1).values()),
        ]
        for name, layer in layers.items()
    ]
    headers = [
        "layer",
        "parameters",
        "frames/s in training",
        "/ GRU",
        "µs a step, one row",
        "step / GRU",
        "numbers in the state",
    ]
    title = f"Cost at equal width: one layer, {hidden} inputs and hidden units, {num_rows} x {num_steps} frames, fp32"
    record("choose_speed", title, COMMAND, headers, rows)


def options() -> None:
    variants: tuple[tuple[str, type[RecurrentStack], dict[str, Any]], ...] = (
        ("MinGRU, norm and residual", MinGRU, BLOCK),
        ("neither", MinGRU, {}),
        ("conv_size=4", MinGRU, {**BLOCK, "conv_size": 4}),
        ("mlp_factor=2", MinGRU, {**BLOCK, "mlp_factor": 2.0}),
        ("expansion=2", MinGRU, {**BLOCK, "expansion": 2.0}),
        ('candidate="tanh"', MinGRU, {**BLOCK, "candidate": "tanh"}),
        ('candidate="identity"', MinGRU, {**BLOCK, "candidate": "identity"}),
        ("MinLSTM, norm and residual", MinLSTM, BLOCK),
        ("forget_bias=3", MinLSTM, {**BLOCK, "forget_bias": 3.0}),
        ("normalize_gates=False", MinLSTM, {**BLOCK, "normalize_gates": False}),
    )
    rows = []
    for name, cell, chosen in variants:
        trial = replace(TRIALS[-1], num_layers=2)
        runs = [trained(cell, trial, seed, **chosen)[1] for seed in SEEDS[:2]]
        updates = ", ".join(str(run.updates) if run.reached else "not reached" for run in runs)
        rows.append([name, updates, f"{min(run.score for run in runs):.3f}", f"{runs[0].cpu_s / runs[0].updates:.4f}"])
    title = f"Options on the last task, 2 layers of {HIDDEN}: updates to a score of 0.99, {UPDATES} at most, two seeds"
    record("choose_options", title, COMMAND, ["options", "updates", "worst score", "CPU s an update"], rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    begun = time.process_time()
    speed()
    tasks()
    options()
    print(f"{time.process_time() - begun:.0f} CPU seconds in all")
