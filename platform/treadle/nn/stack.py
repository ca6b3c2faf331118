"""Layers on top of one another, in one or two directions, over rows of unlike length.

Shape letters: B rows, T time steps, D features, H hidden, L layers * directions.

A cell knows one layer in one direction; everything else is here, once for all cells.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.rows import Lengths, Rows
from treadle.nn.scan import state_dtype

__all__ = ["Cell", "RecurrentStack", "State"]

State = dict[str, Tensor]
"""What a stack carries from one time step to the next: fp32 tensors [L, B, H], "h" and, for the LSTM, "c"."""


class Cell(nn.Module, ABC):
    """One recurrent layer in one direction. States are [B, H] here.

    Padded slots hold finite values on entry; what a cell writes there is not looked at.
    """

    state_names: tuple[str, ...] = ("h",)

    @abstractmethod
    def forward(self, x_BTD: Tensor, state: State, rows: Rows | None, *, final_state: bool) -> tuple[Tensor, State]:
        """h_BTH and the state at the last frame of every row ({} unless `final_state`)."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """h_BH and the state one time step later."""


class _Layer(nn.Module):
    """Norm, then a cell ahead and, where asked, one back."""

    def __init__(self, make_cell: Callable[[int], Cell], input_size: int, *, bidirectional: bool, norm: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(input_size, eps=1e-6) if norm else None
        self.ahead = make_cell(input_size)
        self.back = make_cell(input_size) if bidirectional else None

    def normed(self, x: Tensor) -> Tensor:
        # Explicitly in the weights' format: beside bf16 inputs torch warns and leaves its fused kernel.
        return x if self.norm is None else self.norm(x.to(self.norm.weight.dtype))

    def forward(
        self, x_BTD: Tensor, states: list[State], rows: Rows | None, *, final_state: bool
    ) -> tuple[Tensor, list[State]]:
        x_BTD = self.normed(x_BTD)
        h_BTH, ahead = self.ahead(x_BTD, states[0], rows, final_state=final_state)
        if self.back is None:
            return h_BTH, [ahead]
        x_BTD = x_BTD.flip(1) if rows is None else rows.flipped(x_BTD)
        back_BTH, back = self.back(x_BTD, states[1], rows, final_state=final_state)
        back_BTH = back_BTH.flip(1) if rows is None else rows.flipped(back_BTH)
        return torch.cat((h_BTH, back_BTH), dim=-1), [ahead, back]


class RecurrentStack(nn.Module):
    """Recurrent layers with the constructor and the call of `torch.nn.GRU`; a subclass says which cell.

    Between layers, in this order: y = cell(norm(x)); dropout of y except in the last layer; y + x
    where the widths agree.

    Args:
        input_size: features per frame.
        hidden_size: hidden units per layer and direction.
        num_layers: layers in the stack.
        bias: add biases to the pre-activations.
        batch_first: inputs and outputs are [B, T, ...] (the default here), else [T, B, ...].
        dropout: share of values zeroed between layers, while training.
        bidirectional: also read each row from its own last frame to its first.
        residual: add a layer's input to its output where the widths agree.
        norm: normalise (RMS) the input of each layer.
        options: further arguments of the cell.
    """

    cell_type: ClassVar[Callable[..., Cell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        residual: bool = False,
        norm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.residual = residual
        self.num_directions = 2 if bidirectional else 1
        self.output_size = hidden_size * self.num_directions
        self.dropout = nn.Dropout(dropout)
        make_cell = functools.partial(self.cell_type, hidden_size=hidden_size, bias=bias, **options)
        sizes = [input_size] + [self.output_size] * (num_layers - 1)
        self.layers = nn.ModuleList(_Layer(make_cell, size, bidirectional=bidirectional, norm=norm) for size in sizes)
        self.state_names = self._layer(0).ahead.state_names

    def _layer(self, index: int) -> _Layer:
        layer = self.layers[index]
        assert isinstance(layer, _Layer)
        return layer

    def zero_state(self, num_rows: int) -> State:
        """The state before the first frame."""
        weight = next(self.parameters())
        shape = (self.num_layers * self.num_directions, num_rows, self.hidden_size)
        return {name: weight.new_zeros(shape, dtype=state_dtype(weight.dtype)) for name in self.state_names}

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        *,
        lengths_B: Lengths | None = None,
        final_state: bool = True,
    ) -> tuple[Tensor, State]:
        """Outputs of the last layer, zero at padded slots, and the state at the last frame of every row.

        The output has the format of `x_BTD`, under autocast that of autocast, for every cell. The
        state is fp32, so that a sequence run in pieces gives what the whole gives.

        Args:
            x_BTD: frames; what stands at padded slots is never read.
            state: where an earlier piece of the same rows ended; zeros when not given.
            lengths_B: frames of each row, as a CPU tensor or integers; None where all rows are full.
            final_state: False spares the final state ({} comes back), which costs the LSTM a second
                projection where rows are of unlike length.

        Raises:
            ConfigError: a state for a bidirectional stack, or shapes that do not fit.
            DataError: an empty row; the message names its index.
        """
        if not self.batch_first:
            x_BTD = x_BTD.transpose(0, 1)
        if x_BTD.ndim != 3 or x_BTD.shape[-1] != self.input_size:
            raise ConfigError(f"x_BTD: got shape {tuple(x_BTD.shape)}, expected (rows, time steps, {self.input_size})")
        rows = Rows.of(lengths_B, x_BTD)
        parts = self._split(state, x_BTD.shape[0])
        out_dtype = _output_dtype(x_BTD)
        if rows is not None:
            x_BTD = rows.zeroed(x_BTD)
        finals: list[State] = []
        for index in range(self.num_layers):
            states = parts[index * self.num_directions : (index + 1) * self.num_directions]
            y_BTH, ends = self._layer(index)(x_BTD, states, rows, final_state=final_state)
            y_BTH = y_BTH.to(out_dtype)  # narrow between layers; only states stay fp32
            if rows is not None:
                y_BTH = rows.zeroed(y_BTH)
            x_BTD = self._combined(x_BTD, y_BTH, index)
            finals += ends
        output = x_BTD.to(out_dtype)
        return output if self.batch_first else output.transpose(0, 1), self._stacked(finals)

    def step(self, x_BD: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The output of one time step and the state after it.

        Raises:
            ConfigError: the stack is bidirectional.
        """
        if self.bidirectional:
            raise ConfigError("step: got a bidirectional stack, expected one that reads in one direction")
        out_dtype = _output_dtype(x_BD)
        finals: list[State] = []
        for index, before in enumerate(self._split(state, x_BD.shape[0])):
            layer = self._layer(index)
            y_BH, after = layer.ahead.step(layer.normed(x_BD), before)
            x_BD = self._combined(x_BD, y_BH.to(out_dtype), index)
            finals.append(after)
        return x_BD.to(out_dtype), self._stacked(finals)

    def _combined(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        if index < self.num_layers - 1:
            y = self.dropout(y)
        return x + y if self.residual and x.shape[-1] == y.shape[-1] else y

    def _split(self, state: State | None, num_rows: int) -> list[State]:
        """One state per layer and direction."""
        zeros = self.zero_state(num_rows)
        if state is None:
            state = zeros
        elif self.bidirectional:
            raise ConfigError("state: got one for a bidirectional stack, expected none: its end is not a beginning")
        shapes = {name: tuple(part.shape) for name, part in state.items()}
        if shapes != (expected := {name: tuple(part.shape) for name, part in zeros.items()}):
            raise ConfigError(f"state: got {shapes}, expected {expected}")
        unbound = {name: part.to(zeros[name].dtype).unbind(0) for name, part in state.items()}
        num_parts = self.num_layers * self.num_directions
        return [{name: parts[index] for name, parts in unbound.items()} for index in range(num_parts)]

    @staticmethod
    def _stacked(finals: list[State]) -> State:
        return {name: torch.stack([final[name] for final in finals]) for name in finals[0]}

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, residual={self.residual}"


def _output_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
