"""int8 weights for a trained stack or network, where they pay.

Shape letters: B rows, T time steps, D features, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from treadle.errors import ConfigError
from treadle.nn.compress import Batch, Limits, Metric, Report, compare
from treadle.nn.hybrid import HybridStack
from treadle.nn.int8 import Int8Cell, Int8Embedding, Int8Linear, Recurrence
from treadle.nn.layer import Layer
from treadle.nn.network import Network
from treadle.nn.stack import RecurrentStack

__all__ = ["check_quantised", "quantize"]

_Module = TypeVar("_Module", bound=nn.Module)

_MIN_WEIGHTS = 1024
"""A linear layer below this stays fp32: it saves nothing, and torch's own call is shorter."""


def quantize(
    module: _Module,
    batches: Sequence[Batch] = (),
    metric: Metric | None = None,
    *,
    embeddings: bool = False,
    limits: Limits | None = None,
) -> tuple[_Module, Report]:
    """The module with int8 weights, or the module itself where that is slower or less accurate than allowed.

    The copy is called and stepped as the original is, and its recurrent state has the same form. Matrices become
    int8 with a scale an output (rows of 8 bits, symmetric), inputs are rounded frame by frame as they come; gates,
    states, norms, convolutions and biases stay fp32. It runs on the CPU and gives no gradient. A state dict
    of it loads into `quantize(network)[0]` of a network of the same sizes.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 2, with symmetric weights and ranges taken at run time.

    Args:
        module: a RecurrentStack, a HybridStack or a Network, fp32, on the CPU.
        batches: held-out rows, which decide; without any, nothing is measured and nothing refused.
        metric: how good a module is on held-out rows; higher is better.
        embeddings: make the embedding int8 too.
        limits: what is allowed; `Limits()` where None.

    Returns:
        The int8 copy in evaluation mode and a report with kept=True; or `module` itself and kept=False with a reason.

    Raises:
        ConfigError: a module of another kind, on another device, or not fp32.

    Cost: a copy of the module, and the calls of `compare`.

    Accuracy: outputs of stacks of 64 units move by less than 2 % (root mean square; tests/unit/nn/test_quantize.py).
    """
    _check(module)
    quantised = copy.deepcopy(module).eval()
    for parent in list(quantised.modules()):
        _replace_children(parent, embeddings=embeddings)
    for stack in quantised.modules():
        if isinstance(stack, RecurrentStack):
            stack.packed = True
    quantised.requires_grad_(False)
    report = check_quantised(module, quantised, batches, metric, limits=limits)
    return (quantised if report.kept else module), report


def check_quantised(
    original: nn.Module,
    quantised: nn.Module,
    batches: Sequence[Batch],
    metric: Metric | None = None,
    *,
    limits: Limits | None = None,
) -> Report:
    """How far int8 weights move the answers on held-out rows, and what they save; `Limits()` where None."""
    return compare(original, quantised, batches, metric, limits=Limits() if limits is None else limits)


def _check(module: nn.Module) -> None:
    if not isinstance(module, (RecurrentStack, HybridStack, Network)):
        raise ConfigError(f"module: got {type(module).__name__}, expected a RecurrentStack, a HybridStack or a Network")
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ConfigError(f"{name}: got {parameter.dtype} on {parameter.device}, expected torch.float32 on cpu")
    if any(isinstance(part, (Int8Cell, Int8Linear)) for part in module.modules()):
        raise ConfigError("module: got one with int8 weights, expected fp32 weights")


def _replace_children(parent: nn.Module, *, embeddings: bool) -> None:
    for name, child in list(parent.named_children()):
        if isinstance(parent, Layer) and name in ("ahead", "back") and isinstance(rnn := _rnn_of(child), nn.RNNBase):
            setattr(parent, name, Int8Cell.of(_recurrence(rnn), rnn))
        elif type(child) is nn.Linear and child.weight.numel() >= _MIN_WEIGHTS:
            setattr(parent, name, Int8Linear.of(child))
        elif embeddings and type(child) is nn.Embedding:
            setattr(parent, name, Int8Embedding(child.weight))


def _rnn_of(cell: nn.Module) -> nn.Module | None:
    return getattr(cell, "rnn", None)


def _recurrence(rnn: nn.RNNBase) -> Recurrence:
    return {
        "RNN_TANH": Recurrence.rnn_tanh,
        "RNN_RELU": Recurrence.rnn_relu,
        "LSTM": Recurrence.lstm,
        "GRU": Recurrence.gru,
    }[rnn.mode]
