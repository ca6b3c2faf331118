"""Layers whose activations are computed again on the way back instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_layers", "recomputed"]


def recompute_layers(network: nn.Module, enabled: bool = True) -> None:
    """Make every stack in `network` keep the inputs of its layers only, wherever gradients are wanted.

    Gradients are the same bit for bit, dropout included (tests/unit/train/test_recompute.py).

    Cost: one more forward pass of each layer, on the way back.
    """
    for module in network.modules():
        if hasattr(module, "recompute"):
            module.recompute = enabled  # type: ignore[assignment]


def recomputed(layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What `layer(*inputs, **options)` gives; its activations are computed again for the backward pass."""
    return checkpoint(layer, *inputs, use_reentrant=False, **options)
