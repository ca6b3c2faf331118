"""A trained stack or network as a `torch.export` program with free numbers of rows and time steps.

Shape letters: B or S rows, T time steps, D features, H hidden, N frames of all rows laid end to end.

`treadle::gated_scan` stays whole in the graph. So does `treadle::recurrent_layer`, which stands for torch's own LSTM,
GRU and RNN: what torch knows of their shapes is a loop over time steps, which would fix their number. A program
therefore runs where `treadle.nn.export_torch` has been imported.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from treadle.errors import ConfigError, InternalError
from treadle.nn.cell import Cell, Reading, State
from treadle.nn.heads import ClassifyHead, CtcHead
from treadle.nn.layer import Layer
from treadle.nn.network import Network, recurrent_stack_of
from treadle.nn.pooling import AttentionPooling, RowPooling
from treadle.nn.rows import Rows
from treadle.nn.stack import RecurrentStack

__all__ = ["TorchExport", "export_torch"]

_TOLERANCE = 1e-5
_CASES = ((1, 1), (3, 7), (2, 40), (17, 2))
_LENGTHS = ((1, 1), (12, 1, 7, 3), (300, 2))


@dataclass(frozen=True, kw_only=True)
class TorchExport:
    """A program and how far it is from the module.

    Args:
        program: to be saved by `torch.export.save`, or compiled.
        max_error: largest difference of an output, in units of max(1, largest output).
        cases: shapes compared: rows and time steps, or lengths where packed.
    """

    program: ExportedProgram
    max_error: float
    cases: tuple[tuple[int, ...], ...]


def export_torch(module: RecurrentStack | Network, *, packed: bool = False) -> TorchExport:
    """A program that gives the module's numbers for any number of rows and time steps.

    Called as program.module()(x) with frames_BTD or tokens_BT, all rows full; or, packed, as (x, offsets) with the
    frames of two or more rows of any lengths. Gives logits of a network, (y, h, ...) of a stack.

    Args:
        module: a Network or a RecurrentStack on the CPU, fp32.
        packed: rows of unlike length, for MinGRU and MinLSTM; the others run rows in groups, which depends on data.

    Raises:
        ConfigError: a module that torch.export cannot take in this form; the message says what it said.
        InternalError: the program gives other numbers: an error above 1e-5 in units of max(1, largest output).

    Cost: seconds.
    """
    stack = recurrent_stack_of(module)
    if stack.time_decay:
        raise ConfigError("module: got time_decay, expected none")
    if packed and not stack.packed:
        raise ConfigError(f"packed: got {type(stack).__name__}, expected MinGRU or MinLSTM")
    assert isinstance(module, (RecurrentStack, Network))
    wrapped = (_Packed if packed else _Padded)(_whole(module))
    program = _export(wrapped, _inputs(module, packed=packed, case=(5, 3, 6) if packed else (3, 5)), packed=packed)
    cases = _LENGTHS if packed else _CASES
    errors: list[float] = []
    with torch.no_grad():
        original = copy.deepcopy(module).eval()
        for case in cases:
            inputs = _inputs(module, packed=packed, case=case)
            errors += map(_error, _expected(original, *inputs), program.module()(*inputs))
    max_error = float(torch.tensor(errors, dtype=torch.float64).max())  # NaN if any is
    if not max_error <= _TOLERANCE:
        raise InternalError(f"export: got outputs that differ by {max_error:.2g}, expected {_TOLERANCE} or less")
    return TorchExport(program=program, max_error=max_error, cases=cases)


def _export(wrapped: nn.Module, inputs: tuple[Tensor, ...], *, packed: bool) -> ExportedProgram:
    frames, rows, steps = Dim("frames", min=1), Dim("rows", min=1), Dim("steps", min=1)
    shapes = ({0: frames}, {0: Dim("bounds", min=3)}) if packed else ({0: rows, 1: steps},)
    try:
        with torch.no_grad():
            return torch.export.export(wrapped, inputs, dynamic_shapes=shapes)
    except Exception as error:  # of many classes, some private
        raise ConfigError(f"module: got one that torch.export refuses: {str(error).strip().splitlines()[0]}") from error


def _inputs(module: RecurrentStack | Network, *, packed: bool, case: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(case),) if packed else case
    embedding = module.embedding if isinstance(module, Network) else None
    if embedding is not None:
        x = torch.randint(embedding.num_embeddings, shape, generator=generator)
    else:
        stack = module.stack if isinstance(module, Network) else module
        x = torch.randn(*shape, stack.input_size, generator=generator)
    return (x, torch.tensor((0, *case)).cumsum(0)) if packed else (x,)


def _expected(module: RecurrentStack | Network, x: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, ...]:
    """What the module itself gives, in the ways of its own."""
    if isinstance(module, RecurrentStack):
        y, state = module(x, offsets=offsets)
        return (y, *state.values())
    if offsets is None:
        return (module(x),)
    rows = Rows.of_offsets(offsets, x.shape[0], device=x.device)
    logits = module(rows.pad(x), rows.lengths)
    if not isinstance(module.head, CtcHead):
        return (logits,)
    # Label frames of padded rows, packed as the program gives them.
    label_rows = Rows.of_lengths(module.label_lengths(rows.lengths), device=x.device, padded=(logits.shape[:2]))
    return (label_rows.pack(logits),)


def _error(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1))


# ---- what is exported ----


class _Packed(nn.Module):
    """Frames and where rows begin; nothing is read back to the host."""

    def __init__(self, module: RecurrentStack | Network) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_N: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        rows = Rows(offsets, x_N.shape[0])
        if isinstance(self.module, RecurrentStack):
            y_NH, state = self.module(x_N, offsets=rows)
            return (y_NH, *state.values())
        x_ND = x_N if self.module.embedding is None else self.module.embedding(x_N)
        h_NH, _ = self.module.stack(x_ND, offsets=rows, final_state=False)
        head = self.module.head
        if isinstance(head, ClassifyHead):
            return (head.linear(_pooled_rows(head.pool, h_NH, rows)),)
        return (head(h_NH, rows),)


class _Padded(nn.Module):
    """Rows of one length."""

    def __init__(self, module: RecurrentStack | Network) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.module, RecurrentStack):
            y_BTH, state = self._stack(self.module, x_BT)
            return (y_BTH, *state.values())
        x_BTD = x_BT if self.module.embedding is None else self.module.embedding(x_BT)
        h_BTH, _ = self._stack(recurrent_stack_of(self.module), x_BTD)
        head = self.module.head
        if isinstance(head, CtcHead):
            return (head(h_BTH),)
        if isinstance(head, ClassifyHead):
            return (head.linear(_pooled(head.pool, h_BTH)),)
        raise ConfigError(f"module: got a head {type(head).__name__}, expected CtcHead or ClassifyHead")

    def _stack(self, stack: RecurrentStack, x_BTD: Tensor) -> tuple[Tensor, State]:
        if not stack.packed:
            return stack(x_BTD)
        num_rows, num_steps, _ = x_BTD.shape
        # Rows that only offsets tell of: a length known to the host is a constant of the graph.
        offsets = torch.arange(num_rows + 1, device=x_BTD.device) * num_steps
        y_NH, state = stack(x_BTD.flatten(0, 1), offsets=Rows(offsets, num_rows * num_steps))
        return y_NH.view(num_rows, num_steps, -1), state


def _pooled(pool: RowPooling, h_BTH: Tensor) -> Tensor:
    """`RowPooling` over rows of one length."""
    if pool.attention is not None:
        weights_BTA = _scores(pool.attention, h_BTH).softmax(1)
        return (weights_BTA.transpose(1, 2) @ h_BTH).flatten(1)
    if pool.name == "mean":
        return h_BTH.mean(1)
    if pool.name == "max":
        return h_BTH.amax(1)
    if pool.num_directions == 1:
        return h_BTH[:, -1]
    half = h_BTH.shape[-1] // 2
    return torch.cat((h_BTH[:, -1, :half], h_BTH[:, 0, half:]), dim=-1)


def _pooled_rows(pool: RowPooling, h_NH: Tensor, rows: Rows) -> Tensor:
    """`RowPooling`; its own sums go by blocks of frames, whose number would decide the graph."""
    if pool.name not in ("mean", "attention"):
        return pool(h_NH, rows)
    weights_NA = h_NH.new_ones(h_NH.shape[0], 1)
    if pool.attention is not None:
        scores_NA = _scores(pool.attention, h_NH)
        row_NA = rows.row_N[:, None].expand_as(scores_NA)
        lowest = scores_NA.new_full((rows.num_rows, scores_NA.shape[1]), -torch.inf)
        top_SA = lowest.scatter_reduce(0, row_NA, scores_NA, "amax")
        weights_NA = torch.exp(scores_NA - top_SA.index_select(0, rows.row_N))
    total_SA = weights_NA.new_zeros(rows.num_rows, weights_NA.shape[1]).index_add(0, rows.row_N, weights_NA)
    weighted_NM = (weights_NA[..., None] * h_NH[:, None]).flatten(1)
    sums_SM = weighted_NM.new_zeros(rows.num_rows, weighted_NM.shape[1]).index_add(0, rows.row_N, weighted_NM)
    return (sums_SM.unflatten(1, (weights_NA.shape[1], -1)) / total_SA[..., None]).flatten(1)


def _scores(attention: AttentionPooling, h: Tensor) -> Tensor:
    units = torch.tanh(attention.hidden(h))
    return attention.score(units if attention.gate is None else units * torch.sigmoid(attention.gate(h)))


def _whole(module: RecurrentStack | Network) -> RecurrentStack | Network:
    """A copy whose recurrent layers are one operator each."""
    module = copy.deepcopy(module).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, Layer):
            for name in ("ahead", "back"):
                if isinstance(rnn := getattr(getattr(layer, name), "rnn", None), nn.RNNBase):
                    setattr(layer, name, _WholeCell(rnn))
    return module


class _WholeCell(Cell):
    """torch's kernel over rows of one length, as one operator."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.state_size = self.output_size = rnn.hidden_size

    @property
    def weight(self) -> Tensor:
        return self.rnn.get_parameter("weight_ih_l0")

    def forward(self, x: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        weights = list(self.rnn.parameters())
        y, h, c = torch.ops.treadle.recurrent_layer(x, state["h"], state.get("c"), weights, self.rnn.mode)
        return y, {"h": h, "c": c} if "c" in state else {"h": h}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BTH, after = self(x_BD[:, None], state, Reading(rows=Rows.full(x_BD.shape[0], 1, x_BD.device)))
        return y_BTH[:, 0], after


_KERNELS: dict[str, Any] = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


def _run(x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor], mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H] and the last h and c; c is empty where there is none."""
    options = (weights, len(weights) == 4, 1, 0.0, False, False, True)
    if c is not None:
        y, h, c = torch.lstm(x, [h[None], c[None]], *options)
        return y, h[0].clone(), c[0].clone()
    y, h = _KERNELS[mode](x, h[None], *options)
    return y, h[0].clone(), x.new_empty(0)


def _shapes(x: Tensor, h: Tensor, c: Tensor | None, _weights: list[Tensor], _mode: str) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape[0], x.shape[1], h.shape[1]),
        torch.empty_like(h),
        x.new_empty(0) if c is None else torch.empty_like(c),
    )


_library = torch.library.Library("treadle", "FRAGMENT")
_library.define(
    "recurrent_layer(Tensor x, Tensor h, Tensor? c, Tensor[] weights, str mode) -> (Tensor, Tensor, Tensor)"
)
_library.impl("recurrent_layer", _run, "CompositeExplicitAutograd")
torch.library.register_fake("treadle::recurrent_layer", _shapes, lib=_library)
