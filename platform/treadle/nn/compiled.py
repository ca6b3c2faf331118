"""Layers through `torch.compile`: what stands around a scan becomes a few kernels, the scan stays one operator.

Compiled is what has tensors alone for its arguments: a layer of MinGRU or MinLSTM over packed frames, and every
feed-forward layer. A whole network would be compiled anew at each microbatch, for the lengths of its rows, which decide
about groups and layouts, are numbers on the host. torch's recurrent kernels are operators of their own already.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.cell import State
from treadle.nn.feedforward import FeedForward
from treadle.nn.frames import Frames
from treadle.nn.layer import Layer, LayerState
from treadle.nn.rows import Rows
from treadle.nn.stack import RecurrentStack

__all__ = ["compile_layers"]

_COMPILERS = ("c++", "g++", "clang++")


def compile_layers(network: nn.Module, device: torch.device) -> int:
    """Compile the parts of `network` that gain by it, at their first call; gives how many there are.

    Names in checkpoints stay as they are. Results are equal to 1e-6, not bit for bit: sums are made in another order.
    The compiled network itself gives the same bits again.

    Raises:
        ConfigError: no C++ compiler where the CPU trains, or no triton where a GPU does.

    Cost: half a minute or so before the first update, once for each kind of layer, in training and in evaluation.
    """
    if device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        raise ConfigError(
            f"train.compile: got true without a C++ compiler, expected one of {', '.join(_COMPILERS)}",
            hint="install g++, or train.compile=false",
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("train.compile: got true without triton", hint="pip install triton, or train.compile=false")
    found = 0
    inside: set[nn.Module] = set()
    for stack in network.modules():
        if isinstance(stack, RecurrentStack) and stack.packed:
            layers = [layer for layer in stack.parts if isinstance(layer, Layer) and layer.conv is None]
            stack.call_packed = _compiled() if layers else None
            inside.update(module for layer in layers for module in layer.modules())
            found += len(layers)
    for module in network.modules():
        if isinstance(module, FeedForward) and module not in inside:
            module.compile(dynamic=True)
            found += 1
    return found


@functools.cache
def _compiled() -> Any:
    """One for all layers, of which those of one shape share their code."""
    return torch.compile(_call, dynamic=True)


def _call(layer: Layer, x_ND: Tensor, cells: list[State], offsets: Tensor, final_state: bool) -> Any:
    """A layer over packed frames of which nothing but the offsets is known."""
    rows = Rows(offsets, x_ND.shape[0])
    frames = Frames(values=x_ND, rows=rows, padded=False, starts_N=None, gaps_N=None, restore=_same)
    y_ND, end = layer(x_ND, LayerState(cells=cells), frames, None, final_state=final_state)
    return y_ND, end.cells


def _same(x: Tensor) -> Tensor:
    return x
