"""A stack or a network as an ONNX model.

Shape letters: B rows, T time steps, D features, H outputs of the stack, A heads of the attention, K classes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from treadle.errors import ConfigError
from treadle.nn.heads import ClassifyHead, CtcHead
from treadle.nn.network import Network, recurrent_stack_of
from treadle.nn.onnx_graph import Graph, Steps
from treadle.nn.onnx_stack import add_stack
from treadle.nn.pooling import AttentionPooling, RowPooling
from treadle.nn.stack import RecurrentStack

__all__ = ["build_model", "state_shapes"]


def build_model(module: nn.Module, *, state_inputs: bool, int8: bool, onnx: ModuleType) -> Any:
    """The model of a network (x, lengths -> logits) or of a stack (x, lengths -> y, last_h, ...).

    Args:
        module: which.
        state_inputs: a stack also takes its state before the first frame, as h, ...
        int8: matrices as bytes.
        onnx: the package.

    Raises:
        ConfigError: something that has no form here; the message names it.
    """
    stack = recurrent_stack_of(module)
    if state_inputs and (isinstance(module, Network) or stack.bidirectional):
        raise ConfigError("state_inputs: expected a RecurrentStack that reads in one direction")
    graph = Graph(onnx, int8=int8)
    x, steps = _inputs(graph, module, stack)
    state = {
        name: graph.input(name, onnx.TensorProto.FLOAT, shape) if state_inputs else _initial(graph, stack, name, shape)
        for name, shape in state_shapes(stack).items()
    }
    y, last = add_stack(graph, stack, x, state, steps)
    if isinstance(module, Network):
        _add_head(graph, module.head, y, steps)
    else:
        graph.output("y", y, ["B", "T", stack.output_size])
        for name, shape in state_shapes(stack).items():
            graph.output(f"last_{name}", last[name], shape)
    return graph.model()


def state_shapes(stack: RecurrentStack) -> dict[str, list[int | str]]:
    """The shape of each tensor of the state."""
    shapes: dict[str, list[int | str]] = {}
    for name, part in stack.initial_state(1).items():
        shapes[name] = [part.shape[0], "B", part.shape[2]]
    return shapes


def _inputs(graph: Graph, module: nn.Module, stack: RecurrentStack) -> tuple[str, Steps]:
    """Frames [B, T, D], and the lengths beside them."""
    proto = graph.onnx.TensorProto
    embedding = module.embedding if isinstance(module, Network) else None
    if embedding is None:
        x = graph.input("x", proto.FLOAT, ["B", "T", stack.input_size])
    else:
        x = graph.input("x", proto.INT64, ["B", "T"])
    lengths = graph.input("lengths", proto.INT64, ["B"])
    num_steps = graph.add("Gather", graph.add("Shape", x), graph.constant(1, np.int64))
    steps_T = graph.add("Range", graph.constant(0, np.int64), num_steps, graph.constant(1, np.int64))
    valid_BT = graph.add("Less", steps_T, graph.add("Unsqueeze", lengths, graph.ints(1)))
    steps = Steps(
        valid=graph.add("Unsqueeze", valid_BT, graph.ints(2)),
        lengths=lengths,
        lengths32=graph.add("Cast", lengths, to=proto.INT32),
    )
    if embedding is not None:
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"module: got an embedding {type(embedding).__name__}, expected fp32 weights")
        x = graph.add("Gather", graph.constant(embedding.weight), x)
    return x, steps


def _initial(graph: Graph, stack: RecurrentStack, name: str, shape: list[int | str]) -> str:
    """The initial state of as many rows as come in."""
    value = stack.initial_state(1)[name]
    num_rows = graph.add("Shape", "lengths")
    sizes = [graph.ints(int(shape[0])), num_rows, graph.ints(int(shape[2]))]
    return graph.add("Expand", graph.constant(value), graph.add("Concat", *sizes, axis=0))


def _add_head(graph: Graph, head: nn.Module, h: str, steps: Steps) -> None:
    if isinstance(head, CtcHead):
        scores = graph.zeroed(graph.linear(h, head.linear), steps)
        logits = graph.add("Reshape", scores, graph.ints(0, -1, head.num_classes))
        graph.output("logits", logits, ["B", "label_frames", head.num_classes])
    elif isinstance(head, ClassifyHead):
        logits = graph.linear(_pooled(graph, head.pool, h, steps), head.linear)
        graph.output("logits", logits, ["B", head.linear.out_features])
    else:
        raise ConfigError(f"module: got a head {type(head).__name__}, expected CtcHead or ClassifyHead")


def _pooled(graph: Graph, pool: RowPooling, h: str, steps: Steps) -> str:
    """One vector a row from frames that are zero at padded slots."""
    if pool.attention is not None:
        return _attended(graph, pool.attention, h, steps)
    if pool.name == "mean":
        lengths = graph.add("Cast", steps.lengths, to=graph.onnx.TensorProto.FLOAT)
        total = graph.add("ReduceSum", h, graph.ints(1), keepdims=0)
        return graph.add("Div", total, graph.add("Unsqueeze", lengths, graph.ints(1)))
    if pool.name == "max":
        lowest = graph.add("Where", steps.valid, h, graph.constant(-np.inf))
        return graph.add("ReduceMax", lowest, graph.ints(1), keepdims=0)
    place = graph.add("Unsqueeze", graph.add("Sub", steps.lengths, graph.constant(1, np.int64)), graph.ints(1))
    last = graph.add("GatherND", h, place, batch_dims=1)
    if pool.num_directions == 1:
        return last
    first = graph.add("Gather", h, graph.constant(0, np.int64), axis=1)
    return graph.add("Concat", graph.split(last, 2)[0], graph.split(first, 2)[1], axis=-1)


def _attended(graph: Graph, attention: AttentionPooling, h: str, steps: Steps) -> str:
    units = graph.add("Tanh", graph.linear(h, attention.hidden))
    if attention.gate is not None:
        units = graph.add("Mul", units, graph.add("Sigmoid", graph.linear(h, attention.gate)))
    scores = graph.add("Where", steps.valid, graph.linear(units, attention.score), graph.constant(-np.inf))
    weights_BAT = graph.add("Transpose", graph.add("Softmax", scores, axis=1), perm=[0, 2, 1])
    means = graph.add("MatMul", weights_BAT, h)
    return graph.add("Reshape", means, graph.ints(0, attention.output_size))
