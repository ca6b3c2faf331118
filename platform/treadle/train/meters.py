"""What a run tells of itself between two evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from treadle.train.evaluate import Evaluation
from treadle.train.feed import Feed, Update
from treadle.train.run import Run
from treadle.train.state import TrainState
from treadle.train.streams import StreamFeed
from treadle.train.updater import Moved

__all__ = ["Course", "Meters"]


class Course:
    """The updates of a feed from a state on; it can be put back to an earlier one."""

    def __init__(self, feed: Feed | StreamFeed, state: TrainState) -> None:
        self._feed = feed
        self._updates = feed.starting_at(state.epoch, state.index)

    def go_to(self, state: TrainState) -> TrainState:
        """Go on behind `state`, which is given back."""
        self.close()
        self._updates = self._feed.starting_at(state.epoch, state.index)
        return state

    def __iter__(self) -> Iterator[Update]:
        return self

    def __next__(self) -> Update:
        return next(self._updates)

    def close(self) -> None:
        """End the reading thread."""
        getattr(self._updates, "close", lambda: None)()


class Meters:
    """Sums between two rows of metrics. Losses and norms stay on the device until a row is due."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.restart()

    def waiting(self, updates: Course) -> Iterator[Update]:
        """`updates`, with the time spent waiting for each added up; closes the reading thread at the end."""
        try:
            while True:
                started = time.monotonic()
                self._run.reached.pulse.enter("reading")
                update = next(updates, None)
                if update is None:
                    return
                self._run.reached.pulse.enter("training")
                self._wait_s += time.monotonic() - started
                yield update
        finally:
            updates.close()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._since >= self._run.log_every_s

    def add(self, update: Update, *, loss: Tensor, count: float, moved: Moved) -> None:
        """One update more; one that was refused adds no loss, which may be no number.

        Args:
            loss: summed, of this rank. count: what the loss of all ranks is divided by.
        """
        self._updates += 1
        self._frames += update.frames
        self._rows += update.rows
        self._slots += sum(micro.batch.slots for micro in update.micros)
        self._made.append((loss, count, moved))  # added up once a row: each operation on one number takes 5 us

    def log(self, state: TrainState, update: Update, rate: float) -> None:
        """Write the row since the last one; the only point where the host waits for the device."""
        elapsed = max(1e-9, time.monotonic() - self._since)
        own, count = self._summed()
        loss, slots = self._run.world.sum([own, float(self._slots)])
        metrics: dict[str, Any] = {
            "trainer/update": state.update,
            "trainer/epoch": update.epoch + (update.index + 1) / update.num_updates,
            "trainer/frames_seen": state.frames_seen,
            "train/lr": rate,
            "train/grad_norm": float(self._made[-1][2].norm),
            **self._run.updater.facts(),
            "perf/frames_per_s": self._frames / elapsed,
            "perf/rows_per_s": self._rows / elapsed,
            "perf/update_ms": 1000 * elapsed / self._updates,
            "perf/data_wait_share": min(1.0, self._wait_s / elapsed),
            "data/fill": self._frames / slots,
        }
        if count:
            metrics["train/loss"] = loss / count
        self._run.track.log(state.update, metrics)
        self.restart()

    def _summed(self) -> tuple[float, float]:
        """Loss of this rank and count of all ranks, over the updates that were taken."""
        losses, counts, moves = zip(*self._made, strict=True)
        taken = torch.stack([moved.taken for moved in moves]).double()
        loss = torch.where(taken > 0, torch.stack(losses), 0.0).sum()
        return float(loss), float(torch.tensor(counts, dtype=torch.float64) @ taken.cpu())

    def log_evaluation(self, state: TrainState, evaluation: Evaluation) -> None:
        self._run.track.log(state.update, {f"val/{name}": value for name, value in evaluation.metrics.items()})
        self._since = time.monotonic()  # the evaluation's time is not the training's

    def restart(self) -> None:
        """Begin a new row."""
        self._since = time.monotonic()
        self._made: list[tuple[Tensor, float, Moved]] = []
        self._updates, self._frames, self._rows, self._slots = 0, 0, 0, 0
        self._wait_s = 0.0
