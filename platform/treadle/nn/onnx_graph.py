"""ONNX graphs, written node by node.

Shape letters: D inputs, G outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from treadle.errors import ConfigError

__all__ = ["MICROSOFT", "OPSET", "Graph", "Steps", "to_bytes"]

OPSET = 20
"""The first with GELU; of 2023."""
MICROSOFT = "com.microsoft"
"""The domain of operators that only onnxruntime has."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is known of rows and time steps, by the names of values.

    Args:
        valid: bool [B, T, 1], True at frames.
        lengths: int64 [B].
        lengths32: the same as int32, as recurrent operators want them.
    """

    valid: str
    lengths: str
    lengths32: str


class Graph:
    """Nodes in order, and the tensors that travel with them; values are known by their names.

    Args:
        onnx: the package.
        int8: store matrices as bytes and multiply whole numbers.
    """

    def __init__(self, onnx: ModuleType, *, int8: bool) -> None:
        self.onnx, self.int8 = onnx, int8
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._weights: list[Any] = []
        self._count = 0

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The value that a node gives."""
        return self.add_many(op, *inputs, count=1, domain=domain, **attributes)[0]

    def add_many(self, op: str, *inputs: str, count: int, domain: str = "", **attributes: Any) -> list[str]:
        """The values that a node gives."""
        outputs = [self._name(op.lower()) for _ in range(count)]
        self._nodes.append(self.onnx.helper.make_node(op, list(inputs), outputs, domain=domain, **attributes))
        return outputs

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A tensor that travels with the graph."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        name = self._name("weight")
        self._weights.append(self.onnx.numpy_helper.from_array(np.array(array, dtype=dtype, order="C"), name))
        return name

    def ints(self, *values: int) -> str:
        """int64 in one dimension."""
        return self.constant(values, np.int64)

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """A value that the caller gives; a letter is a size that is free."""
        self._inputs.append(self.onnx.helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str]) -> None:
        """fp32 that the caller gets."""
        float32 = self.onnx.TensorProto.FLOAT
        self._nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self._outputs.append(self.onnx.helper.make_tensor_value_info(name, float32, list(shape)))

    def linear(self, x: str, linear: nn.Module) -> str:
        """x w' + bias.

        Raises:
            ConfigError: int8 weights.
        """
        if not isinstance(linear, nn.Linear):
            raise ConfigError(f"module: got a layer {type(linear).__name__}, expected fp32 weights")
        y = self._int8_product(x, linear.weight) if self.int8 else self.add("MatMul", x, self.constant(linear.weight.T))
        return y if linear.bias is None else self.add("Add", y, self.constant(linear.bias))

    def _int8_product(self, x: str, weight_GD: Tensor) -> str:
        # Unsigned by unsigned: where a processor sums pairs in 16 bits, unsigned by signed bytes are cut off.
        bytes_GD, scale_G = to_bytes(weight_GD)
        whole, x_scale, x_zero = self.add_many("DynamicQuantizeLinear", x, count=3)
        weights, zero = self.constant(bytes_GD.T, np.uint8), self.constant(128, np.uint8)
        sums = self.add("MatMulInteger", whole, weights, x_zero, zero)
        factor = self.add("Mul", x_scale, self.constant(scale_G))
        return self.add("Mul", self.add("Cast", sums, to=self.onnx.TensorProto.FLOAT), factor)

    def zeroed(self, x: str, steps: Steps) -> str:
        """Zeros at padded slots."""
        return self.add("Where", steps.valid, x, self.constant(0.0))

    def split(self, x: str, num_parts: int) -> list[str]:
        """Equal parts of the last dimension."""
        return self.add_many("Split", x, count=num_parts, num_outputs=num_parts, axis=-1) if num_parts > 1 else [x]

    def model(self) -> Any:
        """The graph as a model."""
        helper = self.onnx.helper
        graph = helper.make_graph(self._nodes, "treadle", self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        # The oldest format that has the opset, for the sake of older run times.
        version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        return helper.make_model(graph, opset_imports=opsets, producer_name="treadle", ir_version=version)

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"


def to_bytes(weight: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Weights as unsigned bytes around 128, and the scale of each output (the last dimension but one)."""
    scale = weight.detach().abs().amax(-1).clamp(min=1e-30) / 127
    whole = (weight.detach() / scale[..., None]).round() + 128
    return whole.numpy().astype(np.uint8), scale.numpy()
