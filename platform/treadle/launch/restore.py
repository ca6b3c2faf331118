"""Saved states of a run put back into what trains: at the start, after a divergence, and the best at the end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from treadle import wire
from treadle.errors import DivergenceError, IntegrityError, TransientError
from treadle.nn import build_network
from treadle.store import CheckpointManifest
from treadle.train import TrainState, unpack
from treadle.train.carry import Carry
from treadle.train.sharding import placed
from treadle.train.state import MODEL_FILE, load_weights
from treadle.train.updater import Updater

if TYPE_CHECKING:
    from treadle.launch.assemble import Surroundings

__all__ = ["Restorer", "Saved", "read_newest"]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A committed state and its files; neither where nothing was committed yet."""

    state: TrainState | None = None
    files: dict[str, bytes]


def read_newest(around: Surroundings) -> Saved:
    """The newest committed state, the same on all ranks.

    Raises:
        IntegrityError: all that was committed is damaged. TransientError: the ranks read different ones.
    """
    found = around.checkpoints.restore()
    _agree(around, found[0] if found else None)
    if found is None:
        return Saved(files={})
    kept, files = found
    return Saved(state=_state_of(kept), files=files)


@dataclass(frozen=True, kw_only=True)
class Restorer:
    """See `treadle.train.run.Restorer`.

    Args:
        fresh: the state of the beginning.
    """

    around: Surroundings
    network: nn.Module
    optimizer: torch.optim.Optimizer
    updater: Updater
    carry: Carry
    fresh: TrainState

    def newest(self) -> TrainState:
        """The newest committed state put in, or that of the beginning."""
        self._committed()
        saved = read_newest(self.around)
        if saved.state is None:
            self._begin_anew()
        else:
            unpack(saved.files, self.network, self.optimizer)
        state = saved.state or self.fresh
        self.updater.load_tensors(saved.files)
        self.updater.load(state.updater)
        self.carry.load(saved.files, at=(state.epoch, state.index))
        return state

    def best(self) -> TrainState | None:
        """The best committed state, its weights put in."""
        self._committed()
        checkpoints = self.around.checkpoints
        found = checkpoints.best()
        _agree(self.around, found)
        if found is None:
            return None
        files = checkpoints.read(found)
        load_weights(self.network, files[MODEL_FILE], where=f"{found.prefix}/{MODEL_FILE}")
        self.updater.load_tensors(files)
        return _state_of(found)

    def _committed(self) -> None:
        """Rank 0 commits; nobody reads before it has."""
        with self.around.world.first() as is_first:
            if is_first:
                # What could not be committed, or was not finite, is not there: an older state is.
                with contextlib.suppress(TransientError, IntegrityError, DivergenceError):
                    self.around.saver.wait()

    def _begin_anew(self) -> None:
        spec, plan = self.around.spec, self.around.plan
        torch.manual_seed(spec.train.seed)
        fresh = build_network(spec.model, spec.task, plan.signature).state_dict()
        own = self.network.state_dict()
        self.network.load_state_dict({name: placed(part, own[name]) for name, part in fresh.items()})
        self.optimizer.state.clear()


def _agree(around: Surroundings, manifest: CheckpointManifest | None) -> None:
    if not around.world.agree(wire.digest(manifest.prefix if manifest else "")):
        raise TransientError("checkpoint: the ranks read different ones", hint=f"treadle resume {around.run}")


def _state_of(manifest: CheckpointManifest) -> TrainState:
    return TrainState.from_json(manifest.state, where=f"{manifest.prefix}: state")
