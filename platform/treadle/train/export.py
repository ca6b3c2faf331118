"""A trained network as files, and back: what a model version holds."""

from __future__ import annotations

from dataclasses import dataclass

import safetensors.torch
from torch import nn

from treadle import wire
from treadle.data import Preprocessing
from treadle.nn import build_network
from treadle.spec import ModelSpec, ServeSpec, Signature, TaskSpec
from treadle.train.state import load_weights

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "ModelConfig", "export_network", "restore_network"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything but the weights that is needed to answer: shapes, vocabulary, scaling, labels."""

    name: str
    model: ModelSpec
    task: TaskSpec
    signature: Signature
    preprocessing: Preprocessing
    serve: ServeSpec

    def to_bytes(self) -> bytes:
        return wire.record("model", SCHEMA, self)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> ModelConfig:
        """The config in `data`.

        Raises:
            IntegrityError: not a model config of a schema that this version reads.
        """
        return wire.unrecord(cls, data, kind="model", schema=SCHEMA, where=where)


def export_network(network: nn.Module, config: ModelConfig) -> dict[str, bytes]:
    """The files of a model version."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    return {WEIGHTS_FILE: safetensors.torch.save(tensors), CONFIG_FILE: config.to_bytes()}


def restore_network(config: ModelConfig, weights: bytes) -> nn.Module:
    """The network in evaluation mode, on the CPU.

    Raises:
        IntegrityError: the weights are of another network.
    """
    network = build_network(config.model, config.task, config.signature)
    load_weights(network, weights, where=f"{config.name}/{WEIGHTS_FILE}")
    return network.eval()
