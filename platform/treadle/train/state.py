"""What changes while training, and its form in a checkpoint: safetensors and JSON, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from treadle import wire
from treadle.errors import IntegrityError
from treadle.plan import PlanInputs, Position, check_position

__all__ = ["TrainState", "load_weights", "pack", "snapshot", "unpack"]

MODEL_FILE = "model.safetensors"
OPTIM_FILE = "optim.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands.

    Args:
        update: optimizer steps taken. epoch, index: the position of the next update.
        frames_seen: real time steps trained on.
        precision: the format in use, so that a resumed run keeps it.
        inputs: what decided the batches, so that a resumed run goes on with the same; None in checkpoints that were
            written before it was kept.
    """

    update: int = 0
    epoch: int = 0
    index: int = 0
    frames_seen: int = 0
    precision: str = ""
    inputs: PlanInputs | None = None

    def check(self, inputs: PlanInputs) -> None:
        """Nothing, where the batches that `inputs` make are those of this state, or it does not say of which it is.

        Raises:
            ConfigError: a line for each input that is another.
        """
        if self.inputs is not None:
            check_position(Position(epoch=self.epoch, update=self.index, inputs=self.inputs), inputs)

    def advanced(self, frames: int, *, is_last_of_epoch: bool) -> TrainState:
        """The state after one more update."""
        epoch, index = (self.epoch + 1, 0) if is_last_of_epoch else (self.epoch, self.index + 1)
        return replace(self, update=self.update + 1, epoch=epoch, index=index, frames_seen=self.frames_seen + frames)

    def to_json(self) -> dict[str, Any]:
        return wire.encode(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str) -> TrainState:
        """The state that `to_json` gave.

        Raises:
            IntegrityError: unknown or missing fields, or values of another form.
        """
        return wire.decode(cls, value, where=where)


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Owned CPU copies of everything that moves, by file and name; the loop may go on changing the originals."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    names = {id(p): name for name, p in network.named_parameters()}
    moments = {
        f"{names[id(p)]}/{key}": copy(value)
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }
    return {MODEL_FILE: {name: copy(t) for name, t in network.state_dict().items()}, OPTIM_FILE: moments}


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
    for key, value in _tensors(data, OPTIM_FILE).items():
        name, _, kind = key.rpartition("/")
        p = parameters.get(name)
        if p is None:
            raise IntegrityError(f"{OPTIM_FILE}: got {key}, expected parameters of this network")
        if value.ndim and value.shape != p.shape:  # AdamW's count of steps is a scalar
            raise IntegrityError(f"{OPTIM_FILE}: {key}: got shape {tuple(value.shape)}, expected {tuple(p.shape)}")
        moments.setdefault(name, {})[kind] = value.to(p.device)  # the count too: the optimizers are fused
    if moments and len({frozenset(moments.get(name, {})) for name in parameters}) > 1:
        raise IntegrityError(f"{OPTIM_FILE}: some parameters lack moments that others have")
    return moments


def load_weights(network: nn.Module, data: bytes, *, where: str) -> None:
    """Put weights into `network`; every tensor must be there with its shape, and no other.

    Raises:
        IntegrityError: otherwise, or `data` is not safetensors.
    """
    found, wanted = _tensors(data, where), network.state_dict()
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name}: got shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise IntegrityError(f"{where}: weights of another network: {'; '.join(problems[:5])}")
    network.load_state_dict(found)


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"{where}: not readable as safetensors ({error})") from None
