"""Recurrent layers as ONNX nodes.

Shape letters: B rows, T time steps, D features, H hidden, G gates * H, K taps.

LSTM, GRU and RNN become the operators of those names, which know lengths. MinGRU and MinLSTM become a Scan of
h' = a h + b over time steps, with a = 1 and b = 0 at padded slots, so that the state stands still there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.conv import CausalConv
from treadle.nn.feedforward import FeedForward
from treadle.nn.gates import Candidate, GateForm, ScanOptions
from treadle.nn.layer import Layer
from treadle.nn.onnx_graph import MICROSOFT, Graph, Steps, to_bytes
from treadle.nn.stack import RecurrentStack

__all__ = ["add_stack"]

Values = dict[str, str]

_ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # torch: i f g o, r z n; ONNX: i o f g, z r n


def add_stack(graph: Graph, stack: RecurrentStack, x: str, state: Values, steps: Steps) -> tuple[str, Values]:
    """The output of the last layer, zero at padded slots, and the state at the last frame of every row.

    Args:
        graph: where nodes go.
        stack: the layers.
        x: [B, T, D].
        state: before the first frame, as `RecurrentStack` names and shapes it.
        steps: lengths.

    Raises:
        ConfigError: a layer that has no form here; the message names it.
    """
    if stack.time_decay:
        raise ConfigError("module: got time_decay, expected none: ONNX's operators let nobody at their state")
    num_cells = stack.num_layers * stack.num_directions
    parts = {name: _rows_of(graph, state[name], num_cells, stack.num_directions) for name in stack.state_names}
    ends: list[Values] = []
    after: Values = {}
    for index, layer in enumerate(stack.layers):
        assert isinstance(layer, Layer)
        before = {name: part[index] for name, part in parts.items()}
        if layer.conv is not None:
            name = f"conv{index}"
            added, after[name] = _convolution(graph, layer.conv, x, state[name], steps)
            x = graph.add("Add", x, added)
        x, end = _layer(graph, layer, x, before, steps)
        ends.append(end)
    joined = {name: graph.add("Concat", *(end[name] for end in ends), axis=0) for name in stack.state_names}
    return graph.zeroed(x, steps), joined | after


def _rows_of(graph: Graph, state: str, num_cells: int, num_directions: int) -> list[str]:
    """[directions, B, H] of each layer."""
    if num_cells == num_directions:
        return [state]
    sizes = graph.ints(*[num_directions] * (num_cells // num_directions))
    return graph.add_many("Split", state, sizes, count=num_cells // num_directions, axis=0)


def _layer(graph: Graph, layer: Layer, x: str, state: Values, steps: Steps) -> tuple[str, Values]:
    inner = x if layer.norm is None else _norm(graph, layer.norm, x)
    rnn = getattr(layer.ahead, "rnn", None)
    if isinstance(rnn, nn.RNNBase):
        rnns = [rnn] if layer.back is None else [rnn, getattr(layer.back, "rnn", rnn)]
        y, end = _operator(graph, rnns, inner, state, steps)
    else:
        y, end = _scans(graph, layer, inner, state["h"], steps)
    if layer.residual:
        y = graph.add("Add", x, y)
    return (y if layer.mlp is None else graph.add("Add", y, _feedforward(graph, layer.mlp, y))), end


def _norm(graph: Graph, norm: nn.RMSNorm, x: str) -> str:
    mean = graph.add("ReduceMean", graph.add("Mul", x, x), graph.ints(-1), keepdims=1)
    size = graph.add("Sqrt", graph.add("Add", mean, graph.constant(norm.eps)))
    return graph.add("Mul", graph.add("Div", x, size), graph.constant(norm.weight))


def _feedforward(graph: Graph, layer: FeedForward, x: str) -> str:
    hidden = graph.add("Gelu", graph.linear(_norm(graph, layer.norm, x), layer.up))
    return graph.linear(hidden, layer.down)


def _convolution(graph: Graph, conv: CausalConv, x: str, window: str, steps: Steps) -> tuple[str, str]:
    """The convolution, and the window [K - 1, B, D] after each row's last frame, the latest first."""
    taps, width = conv.weight.shape
    backwards = graph.ints(*reversed(range(taps - 1)))
    earlier = graph.add("Transpose", graph.add("Gather", window, backwards, axis=0), perm=[1, 2, 0])
    seen = graph.add("Concat", earlier, graph.add("Transpose", x, perm=[0, 2, 1]), axis=-1)
    kernel = graph.constant(conv.weight.flip(0).T[:, None])
    y = graph.add("Conv", seen, kernel, graph.constant(conv.bias), group=width)
    # Frame t of a row stands at place t + taps - 1 of what was seen, so its last ones end at length + taps - 2.
    column = graph.add("Unsqueeze", steps.lengths, graph.ints(1))
    places = graph.add("Add", column, graph.ints(*reversed(range(taps - 1))))
    last = graph.add("GatherND", graph.add("Transpose", seen, perm=[0, 2, 1]), _pairs(graph, places), batch_dims=1)
    return graph.add("Transpose", y, perm=[0, 2, 1]), graph.add("Transpose", last, perm=[1, 0, 2])


def _pairs(graph: Graph, places: str) -> str:
    return graph.add("Unsqueeze", places, graph.ints(-1))


# ---- LSTM, GRU, RNN ----


def _operator(graph: Graph, rnns: list[nn.RNNBase], x: str, state: Values, steps: Steps) -> tuple[str, Values]:
    """One layer in one or two directions."""
    op = rnns[0].mode.split("_")[0]
    w_ih, w_hh, bias = (torch.stack(parts) for parts in zip(*(_in_order(rnn, op) for rnn in rnns), strict=True))
    attributes: dict[str, Any] = {"direction": "bidirectional" if len(rnns) == 2 else "forward"}
    attributes["hidden_size"] = rnns[0].hidden_size
    if op == "GRU":
        attributes["linear_before_reset"] = 1  # torch's equations: the reset gate scales the product, bias included
    if op == "RNN":
        attributes["activations"] = ["Relu" if rnns[0].mode == "RNN_RELU" else "Tanh"] * len(rnns)
    names = ["h", "c"] if op == "LSTM" else ["h"]
    x_TBD = graph.add("Transpose", x, perm=[1, 0, 2])
    rest = (graph.constant(bias), steps.lengths32, *(state[name] for name in names))
    if graph.int8 and op == "LSTM":
        outputs = _int8_lstm(graph, x_TBD, w_ih, w_hh, rest, attributes)
    else:
        weights = (graph.constant(w_ih), graph.constant(w_hh))
        outputs = graph.add_many(op, x_TBD, *weights, *rest, count=1 + len(names), **attributes)
    y = graph.add("Transpose", outputs[0], perm=[2, 0, 1, 3])  # from [T, directions, B, H]
    return graph.add("Reshape", y, graph.ints(0, 0, -1)), dict(zip(names, outputs[1:], strict=True))


def _in_order(rnn: nn.RNNBase, op: str) -> tuple[Tensor, Tensor, Tensor]:
    """w_ih, w_hh and the two biases in one, gates in ONNX's order."""
    w_ih, w_hh, *biases = (parameter.detach() for parameter in rnn.parameters())
    biases = biases or [torch.zeros(w_ih.shape[0]), torch.zeros(w_ih.shape[0])]

    def ordered(whole: Tensor) -> Tensor:
        gates = whole.chunk(len(_ONNX_GATES[op]))
        return torch.cat([gates[gate] for gate in _ONNX_GATES[op]])

    return ordered(w_ih), ordered(w_hh), torch.cat([ordered(bias) for bias in biases])


def _int8_lstm(
    graph: Graph, x_TBD: str, w_ih: Tensor, w_hh: Tensor, rest: tuple[str, ...], attributes: dict[str, Any]
) -> list[str]:
    """onnxruntime's own operator: weights are [directions, D, G] there."""
    scales: list[str] = []
    weights: list[str] = []
    for weight in (w_ih, w_hh):
        whole, scale = to_bytes(weight)
        weights.append(graph.constant(whole.transpose(0, 2, 1), np.uint8))
        scales += [graph.constant(scale), graph.constant(np.full(scale.shape, 128), np.uint8)]
    no_peepholes = ""
    inputs = (x_TBD, *weights, *rest, no_peepholes, *scales)
    return graph.add_many("DynamicQuantizeLSTM", *inputs, count=3, domain=MICROSOFT, **attributes)


# ---- MinGRU, MinLSTM ----


def _scans(graph: Graph, layer: Layer, x: str, state: str, steps: Steps) -> tuple[str, Values]:
    """One layer in one or two directions."""
    cells = [layer.ahead] if layer.back is None else [layer.ahead, layer.back]
    states = graph.add_many("Split", state, count=2, num_outputs=2, axis=0) if len(cells) == 2 else [state]
    outputs, ends = [], []
    for cell, before, reverse in zip(cells, states, (False, True), strict=False):
        y, end = _scan(graph, cell, x, graph.add("Squeeze", before, graph.ints(0)), steps, reverse=reverse)
        outputs.append(y)
        ends.append(graph.add("Unsqueeze", end, graph.ints(0)))
    if len(cells) == 1:
        return outputs[0], {"h": ends[0]}
    return graph.add("Concat", *outputs, axis=-1), {"h": graph.add("Concat", *ends, axis=0)}


def _scan(graph: Graph, cell: nn.Module, x: str, h: str, steps: Steps, *, reverse: bool) -> tuple[str, str]:
    project, out, options = (getattr(cell, name, None) for name in ("project", "out", "options"))
    if not isinstance(project, nn.Module) or not isinstance(options, ScanOptions):
        raise ConfigError(f"module: got a cell {type(cell).__name__}, expected fp32 weights")
    a, b = _gates(graph, graph.linear(x, project), options)
    a = graph.add("Where", steps.valid, a, graph.constant(1.0))
    b = graph.zeroed(b, steps)
    if reverse:
        a, b = _flipped(graph, a, steps), _flipped(graph, b, steps)
    last, y = graph.add_many(
        "Scan", h, a, b, count=2, body=_recurrence(graph), num_scan_inputs=2, scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )  # fmt: skip
    if reverse:
        y = _flipped(graph, y, steps)
    return (graph.linear(y, out) if isinstance(out, nn.Linear) else y), last


def _flipped(graph: Graph, x: str, steps: Steps) -> str:
    """Each row from its own last frame to its first."""
    return graph.add("ReverseSequence", x, steps.lengths, batch_axis=0, time_axis=1)


def _recurrence(graph: Graph) -> Any:
    """One time step: h' = a h + b, which is also the output."""
    helper, float32 = graph.onnx.helper, graph.onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Mul", ["a", "h"], ["ah"]),
        helper.make_node("Add", ["ah", "b"], ["after"]),
        helper.make_node("Identity", ["after"], ["output"]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, float32, None) for name in names]
        for names in (("h", "a", "b"), ("after", "output"))
    )
    return helper.make_graph(nodes, "recurrence", inputs, outputs)


def _gates(graph: Graph, pre: str, options: ScanOptions) -> tuple[str, str]:
    """(a, b) of h' = a h + b; `treadle.nn.gates` in ONNX."""
    *shares, x = graph.split(pre, options.form.num_gates)
    g = _candidate(graph, x, options.candidate)
    if options.form is GateForm.minlstm_raw:
        keep, take = (graph.add("Sigmoid", share) for share in shares)
        return keep, graph.add("Mul", take, g)
    k = shares[0]
    if options.form is GateForm.minlstm:
        f, i = (graph.add("Softplus", graph.add("Neg", share)) for share in shares)
        k = graph.add("Sub", f, i)
    return graph.add("Sigmoid", graph.add("Neg", k)), graph.add("Mul", graph.add("Sigmoid", k), g)


def _candidate(graph: Graph, x: str, candidate: Candidate) -> str:
    if candidate is Candidate.identity:
        return x
    if candidate is Candidate.tanh:
        return graph.add("Tanh", x)
    positive = graph.add("GreaterOrEqual", x, graph.constant(0.0))
    return graph.add("Where", positive, graph.add("Add", x, graph.constant(0.5)), graph.add("Sigmoid", x))
