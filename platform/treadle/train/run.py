"""What the training loop is given, what it asks of others, and what it gives back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from treadle.spec import JobSpec
from treadle.track import Tracker
from treadle.train.carry import Carry, NoCarry
from treadle.train.evaluate import Evaluation, Evaluator
from treadle.train.feed import Feed
from treadle.train.precision import PrecisionChoice
from treadle.train.state import TrainState
from treadle.train.streams import StreamFeed
from treadle.train.task import Task
from treadle.train.updater import Updater
from treadle.train.world import World

__all__ = ["Checkpointer", "Control", "NoPulse", "Outcome", "Pulse", "Reached", "Restorer", "Run"]


class Checkpointer(Protocol):
    """Writes states; only rank 0's does."""

    def save(self, state: TrainState, tensors: Mapping[str, Mapping[str, Tensor]], *, best: bool = False) -> None:
        """Begin to copy live tensors; they are committed in the background. Call `join` before they change.

        Args:
            best: to be kept until another is.
        """
        ...

    def join(self) -> None:
        """Return when nothing reads the live tensors any more."""
        ...

    def wait(self) -> None:
        """Return when everything saved is committed; raise what a commit raised."""
        ...

    def is_due(self, state: TrainState) -> bool:
        """Whether to save after the update that `state` is about to take."""
        ...


class Restorer(Protocol):
    """Puts saved states back into the network, the optimizer and the updater; all ranks call it together."""

    def newest(self) -> TrainState:
        """The newest committed state, put in; where none is, that of the beginning.

        What is being committed is waited for. All ranks take the same state; they meet before anything is changed.
        """
        ...

    def best(self) -> TrainState | None:
        """The best committed state, whose weights and mean of weights are put in; None where there is none."""
        ...


class Control(Protocol):
    """What people ask of a running job; only rank 0 looks."""

    def wants_stop(self) -> bool: ...
    def wants_checkpoint(self) -> bool: ...


class Pulse(Protocol):
    """Who is shown that the loop lives; both calls take a microsecond."""

    def at(self, update: int) -> None:
        """So many updates are made."""
        ...

    def enter(self, phase: str) -> None:
        """What comes now: training, reading, evaluating or ending."""
        ...


class NoPulse:
    """Nobody looks."""

    def at(self, update: int) -> None: ...

    def enter(self, phase: str) -> None: ...


@dataclass
class Reached:
    """The newest state of a run: one whole update after the other, whatever interrupts the loop."""

    state: TrainState | None = None
    pulse: Pulse = field(default_factory=NoPulse)

    def at(self, state: TrainState) -> None:
        self.state = state
        self.pulse.at(state.update)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a rank needs, built by `treadle.launch.worker`.

    Args:
        start: the state to go on from. log_every_s: least time between two rows of metrics.
        carry: what of the network's state goes on from update to update.
        reached: holds the state after each update, for whoever goes on when the loop was left by an error.
    """

    spec: JobSpec
    world: World
    task: Task
    network: nn.Module
    optimizer: torch.optim.Optimizer
    precision: PrecisionChoice
    feed: Feed | StreamFeed
    valid: Evaluator
    test: Evaluator
    checkpoints: Checkpointer
    restore: Restorer
    control: Control
    track: Tracker
    start: TrainState
    log_every_s: float
    updater: Updater
    carry: Carry = field(default_factory=NoCarry)
    reached: Reached = field(default_factory=Reached)

    @functools.cached_property
    def draws(self) -> bool:
        """Whether the network draws random numbers while it is trained."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.network.modules())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Args:
        status: "finished" with a test evaluation, or "stopped" without.
        why: "epochs" are all done, training ended "early" because evaluations got no better, or somebody "asked".
        state: after the last update; the network of a finished run may hold the weights of an earlier one.
    """

    status: str
    why: str
    state: TrainState
    test: Evaluation | None = None
