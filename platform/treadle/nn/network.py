"""The whole model of a job: input, recurrent stack, head.

Shape letters: B rows, T time steps, D features, H outputs of the stack, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.cell import State
from treadle.nn.cells import GRU, LSTM, RNN, MinGRU, MinLSTM
from treadle.nn.heads import ClassifyHead, CtcHead, TagHead
from treadle.nn.hybrid import HybridStack
from treadle.nn.language import LanguageModelHead, Softmax
from treadle.nn.rows import Lengths, Rows
from treadle.nn.stack import RecurrentStack
from treadle.spec import (
    ClassifySpec,
    CtcSpec,
    GruSpec,
    InputKind,
    LanguageSpec,
    LstmSpec,
    MinGruSpec,
    MinLstmSpec,
    ModelSpec,
    RnnSpec,
    Signature,
    TagSpec,
    TaskSpec,
)

__all__ = ["Network", "build_network", "count_parameters", "recurrent_stack_of"]

# The closed table of cells, and which field of the spec goes to which option of the cell.
_STACKS: dict[type[ModelSpec], tuple[type[RecurrentStack], Callable[[Any], dict[str, Any]]]] = {
    RnnSpec: (RNN, lambda spec: {"nonlinearity": spec.nonlinearity.value}),
    LstmSpec: (LSTM, lambda _: {}),
    GruSpec: (GRU, lambda _: {}),
    MinGruSpec: (MinGRU, lambda spec: {"candidate": spec.candidate.value, "expansion": spec.expansion}),
    MinLstmSpec: (
        MinLSTM,
        lambda spec: {
            "candidate": spec.candidate.value,
            "expansion": spec.expansion,
            "normalize_gates": spec.normalize_gates,
            "forget_bias": spec.forget_bias,
        },
    ),
}


_Head = CtcHead | ClassifyHead | LanguageModelHead | TagHead


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
        stack: RecurrentStack | HybridStack,
        head: _Head,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.head = head

    @property
    def packed(self) -> bool:
        """Whether packed inputs are the form that costs least: nothing then lays them out anew."""
        return self.stack.packed

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Its modules in the order in which they run: embedding, recurrent and attention layers, head."""
        return *(() if self.embedding is None else (self.embedding,)), *self.stack.parts, self.head

    @overload
    def forward(self, x: Tensor, lengths: Lengths | None = None, packed: bool = False) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, lengths: Lengths | None, packed: bool, *, state: State, starts: Tensor | None = None
    ) -> tuple[Tensor, State]: ...

    def forward(
        self,
        x: Tensor,
        lengths: Lengths | None = None,
        packed: bool = False,
        *,
        state: State | None = None,
        starts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Scores before the softmax: logits_BTK over label frames (CTC), logits_BK (classification), logits_NK of the
        frames of all rows laid end to end (language models, tags).

        Args:
            x: tokens_BT (whole numbers; symbol 0 is a symbol like the others) or frames_BTD.
            lengths: frames of each row, as a CPU tensor or integers; None where all rows are full.
                Padded slots may hold anything that is a legal input.
            packed: x is tokens_N or frames_ND, the frames of all rows laid end to end. Any network takes both forms.
            state: of the stack, where an earlier piece of the same rows ended, such as `stack.initial_state(B)`. What
                comes back is then a pair: the scores, and the state at the last frame of each row.
            starts: True [N] at frames before which the state restarts; beside a state and packed frames.

        Raises:
            DataError: an empty row; the message names its index.
            ConfigError: lengths that do not fit.
        """
        rows = self._rows(x, lengths, packed=packed)
        x_ND = self._embedded(x if packed else rows.pack(x))
        if state is not None:
            h_NH, after = self._carried(x_ND, rows, state, starts)
            return self._scores(h_NH, rows), after
        if self.stack.packed:
            h_NH, _ = self.stack(x_ND, offsets=rows, final_state=False)
        else:
            h_BTH, _ = self.stack(rows.pad(x_ND), lengths=lengths, final_state=False)
            h_NH = rows.pack(h_BTH)
        return self._scores(h_NH, rows)

    def _carried(self, x_ND: Tensor, rows: Rows, state: State, starts: Tensor | None) -> tuple[Tensor, State]:
        if self.stack.packed or starts is not None or not rows.is_full:
            return self.stack(x_ND, state, offsets=rows, starts=starts)
        h_BTH, after = self.stack(rows.pad(x_ND), state)  # but a view, and cells that pad then lay out nothing anew
        return rows.pack(h_BTH), after

    def _scores(self, h_NH: Tensor, rows: Rows) -> Tensor:
        return self.head.padded(h_NH, rows) if isinstance(self.head, CtcHead) else self.head(h_NH, rows)

    def _rows(self, x: Tensor, lengths: Lengths | None, *, packed: bool) -> Rows:
        if not packed:
            shape = (x.shape[0], x.shape[1])
            if lengths is None:
                return Rows.full(*shape, x.device)
            return Rows.of_lengths(lengths, device=x.device, padded=shape)
        if lengths is None:
            raise ConfigError("lengths: got none beside packed frames, expected those of each row")
        rows = Rows.of_lengths(lengths, device=x.device)
        if rows.num_frames != x.shape[0]:
            raise ConfigError(f"lengths: got {rows.num_frames} frames in all, expected {x.shape[0]}")
        return rows

    def _embedded(self, x_N: Tensor) -> Tensor:
        return x_N if self.embedding is None else self.dropout(self.embedding(x_N))

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
    shared = {
        "input_size": model.embedding_size if tokens else signature.input_size,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "dropout": model.dropout,
        "bidirectional": model.bidirectional,
        "residual": model.residual,
        "norm": model.norm,
        "learned_state": model.learned_state,
        "conv_size": model.conv_size,
        "mlp_factor": model.mlp_factor,
        **options(model),
    }
    stack: RecurrentStack | HybridStack
    if model.attention_every:
        attention = {"num_heads": model.attention_heads, "window": model.attention_window}
        stack = HybridStack(stack_type, attention_every=model.attention_every, **attention, **shared)
    else:
        stack = stack_type(**shared)
    embedding = nn.Embedding(signature.input_size, model.embedding_size) if tokens else None
    return Network(
        embedding=embedding,
        dropout=model.dropout,
        stack=stack,
        head=_head(task, stack, signature.num_labels, embedding),
    )


def _head(
    task: TaskSpec, stack: RecurrentStack | HybridStack, num_labels: int, embedding: nn.Embedding | None
) -> _Head:
    if isinstance(task, LanguageSpec):
        if embedding is None:
            raise ConfigError("task: got language where inputs are frames of numbers, expected symbols")
        shared = {"softmax": Softmax.tied, "embedding": embedding} if task.tied else {}
        return LanguageModelHead(stack.output_size, embedding.num_embeddings, **shared)
    if isinstance(task, TagSpec):
        return TagHead(stack.output_size, num_labels)
    if isinstance(task, CtcSpec):
        return CtcHead(stack.output_size, num_labels, task.frames_per_step)
    if isinstance(task, ClassifySpec):
        return ClassifyHead(stack.output_size, num_labels, task.pooling, stack.num_directions)
    raise ConfigError(f"task: got {type(task).__name__}, expected one that has a head")


def recurrent_stack_of(module: nn.Module) -> RecurrentStack:
    """The recurrent layers of a network, or of a stack itself.

    Raises:
        ConfigError: a module of another kind, or one with attention between its layers.
    """
    stack = module.stack if isinstance(module, Network) else module
    if not isinstance(stack, RecurrentStack):
        raise ConfigError(
            f"module: got {type(stack).__name__}, expected a RecurrentStack, or a Network without attention layers"
        )
    return stack


def count_parameters(network: nn.Module) -> int:
    """Trainable numbers in `network`."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
