"""What changes while training, and its form in a checkpoint: safetensors and JSON, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from treadle import wire
from treadle.errors import IntegrityError
from treadle.plan import PlanInputs, Position, check_position
from treadle.train.sharding import placed
from treadle.train.tensors import read_tensors
from treadle.train.updater import UpdaterState
from treadle.train.watch import Watch

__all__ = ["TrainState", "live", "load_weights", "pack", "snapshot", "unpack"]

MODEL_FILE = "model.safetensors"
OPTIM_FILE = "optim.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands.

    Args:
        update: updates so far, refused ones included. epoch, index: the position of the next update.
        frames_seen: real time steps trained on.
        precision: the format in use, so that a resumed run keeps it.
        evaluated: the update at which the validation rows were last looked at.
        updater: what the updater remembers beside its tensors. watch: what evaluations have said so far.
        inputs: what decided the batches, so that a resumed run goes on with the same; None in checkpoints that were
            written before it was kept.
    """

    update: int = 0
    epoch: int = 0
    index: int = 0
    frames_seen: int = 0
    precision: str = ""
    evaluated: int = 0
    updater: UpdaterState = field(default_factory=UpdaterState)
    watch: Watch = field(default_factory=Watch)
    inputs: PlanInputs | None = None

    @property
    def is_best(self) -> bool:
        """Whether these weights are the best that were evaluated."""
        return self.evaluated == self.update and self.watch.is_best_at(self.update)

    def check(self, inputs: PlanInputs) -> None:
        """Nothing, where the batches that `inputs` make are those of this state, or it does not say of which it is.

        Raises:
            ConfigError: a line for each input that is another.
        """
        if self.inputs is not None:
            check_position(Position(epoch=self.epoch, update=self.index, inputs=self.inputs), inputs)

    def advanced(self, frames: int, updater: UpdaterState, *, is_last_of_epoch: bool) -> TrainState:
        """The state after one more update of so many frames, which left the updater as it is."""
        epoch, index = (self.epoch + 1, 0) if is_last_of_epoch else (self.epoch, self.index + 1)
        return replace(
            self,
            update=self.update + 1,
            epoch=epoch,
            index=index,
            frames_seen=self.frames_seen + frames,
            updater=updater,
        )

    def to_json(self) -> dict[str, Any]:
        return wire.encode(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str) -> TrainState:
        """The state that `to_json` gave.

        Raises:
            IntegrityError: unknown or missing fields, or values of another form.
        """
        return wire.decode(cls, value, where=where)


def live(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The tensors that an update moves, by file and name; they are not copies."""
    names = {id(p): name for name, p in network.named_parameters()}
    moments = {
        f"{names[id(p)]}/{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }
    return {MODEL_FILE: {name: t.detach() for name, t in network.state_dict().items()}, OPTIM_FILE: moments}


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Owned CPU copies of `live`; the loop may go on changing the originals."""
    return {
        file: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        for file, tensors in live(network, optimizer).items()
    }


def pack(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bytes]:
    """The bytes of each file of a snapshot."""
    return {name: safetensors.torch.save(dict(part)) for name, part in tensors.items()}


def unpack(files: Mapping[str, bytes], network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's files back into a network and an optimizer of the same spec.

    Raises:
        IntegrityError: a file is missing, or its tensors are not those of this network and optimizer.
    """
    if missing := sorted({MODEL_FILE, OPTIM_FILE} - files.keys()):
        raise IntegrityError(f"checkpoint: got no {', '.join(missing)}")
    moments = _moments(files[OPTIM_FILE], network)
    load_weights(network, files[MODEL_FILE], where=MODEL_FILE)
    for name, p in network.named_parameters():
        optimizer.state[p] = moments.get(name, {})


def _moments(data: bytes, network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter: of all of them the same, or of none before the first update."""
    parameters = dict(network.named_parameters())
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(data, where=OPTIM_FILE).items():
        name, _, kind = key.rpartition("/")
        p = parameters.get(name)
        if p is None:
            raise IntegrityError(f"{OPTIM_FILE}: got {key}, expected parameters of this network")
        if value.ndim and value.shape != p.shape:  # AdamW's count of steps is a scalar
            raise IntegrityError(f"{OPTIM_FILE}: {key}: got shape {tuple(value.shape)}, expected {tuple(p.shape)}")
        moments.setdefault(name, {})[kind] = placed(value, p)  # the count too: the optimizers are fused
    if moments and len({frozenset(moments.get(name, {})) for name in parameters}) > 1:
        raise IntegrityError(f"{OPTIM_FILE}: some parameters lack moments that others have")
    return moments


def load_weights(network: nn.Module, data: bytes, *, where: str) -> None:
    """Put weights into `network`; every tensor must be there with its shape, and no other.

    Raises:
        IntegrityError: otherwise, or `data` is not safetensors.
    """
    found, wanted = read_tensors(data, where=where), network.state_dict()
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name}: got shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise IntegrityError(f"{where}: weights of another network: {'; '.join(problems[:5])}")
    network.load_state_dict({name: placed(part, wanted[name]) for name, part in found.items()})
