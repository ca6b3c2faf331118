"""One time step of every cell, written out again in plain float64 from its equations, and the loop over a row.

Shape letters: T time steps, D features, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from treadle.nn import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.stack import RecurrentStack

Weights = dict[str, Tensor]
Carry = dict[str, Tensor]

# Name -> a stack of that kind from the arguments that all share.
KINDS: dict[str, Callable[..., RecurrentStack]] = {
    "rnn_tanh": RNN,
    "rnn_relu": lambda *args, **kwargs: RNN(*args, nonlinearity="relu", **kwargs),
    "lstm": LSTM,
    "gru": GRU,
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "minlstm_raw": lambda *args, **kwargs: MinLSTM(*args, normalize_gates=False, **kwargs),
}


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _candidate(x: Tensor) -> Tensor:
    return torch.tensor([v + 0.5 if v >= 0 else 1 / (1 + torch.exp(-v)) for v in x], dtype=x.dtype)


def _torch_pre(weights: Weights, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    from_x = weights["rnn.weight_ih_l0"] @ x + weights.get("rnn.bias_ih_l0", 0)
    from_h = weights["rnn.weight_hh_l0"] @ h + weights.get("rnn.bias_hh_l0", 0)
    return from_x, from_h


def _step(kind: str, weights: Weights, x: Tensor, carry: Carry) -> Carry:
    h = carry["h"]
    if kind.startswith("rnn"):
        pre = torch.stack(_torch_pre(weights, x, h)).sum(0)
        return {"h": torch.tanh(pre) if kind == "rnn_tanh" else pre.clamp(min=0)}
    if kind == "lstm":
        i, f, g, o = torch.stack(_torch_pre(weights, x, h)).sum(0).chunk(4)
        c = _sigmoid(f) * carry["c"] + _sigmoid(i) * torch.tanh(g)
        return {"h": _sigmoid(o) * torch.tanh(c), "c": c}
    if kind == "gru":
        (rx, zx, nx), (rh, zh, nh) = (pre.chunk(3) for pre in _torch_pre(weights, x, h))
        n = torch.tanh(nx + _sigmoid(rx + rh) * nh)
        z = _sigmoid(zx + zh)
        return {"h": (1 - z) * n + z * h}
    pre = weights["project.weight"] @ x + weights.get("project.bias", 0)
    if kind == "mingru":
        k, value = pre.chunk(2)
        return {"h": (1 - _sigmoid(k)) * h + _sigmoid(k) * _candidate(value)}
    f, i, value = pre.chunk(3)
    f, i = _sigmoid(f), _sigmoid(i)
    if kind == "minlstm":
        f, i = f / (f + i), i / (f + i)
    return {"h": f * h + i * _candidate(value)}


def run_row(kind: str, stack: RecurrentStack, x_TD: Tensor, carries: list[Carry]) -> tuple[Tensor, list[Carry]]:
    """Outputs [T, directions * H] and the last states of one unpadded row; no dropout, norm or residual."""
    named = {name: value.detach().double() for name, value in stack.state_dict().items()}
    x_TD, ends = x_TD.double(), []
    for layer in range(stack.num_layers):
        outputs = []
        for direction in ("ahead", "back")[: stack.num_directions]:
            prefix = f"layers.{layer}.{direction}."
            weights = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
            carry = carries[len(ends)]
            steps = []
            for x in x_TD if direction == "ahead" else reversed(x_TD):
                carry = _step(kind, weights, x, carry)
                steps.append(carry["h"])
            outputs.append(torch.stack(steps if direction == "ahead" else steps[::-1]))
            ends.append(carry)
        x_TD = torch.cat(outputs, dim=-1)
    return x_TD, ends
