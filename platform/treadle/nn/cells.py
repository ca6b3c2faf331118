"""The five recurrent layers, one signature: drop-ins for `torch.nn.GRU`.

Shape letters: B or S rows, T time steps, D features, H hidden, G gates * H, N frames of all rows end to end.

RNN, LSTM and GRU run torch's fused kernels (oneDNN, cuDNN) over padded rows, one layer and one
direction at a time. MinGRU and MinLSTM are one projection and one `gated_scan`.

Initial weights: recurrent matrices orthogonal, gate by gate (Saxe et al. 2014, arXiv 1312.6120),
input matrices Glorot uniform, gate by gate, biases 0 but the LSTM's forget gate 1 (Jozefowicz et
al. 2015). The projections of MinGRU and MinLSTM start as `torch.nn.Linear` does, like the published
code's.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.errors import ConfigError
from treadle.nn.autocast import low_precision_where_fast, stored_dtype, without_autocast
from treadle.nn.cell import Cell, Reading, State
from treadle.nn.gates import Candidate, GateForm, ScanOptions
from treadle.nn.rows import Rows
from treadle.nn.scan import gated_scan, gated_step
from treadle.nn.stack import RecurrentStack

__all__ = ["GRU", "LSTM", "RNN", "MinGRU", "MinLSTM", "from_torch"]


class _KernelCell(Cell):
    """One of torch's recurrent kernels: a single layer in one direction, over padded rows."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.state_size = self.output_size = rnn.hidden_size
        # Measured for hidden sizes of 64 to 256 on AVX2; only the LSTM has a kernel for all time steps at once.
        self.step_overhead = 4 if rnn.mode == "LSTM" else max(8, 2800 // rnn.hidden_size)
        for name, parameter in rnn.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
                continue
            for gate in parameter.data.split(rnn.hidden_size):
                (nn.init.orthogonal_ if "weight_hh" in name else nn.init.xavier_uniform_)(gate)

    def _weights(self) -> tuple[Tensor, ...]:
        """w_ih, w_hh and, with biases, b_ih, b_hh."""
        return tuple(self.rnn.all_weights[0])  # type: ignore[arg-type]

    def forward(self, x: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        self._check_weights()
        with low_precision_where_fast(x):
            if reading.decay is not None:
                return self._run_decaying(x, state, reading.decay, reading)
            return self._run(x, state, reading)

    def _check_weights(self) -> None:
        dtype = self._weights()[0].dtype
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"weights: got {dtype}, expected torch.float32: the state of these cells would lose what it adds up",
                hint="keep fp32 weights under torch.autocast, or use MinGRU or MinLSTM, whose state stays fp32",
            )

    @abstractmethod
    def _run(self, x_BTD: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        """`forward` in torch's kernel."""

    def _run_decaying(self, x_BTD: Tensor, state: State, decay_BTH: Tensor, reading: Reading) -> tuple[Tensor, State]:
        """`forward` step by step: torch's kernels let nobody at the state between two frames."""
        steps: dict[str, list[Tensor]] = {name: [] for name in self.state_names}
        for x_BD, decay_BH in zip(x_BTD.unbind(1), decay_BTH.to(state["h"].dtype).unbind(1), strict=True):
            _, state = self.step(x_BD, {name: part * decay_BH for name, part in state.items()})
            for name, part in state.items():
                steps[name].append(part)
        whole = {name: torch.stack(parts, dim=1) for name, parts in steps.items()}
        if not reading.final_state:
            return whole["h"], {}
        return whole["h"], {name: reading.rows.last(part_BTH) for name, part_BTH in whole.items()}


class _OneStateCell(_KernelCell):
    """A kernel whose state is its output."""

    def _run(self, x_BTD: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        h_BTH, _ = self.rnn(_castable(x_BTD), state["h"][None])
        if not reading.final_state:
            return h_BTH, {}
        return h_BTH, {"h": reading.rows.last(h_BTH).to(state["h"].dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_weights()
        with without_autocast(x_BD):
            h_BH = self._step(x_BD.to(state["h"].dtype), state["h"])
        return h_BH, {"h": h_BH}

    @abstractmethod
    def _step(self, x_BD: Tensor, h_BH: Tensor) -> Tensor:
        """h one time step later, by torch's function for a single one."""


class _RnnCell(_OneStateCell):
    def __init__(self, input_size: int, *, hidden_size: int, bias: bool, nonlinearity: str = "tanh") -> None:
        functions = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}
        if nonlinearity not in functions:
            raise ConfigError(f"nonlinearity: got {nonlinearity!r}, expected 'tanh' or 'relu'")
        super().__init__(nn.RNN(input_size, hidden_size, bias=bias, batch_first=True, nonlinearity=nonlinearity))
        self._step_function = functions[nonlinearity]

    def _step(self, x_BD: Tensor, h_BH: Tensor) -> Tensor:
        return self._step_function(x_BD, h_BH, *self._weights())


class _GruCell(_OneStateCell):
    def __init__(self, input_size: int, *, hidden_size: int, bias: bool) -> None:
        super().__init__(nn.GRU(input_size, hidden_size, bias=bias, batch_first=True))

    def _step(self, x_BD: Tensor, h_BH: Tensor) -> Tensor:
        return torch.gru_cell(x_BD, h_BH, *self._weights())


class _LstmCell(_KernelCell):
    state_names = ("h", "c")

    def __init__(self, input_size: int, *, hidden_size: int, bias: bool) -> None:
        super().__init__(nn.LSTM(input_size, hidden_size, bias=bias, batch_first=True))
        if bias:
            with torch.no_grad():
                self.rnn.get_parameter("bias_ih_l0")[hidden_size : 2 * hidden_size] = 1.0  # i, f, g, o

    def _run(self, x_BTD: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        h_BTH, ends = self.rnn(_castable(x_BTD), (state["h"][None], state["c"][None]))
        if not reading.final_state:
            return h_BTH, {}
        dtype = state["h"].dtype
        if reading.rows.is_full:
            return h_BTH, {"h": ends[0][0].to(dtype), "c": ends[1][0].to(dtype)}
        with torch.autocast(x_BTD.device.type, enabled=False):
            c_BH = self._last_c(x_BTD.to(dtype), h_BTH.to(dtype), state, reading.rows)
        return h_BTH, {"h": reading.rows.last(h_BTH).to(dtype), "c": c_BH}

    def _last_c(self, x_BTD: Tensor, h_BTH: Tensor, state: State, rows: Rows) -> Tensor:
        """The cell state at the last frame of every row, which the kernel gives only for the last slot.

        With every h known, all gates follow from one projection, and c from a linear recurrence.
        """
        before_BTH = torch.cat((state["h"][:, None], h_BTH[:, :-1]), dim=1)
        w_ih, w_hh, *biases = self._weights()
        pre_BTG = functional.linear(x_BTD, w_ih) + functional.linear(before_BTH, w_hh) + sum(biases)
        i_BTH, f_BTH, g_BTH, _ = pre_BTG.chunk(4, dim=-1)
        keep, add = torch.sigmoid(f_BTH), torch.sigmoid(i_BTH) * torch.tanh(g_BTH)
        c_BH = state["c"]
        steps: list[Tensor] = []
        for keep_BH, add_BH in zip(keep.unbind(1), add.unbind(1), strict=True):
            c_BH = torch.addcmul(add_BH, keep_BH, c_BH)
            steps.append(c_BH)
        return rows.last(torch.stack(steps, dim=1))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_weights()
        h_BH, c_BH = state["h"], state["c"]
        with without_autocast(x_BD):
            h_BH, c_BH = torch.lstm_cell(x_BD.to(h_BH.dtype), (h_BH, c_BH), *self._weights())
        return h_BH, {"h": h_BH, "c": c_BH}


def from_torch(rnn: nn.RNNBase) -> RecurrentStack:
    """A stack with the weights of a layer of torch, which gives the same outputs.

    Args:
        rnn: `nn.RNN`, `nn.LSTM` or `nn.GRU`; without a projection of the LSTM's output.

    Raises:
        ConfigError: a module of another kind, or with `proj_size`.
    """
    kinds: dict[str, Callable[..., RecurrentStack]] = {
        "RNN_TANH": RNN,
        "RNN_RELU": functools.partial(RNN, nonlinearity="relu"),
        "LSTM": LSTM,
        "GRU": GRU,
    }
    if getattr(rnn, "mode", None) not in kinds or rnn.proj_size:
        raise ConfigError(f"rnn: got {rnn}, expected torch's RNN, LSTM or GRU without proj_size")
    stack = kinds[rnn.mode](
        rnn.input_size, rnn.hidden_size, rnn.num_layers, rnn.bias, rnn.batch_first, rnn.dropout, rnn.bidirectional
    )
    first = next(rnn.parameters())
    stack = stack.to(device=first.device, dtype=first.dtype)
    with torch.no_grad():
        for name, given in rnn.named_parameters():
            kind, _, place = name.rpartition("_l")
            layer, _, reverse = place.partition("_")
            direction = "back" if reverse else "ahead"
            stack.get_parameter(f"layers.{layer}.{direction}.rnn.{kind}_l0").copy_(given)
    return stack.train(rnn.training)


def _castable(x: Tensor) -> Tensor:
    """`x` in a format that the weights' kernel takes: autocast casts it down again where it is on."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _MinCell(Cell):
    """One projection of the input and one scan: no weights between time steps, and no padding anywhere."""

    packed = True

    def __init__(
        self,
        input_size: int,
        *,
        hidden_size: int,
        bias: bool,
        form: GateForm,
        candidate: str = "g",
        expansion: float = 1.0,
    ) -> None:
        super().__init__()
        if candidate not in Candidate.__members__:
            raise ConfigError(f"candidate: got {candidate!r}, expected one of {', '.join(Candidate.__members__)}")
        self.state_size = round(hidden_size * expansion)
        if self.state_size < 1:
            raise ConfigError(f"expansion: got {expansion} of {hidden_size} units, expected at least one unit")
        self.output_size = hidden_size
        self.options = ScanOptions(form=form, candidate=Candidate[candidate])
        self.project = nn.Linear(input_size, form.num_gates * self.state_size, bias=bias)
        self.out = nn.Linear(self.state_size, hidden_size, bias=False) if expansion != 1.0 else None

    def forward(self, x: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        with low_precision_where_fast(x) as dtype:
            pre_NG = self.project(x.to(dtype))
        h_NH, last_SH = gated_scan(
            pre_NG.to(stored_dtype(x)),
            state["h"],
            reading.rows,
            replace(self.options, reverse=reading.reverse),
            starts_N=reading.starts_N,
            reset_H=None if reading.reset is None else reading.reset["h"][0],
            decay_NH=reading.decay,
        )
        return self._output(h_NH), {"h": last_SH} if reading.final_state else {}

    def _output(self, h: Tensor) -> Tensor:
        if self.out is None:
            return h
        with low_precision_where_fast(h) as dtype:
            return self.out(h.to(dtype))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        with low_precision_where_fast(x_BD) as dtype:
            pre_BG = self.project(x_BD.to(dtype))
        h_BH = gated_step(pre_BG.to(stored_dtype(x_BD)), state["h"], self.options)
        return self._output(h_BH.to(stored_dtype(x_BD))), {"h": h_BH}


class _MinGruCell(_MinCell):
    def __init__(self, input_size: int, **options: Any) -> None:
        super().__init__(input_size, form=GateForm.mingru, **options)


class _MinLstmCell(_MinCell):
    def __init__(
        self, input_size: int, *, normalize_gates: bool = True, forget_bias: float = 0.0, bias: bool, **options: Any
    ) -> None:
        form = GateForm.minlstm if normalize_gates else GateForm.minlstm_raw
        super().__init__(input_size, form=form, bias=bias, **options)
        if forget_bias and bias:
            with torch.no_grad():
                self.project.bias[: self.state_size] += forget_bias


class RNN(RecurrentStack):
    """Elman's recurrence, h' = tanh(W x + U h + b).

    Args:
        nonlinearity: "tanh" or "relu"; the others are RecurrentStack's.
    """

    cell_type = _RnnCell


class LSTM(RecurrentStack):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates), torch's equations."""

    cell_type = _LstmCell


class GRU(RecurrentStack):
    """Gated recurrent units (Cho et al. 2014), torch's equations."""

    cell_type = _GruCell


class MinGRU(RecurrentStack):
    """GRU whose gate and candidate see only the input: h' = h + z (g(x) - h).

    Source: Feng et al. 2024, arXiv 2410.01201, section 3.1. The paper's block is `norm=True, residual=True` with, where
    wanted, `conv_size=4` and `mlp_factor=4`.

    Args:
        candidate: "g" (x + 0.5 from 0 on, sigmoid(x) below; the published code's), "tanh" or "identity".
        expansion: width of the state in hidden sizes; other than 1, a projection leads back to the hidden size.
    """

    cell_type = _MinGruCell


class MinLSTM(RecurrentStack):
    """LSTM whose gates and candidate see only the input.

    Source: Feng et al. 2024, arXiv 2410.01201, section 3.2.

    Args:
        normalize_gates: divide the forget and input gates by their sum, as the published equations
            do; False keeps them as they are, as the published code does unless told otherwise.
        forget_bias: added to the initial bias of the forget gate, so that the state begins by remembering.
        candidate, expansion: as in `MinGRU`.
    """

    cell_type = _MinLstmCell
