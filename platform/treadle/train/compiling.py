"""A network through `torch.compile` before training begins, so that no update waits for a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config

from treadle.nn import Network, compile_layers
from treadle.train.precision import PrecisionChoice

__all__ = ["compiled", "few_frames"]


def compiled(network: Network, precision: PrecisionChoice, device: torch.device) -> int:
    """Compile the layers of `network` that gain by it; gives how many. Weights and generators stay as they were.

    Raises:
        ConfigError: nothing to compile with is found here.

    Cost: a small pass forward and back, and one without gradients: half a minute for each kind of layer.
    """
    found = compile_layers(network, device)
    if not found:
        return 0
    was_training = network.training
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    symbols: Any = _config  # its `patch` is made at run time
    # Sizes that happen to be equal here, three layers and three rows, must not be taken for one size for ever.
    with generators, precision.autocast(), symbols.patch(use_duck_shape=False):
        network.train()(*few_frames(network, (3, 2))).sum().backward()
        with torch.no_grad():
            network.eval()(*few_frames(network, (3, 2)))
    network.train(was_training)
    network.zero_grad(set_to_none=True)
    return found


def few_frames(network: Network, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of zeros, and their lengths."""
    shape, device = (len(lengths), max(lengths)), next(network.parameters()).device
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    if network.embedding is None:
        return torch.zeros(*shape, network.stack.input_size, device=device), lengths_B
    return torch.zeros(shape, dtype=torch.int64, device=device), lengths_B
