"""The training loop, one function, readable top to bottom."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from treadle import wire
from treadle.data import Form
from treadle.errors import DivergenceError
from treadle.nn import Network, PieceReader, train_in_chunks
from treadle.spec import JobSpec
from treadle.track import Tracker
from treadle.train.evaluate import Evaluation, Evaluator
from treadle.train.feed import Feed, Micro, Update
from treadle.train.optim import learning_rate
from treadle.train.precision import PrecisionChoice
from treadle.train.state import TrainState, snapshot
from treadle.train.task import Task, run_network
from treadle.train.world import World

__all__ = ["Checkpointer", "Control", "Outcome", "Run", "fit"]


class Checkpointer(Protocol):
    """Writes states; only rank 0's does."""

    def save(self, state: TrainState, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Take over owned copies and commit them in the background."""
        ...

    def wait(self) -> None:
        """Return when everything saved is committed; raise what a commit raised."""
        ...

    def is_due(self, state: TrainState) -> bool:
        """Whether to save after the update that `state` is about to take."""
        ...


class Control(Protocol):
    """What people ask of a running job; only rank 0 looks."""

    def wants_stop(self) -> bool: ...
    def wants_checkpoint(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a rank needs, built by `treadle.launch.worker`.

    Args:
        start: the state to go on from. log_every_s: least time between two rows of metrics.
    """

    spec: JobSpec
    world: World
    task: Task
    network: nn.Module
    optimizer: torch.optim.Optimizer
    precision: PrecisionChoice
    feed: Feed
    valid: Evaluator
    test: Evaluator
    checkpoints: Checkpointer
    control: Control
    track: Tracker
    start: TrainState
    log_every_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: "finished" with a test evaluation, or "stopped" without."""

    status: str
    state: TrainState
    test: Evaluation | None = None


def fit(run: Run) -> Outcome:
    """Train to the last epoch, or to the update at which all ranks agree to stop.

    Every decision that depends on time or on people is rank 0's and travels with the gradients, so
    that all ranks take it at the same update. They meet nowhere else.

    Raises:
        DivergenceError: the gradient norm is not finite; no state after it has been saved.
    """
    state, meters = run.start, Meters(run)
    for update in meters.waiting(run.feed.starting_at(state.epoch, state.index)):
        count = run.task.normaliser(frames=update.weighted_frames, rows=update.weighted_rows)
        run.network.train()
        for micros in by_rows(update.micros):
            seed_dropout(run, state, micros[0])
            # A sum over one count of all ranks: neither padding nor the split into batches can bias it.
            meters.add_loss(go_back(run, micros, count))
        stop, save, log = run.world.sum_gradients(run.network, _signals(run, state, meters))
        norm = clip_gradients(run)
        rate = learning_rate(run.spec.optim, progress(run.spec, update))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        state = state.advanced(update.frames, is_last_of_epoch=update.is_last_of_epoch)
        meters.add_update(update, count=count, norm=norm)
        if log or stop or update.is_last_of_epoch:
            meters.log(state, update, rate)
        if update.is_last_of_epoch and _evaluation_due(run, state):
            meters.log_evaluation(state, run.valid(run.network, run.precision))
        if save or stop:
            _save(run, state, meters)
        if stop:
            run.checkpoints.wait()
            return Outcome(status="stopped", state=state)
    _save(run, state, meters)
    test = run.test(run.network, run.precision) if len(run.test) else None
    if test is not None:
        run.track.log(state.update, {f"test/{name}": value for name, value in test.metrics.items()})
    run.checkpoints.wait()
    return Outcome(status="finished", state=state, test=test)


def by_rows(micros: Sequence[Micro]) -> list[tuple[Micro, ...]]:
    """Microbatches, those that are pieces of the same rows together."""
    groups = itertools.groupby(micros, key=lambda micro: (micro.number, micro.lane))
    return [tuple(group) for _, group in groups]


def go_back(run: Run, micros: Sequence[Micro], count: float) -> Tensor:
    """Add the gradients of a microbatch, or of the row that several are the pieces of; give its summed loss.

    Pieces give the gradients of the whole row in the memory of one (tests/unit/train/test_long_rows.py).
    """
    last = micros[-1].batch
    if len(micros) == 1:
        with run.precision.autocast():
            loss = run.task.loss_sum(run_network(run.network, last, run.world.device), last)
        (loss / count).backward()
        return loss.detach()
    assert isinstance(run.network, Network)
    reader = PieceReader(network=run.network)

    def piece(index: int, before: Any) -> tuple[Tensor | None, Any]:
        batch = micros[index].batch
        x = torch.from_numpy(batch.inputs).to(run.world.device)
        x_1TD = x[None] if batch.form is Form.packed else x  # a row too long to be read at once is alone
        with run.precision.autocast():
            after = reader.read(x_1TD, torch.from_numpy(batch.lengths_B), before)
            loss = None if batch is not last else run.task.loss_sum(reader.logits(after), last) / count
        return loss, after

    return train_in_chunks(piece, len(micros)).loss_sum * count


def _signals(run: Run, state: TrainState, meters: Meters) -> tuple[float, float, float]:
    """(stop, save, log), decided by rank 0 alone."""
    if run.world.rank:
        return 0.0, 0.0, 0.0
    save = run.checkpoints.is_due(state) or run.control.wants_checkpoint()
    return float(run.control.wants_stop()), float(save), float(meters.is_due)


def _evaluation_due(run: Run, state: TrainState) -> bool:
    due = state.epoch % run.spec.train.evaluate_every == 0 or state.epoch == run.spec.train.epochs
    return bool(len(run.valid)) and due


def _save(run: Run, state: TrainState, meters: Meters) -> None:
    meters.check_finite(state)
    if run.world.rank == 0:
        started = time.monotonic()
        run.checkpoints.save(state, snapshot(run.network, run.optimizer))
        run.track.log(state.update, {"ckpt/update": state.update, "ckpt/save_s": time.monotonic() - started})


def seed_dropout(run: Run, state: TrainState, micro: Micro) -> None:
    """Key the dropout of a microbatch by its place in the plan, never by rank: any world draws the same."""
    key = int(wire.digest([run.spec.train.seed, state.update, micro.number, micro.lane])[:15], 16)
    if run.world.device.type == "cpu":
        # Not torch.manual_seed: without CUDA it formats a stack trace for a later CUDA, 0.2 ms a call.
        torch.default_generator.manual_seed(key)
    else:
        torch.manual_seed(key)


def clip_gradients(run: Run) -> Tensor:
    """Scale the gradients to `clip_norm` at most; return the norm they had, on the device."""
    parameters = list(run.network.parameters())
    if run.spec.optim.clip_norm is None:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return torch.nn.utils.clip_grad_norm_(parameters, run.spec.optim.clip_norm)


def progress(spec: JobSpec, update: Update) -> float:
    """Share of the run behind the end of this update, 0 to 1."""
    return min(1.0, (update.epoch + (update.index + 1) / update.num_updates) / spec.train.epochs)


class Meters:
    """Sums between two rows of metrics. Losses and norms stay on the device until a row is due."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._reset()

    def waiting(self, updates: Iterator[Update]) -> Iterator[Update]:
        """`updates`, with the time spent waiting for each added up; closes the reading thread at the end."""
        try:
            while True:
                started = time.monotonic()
                update = next(updates, None)
                if update is None:
                    return
                self._wait_s += time.monotonic() - started
                yield update
        finally:
            getattr(updates, "close", lambda: None)()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._since >= self._run.log_every_s

    def add_loss(self, loss: Tensor) -> None:
        self._loss = self._loss + loss.double()

    def add_update(self, update: Update, *, count: float, norm: Tensor) -> None:
        self._updates += 1
        self._count += count
        self._frames += update.frames
        self._rows += update.rows
        self._slots += sum(micro.batch.slots for micro in update.micros)
        self._norms = self._norms + norm
        self._last_norm = norm

    def check_finite(self, state: TrainState) -> None:
        """Stop before a state that left the finite numbers is kept.

        The norm is of gradients summed over all ranks, so that all of them come to the same verdict.

        Raises:
            DivergenceError: a gradient norm since the last row was not finite.
        """
        if not math.isfinite(self._norms):
            raise DivergenceError(
                f"training diverged by update {state.update}: the gradient norm is not finite",
                hint="a new run with a smaller optim.lr, or with optim.clip_norm; resuming this one gives the same",
                update=state.update,
            )

    def log(self, state: TrainState, update: Update, rate: float) -> None:
        """Write the row since the last one; the only point where the host waits for the device."""
        self.check_finite(state)
        elapsed = max(1e-9, time.monotonic() - self._since)
        loss, slots = self._run.world.sum([float(self._loss), float(self._slots)])
        metrics: dict[str, Any] = {
            "trainer/update": state.update,
            "trainer/epoch": update.epoch + (update.index + 1) / update.num_updates,
            "trainer/frames_seen": state.frames_seen,
            "train/loss": loss / self._count,
            "train/lr": rate,
            "train/grad_norm": float(self._last_norm),
            "perf/frames_per_s": self._frames / elapsed,
            "perf/rows_per_s": self._rows / elapsed,
            "perf/update_ms": 1000 * elapsed / self._updates,
            "perf/data_wait_share": min(1.0, self._wait_s / elapsed),
            "data/fill": self._frames / slots,
        }
        self._run.track.log(state.update, metrics)
        self._reset()

    def log_evaluation(self, state: TrainState, evaluation: Evaluation) -> None:
        self._run.track.log(state.update, {f"val/{name}": value for name, value in evaluation.metrics.items()})
        self._since = time.monotonic()  # the evaluation's time is not the training's

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._loss: Tensor | float = 0.0
        self._updates, self._count, self._frames, self._rows, self._slots = 0, 0.0, 0, 0, 0
        self._wait_s = 0.0
        self._norms: Tensor | float = 0.0
