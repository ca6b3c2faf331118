"""Frames trained per CPU second with the batches of each plan: what padding, batch sizes and uneven ranks cost.

The same model, optimizer and padding code for all: one LSTM of 128 units over 16 channels, a class per row read after
its last frame, Adam. The LSTM is torch's, which computes every slot, as the peers' users have it; treadle's own, which
is given the lengths and skips most of the padding, is measured beside it.

Plans are of all 100,000 rows. An epoch of the worst takes twenty minutes, so batches of each plan are timed, evenly
spaced by size; their cost is fitted as a + b x length + c x slots + d x frames, and the fit, scaled to what this
plan's batches took, gives every batch of the plan its time. "In step" is what 8 ranks get that wait for the slowest of
them after each batch.
"""

from __future__ import annotations

import random
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from data_peers import RANKS, SLOTS, Ints, Steps, planners, reference_lengths, steps_of
from numpy.typing import NDArray
from recording import record
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from treadle.nn import LSTM

C, HIDDEN, CLASSES = 16, 128, 10
SLOTS_TIMED, REPEATS = 240_000, 3
"""Slots of each plan's sample, about three CPU seconds; times are the least of as many passes: others only add."""
FEWEST, MOST = 12, 48
PLANS = {
    "shuffled batches of 64 rows": "shuffled batches of 64 rows",
    "transformers 5.23.0 LengthGroupedSampler": "transformers 5.23.0 group_by_length",
    "transformers 5.23.0 BatchRebalanceSampler": "transformers 5.23.0 batch_rebalance",
    "lhotse 1.33.0 DynamicBucketingSampler, 30 buckets, 20,000 buffered, world 8": "lhotse 1.33.0, 30 buckets",
    "treadle, noise 0": "treadle, noise 0",
    "treadle, noise 0.05 (default)": "treadle (default)",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """A model and its optimizer."""

    cell: nn.Module
    head: nn.Linear
    optimizer: torch.optim.Optimizer
    takes_lengths: bool

    @classmethod
    def make(cls, *, ours: bool) -> Trainer:
        torch.manual_seed(0)
        cell = LSTM(C, HIDDEN) if ours else nn.LSTM(C, HIDDEN, batch_first=True)
        head = nn.Linear(HIDDEN, CLASSES)
        optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-3)
        return cls(cell=cell, head=head, optimizer=optimizer, takes_lengths=ours)

    def update(self, rows: list[Tensor], labels_B: Tensor) -> None:
        """One batch: padding, forward, backward and the optimizer."""
        x_BTC = pad_sequence(rows, batch_first=True)
        lengths_B = torch.tensor([len(row) for row in rows])
        if self.takes_lengths:  # noqa: SIM108
            y_BTH = self.cell(x_BTC, lengths=lengths_B, final_state=False)[0]
        else:
            y_BTH = self.cell(x_BTC)[0]
        last_BH = y_BTH[torch.arange(len(rows)), lengths_B - 1]
        loss = nn.functional.cross_entropy(self.head(last_BH), labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A plan's batches, flat: `step_B` says which of them the ranks run at the same time."""

    batches: list[Ints]
    step_B: Ints
    length_B: Ints
    slots_B: Ints
    frames_B: Ints
    sampled: Ints

    @classmethod
    def of(cls, steps: Steps, lengths_N: Ints) -> Plan:
        pairs = [(number, batch) for number, step in enumerate(steps) for batch in step if len(batch)]
        batches = [batch for _, batch in pairs]
        length_B = np.array([lengths_N[batch].max() for batch in batches])
        slots_B = length_B * np.array([len(batch) for batch in batches])
        frames_B = np.array([lengths_N[batch].sum() for batch in batches])
        count = int(np.clip(SLOTS_TIMED / slots_B.mean(), FEWEST, MOST))
        places = ((np.arange(count) + 0.5) * len(batches) / count).astype(np.int64)
        step_B = np.array([number for number, _ in pairs])
        sampled = np.argsort(slots_B, kind="stable")[places]
        return cls(
            batches=batches,
            step_B=step_B,
            length_B=length_B,
            slots_B=slots_B,
            frames_B=frames_B,
            sampled=sampled,
        )

    def features(self) -> NDArray[np.float64]:
        return np.stack((np.ones(len(self.batches)), self.length_B, self.slots_B, self.frames_B), axis=1)

    def rates(self, times: NDArray[np.float64], weights: NDArray[np.float64], frames: int) -> tuple[float, float]:
        """Frames per CPU second of one rank alone, and of ranks that wait for each other."""
        fitted_B = np.maximum(self.features() @ weights, 1e-4)
        fitted_B *= times.sum() / fitted_B[self.sampled].sum()  # large batches cost a little more a slot
        slowest = np.zeros(int(self.step_B.max()) + 1)
        np.maximum.at(slowest, self.step_B, fitted_B)
        return frames / fitted_B.sum(), frames / (RANKS * slowest.sum())


def time_batches(trainer: Trainer, plans: dict[str, Plan], rows: list[Tensor]) -> dict[str, NDArray[np.float64]]:
    """CPU seconds of the sampled batches; those of all plans are mixed, so that a busy machine slows them alike."""
    todo = [(name, place) for name, plan in plans.items() for place in range(len(plan.sampled))]
    found: dict[tuple[str, int], list[float]] = {key: [] for key in todo}
    shuffler = random.Random(0)
    for _ in range(REPEATS):
        shuffler.shuffle(todo)
        for name, place in todo:
            plan = plans[name]
            batch = plan.batches[plan.sampled[place]].tolist()
            started = time.process_time()
            trainer.update([rows[i] for i in batch], torch.tensor(batch) % CLASSES)
            found[name, place].append(time.process_time() - started)
    return {
        name: np.array([min(found[name, place]) for place in range(len(plan.sampled))]) for name, plan in plans.items()
    }


def fit(plans: dict[str, Plan], times: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Least squares of relative errors, so that small batches count as much as large ones."""
    features = np.concatenate([plan.features()[plan.sampled] for plan in plans.values()])
    taken = np.concatenate([times[name] for name in plans])
    weights: NDArray[np.float64] = np.linalg.lstsq(features / taken[:, None], np.ones(len(taken)), rcond=None)[0]
    errors = np.abs(features @ weights / taken - 1)
    print(f"fit of {len(taken)} batches: {weights * 1e6} µs, median error {np.median(errors):.1%}")
    return weights


def main() -> None:
    lengths_N = reference_lengths()
    frames = int(lengths_N.sum())
    rows = list(torch.randn(frames, C).split(lengths_N.tolist()))
    plans: dict[str, Plan] = {}
    for planner in planners():
        if planner.name in PLANS:
            plans[PLANS[planner.name]] = Plan.of(steps_of(planner, lengths_N)[0], lengths_N)
    cells: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    for ours in (False, True):
        times = time_batches(Trainer.make(ours=ours), plans, rows)
        weights = fit(plans, times)
        for name, plan in plans.items():
            cells[name].append(plan.rates(times[name], weights, frames))
    report(cells)


def report(rates: dict[str, list[tuple[float, float]]]) -> None:
    ours = rates["treadle (default)"]
    rows = []
    for name, found in rates.items():
        row: list[str] = [name]
        for kind in (0, 1):
            for place in (0, 1):
                rate = found[kind][place]
                row += [f"{rate / 1e3:.1f}", f"{ours[kind][place] / rate:.2f}"]
        rows.append(row)
    headers = ["plan"]
    for cell in ("torch.nn.LSTM", "treadle.nn.LSTM"):
        headers += [f"{cell}, one rank", "treadle's plan / it", f"{cell}, 8 in step", "treadle's plan / it"]
    title = f"Thousand frames trained per CPU second, LSTM of {HIDDEN} units, {SLOTS:,} slots or 64 rows a batch"
    record("data_training", title, "python tests/bench/data_training.py", headers, rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
