"""The whole model of a job: input, recurrent stack, head.

Shape letters: B rows, T time steps, D features, H outputs of the stack, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.cells import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.gates import state_dtype
from treadle.nn.rows import Lengths, Rows
from treadle.nn.stack import RecurrentStack
from treadle.spec import (
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    Pooling,
    RnnSpec,
    Signature,
    TaskSpec,
)

__all__ = ["Network", "build_network", "count_parameters"]

# The closed table of cells, and which field of the spec goes to which option of the cell.
_STACKS: dict[type[ModelSpec], tuple[type[RecurrentStack], Callable[[Any], dict[str, Any]]]] = {
    RnnSpec: (RNN, lambda spec: {"nonlinearity": spec.nonlinearity.value}),
    LstmSpec: (LSTM, lambda _: {}),
    GruSpec: (GRU, lambda _: {}),
    MinGruSpec: (MinGRU, lambda _: {}),
    MinLstmSpec: (MinLSTM, lambda spec: {"normalize_gates": spec.normalize_gates}),
}


class CtcHead(nn.Module):
    """Scores of blank (0) and labels (1 to `num_labels`), `frames_per_step` label frames a time step."""

    def __init__(self, input_size: int, num_labels: int, frames_per_step: int) -> None:
        super().__init__()
        self.frames_per_step = frames_per_step
        self.num_classes = num_labels + 1
        self.linear = nn.Linear(input_size, frames_per_step * self.num_classes)

    def forward(self, h_BTH: Tensor, lengths_B: Lengths | None) -> Tensor:
        del lengths_B  # scores at padded slots are left to the loss, which looks at label lengths
        num_rows, num_steps, _ = h_BTH.shape
        return self.linear(h_BTH).view(num_rows, num_steps * self.frames_per_step, self.num_classes)


class ClassifyHead(nn.Module):
    """Scores of the classes from one vector a row, pooled over its frames."""

    frames_per_step = 1

    def __init__(self, input_size: int, num_labels: int, pooling: Pooling, num_directions: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.num_directions = num_directions
        self.linear = nn.Linear(input_size, num_labels)

    def forward(self, h_BTH: Tensor, lengths_B: Lengths | None) -> Tensor:
        shape = (h_BTH.shape[0], h_BTH.shape[1])
        rows = (
            Rows.full(*shape, h_BTH.device)
            if lengths_B is None
            else Rows.of_lengths(lengths_B, device=h_BTH.device, padded=shape)
        )
        if self.pooling is Pooling.mean:
            return self.linear(_mean(h_BTH, rows))
        if self.pooling is Pooling.max:
            return self.linear(h_BTH.masked_fill(~rows.valid_BT[..., None], -torch.inf).amax(1))
        return self.linear(_last(h_BTH, rows, self.num_directions))


def _mean(h_BTH: Tensor, rows: Rows) -> Tensor:
    return h_BTH.sum(1, dtype=state_dtype(h_BTH.dtype)) / rows.lengths_S[:, None]  # a stack's padded slots are zero


def _last(h_BTH: Tensor, rows: Rows, num_directions: int) -> Tensor:
    """What each direction gave last: ahead at the row's last frame, back at its first."""
    last_BH = rows.last(h_BTH)
    if num_directions == 1:
        return last_BH
    half = h_BTH.shape[-1] // 2
    return torch.cat((last_BH[:, :half], h_BTH[:, 0, half:]), dim=-1)


class Network(nn.Module):
    """The model of a job. Made by `build_network`.

    Args:
        embedding: vectors of the token symbols; None where the input is frames of numbers.
        dropout: share of embedding values zeroed while training.
        stack: the recurrent layers.
        head: from their outputs to scores.
    """

    def __init__(
        self,
        *,
        embedding: nn.Embedding | None,
        dropout: float,
        stack: RecurrentStack,
        head: CtcHead | ClassifyHead,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.head = head

    def forward(self, x: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Scores before the softmax: logits_BTK over label frames (CTC), logits_BK (classification).

        Args:
            x: tokens_BT (whole numbers; symbol 0 is a symbol like the others) or frames_BTD.
            lengths: frames of each row, as a CPU tensor or integers; None where all rows are full.
                Padded slots may hold anything that is a legal input.

        Raises:
            DataError: an empty row; the message names its index.
        """
        x_BTD = x if self.embedding is None else self.dropout(self.embedding(x))
        h_BTH, _ = self.stack(x_BTD, lengths=lengths, final_state=False)
        return self.head(h_BTH, lengths)

    def label_lengths(self, lengths_B: Lengths) -> Tensor:
        """How many label frames the head gives for rows of so many time steps; on the CPU."""
        return torch.as_tensor(lengths_B, dtype=torch.int64, device="cpu") * self.head.frames_per_step


def build_network(model: ModelSpec, task: TaskSpec, signature: Signature) -> Network:
    """The network that a job asks for, with fresh weights from torch's global random stream.

    Raises:
        ConfigError: a spec class without a network.
    """
    if type(model) not in _STACKS:
        raise ConfigError(f"model: got {type(model).__name__}, expected one of {[cls.__name__ for cls in _STACKS]}")
    stack_type, options = _STACKS[type(model)]
    tokens = signature.input_kind is InputKind.tokens
    stack = stack_type(
        model.embedding_size if tokens else signature.input_size,
        model.hidden_size,
        model.num_layers,
        dropout=model.dropout,
        bidirectional=model.bidirectional,
        residual=model.residual,
        norm=model.norm,
        **options(model),
    )
    return Network(
        embedding=nn.Embedding(signature.input_size, model.embedding_size) if tokens else None,
        dropout=model.dropout,
        stack=stack,
        head=_head(task, stack, signature.num_labels),
    )


def _head(task: TaskSpec, stack: RecurrentStack, num_labels: int) -> CtcHead | ClassifyHead:
    if isinstance(task, CtcSpec):
        return CtcHead(stack.output_size, num_labels, task.frames_per_step)
    if isinstance(task, ClassifySpec):
        return ClassifyHead(stack.output_size, num_labels, task.pooling, stack.num_directions)
    raise ConfigError(f"task: got {type(task).__name__}, expected CtcSpec or ClassifySpec")


def count_parameters(network: nn.Module) -> int:
    """Trainable numbers in `network`."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
