"""The five recurrent layers, one signature: drop-ins for `torch.nn.GRU`.

Shape letters: B rows, T time steps, D features, H hidden, G gates * H.

RNN, LSTM and GRU run torch's fused kernels (oneDNN, cuDNN) over padded rows, one layer and one
direction at a time. MinGRU and MinLSTM are one projection and one `gated_scan`.

Initial weights: recurrent matrices orthogonal, gate by gate (Saxe et al. 2014, arXiv 1312.6120),
input matrices Glorot uniform, gate by gate, biases 0 but the LSTM's forget gate 1 (Jozefowicz et
al. 2015). The projections of MinGRU and MinLSTM start as `torch.nn.Linear` does, like the published
code's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.nn.rows import Rows
from treadle.nn.scan import GateForm, gated_scan, gated_step
from treadle.nn.stack import Cell, RecurrentStack, State

__all__ = ["GRU", "LSTM", "RNN", "MinGRU", "MinLSTM"]


class _KernelCell(Cell):
    """One of torch's recurrent kernels: a single layer in one direction."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        for name, parameter in rnn.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
                continue
            for gate in parameter.data.split(rnn.hidden_size):
                (nn.init.orthogonal_ if "weight_hh" in name else nn.init.xavier_uniform_)(gate)

    def _weights(self) -> tuple[Tensor, ...]:
        """w_ih, w_hh and, with biases, b_ih, b_hh."""
        return tuple(self.rnn.parameters())

    def forward(self, x_BTD: Tensor, state: State, rows: Rows | None, *, final_state: bool) -> tuple[Tensor, State]:
        h_BTH, h_last_LBH = self.rnn(x_BTD, state["h"][None])
        if not final_state:
            return h_BTH, {}
        last_BH = h_last_LBH[0] if rows is None else rows.last(h_BTH)
        return h_BTH, {"h": last_BH.to(state["h"].dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        with torch.autocast(x_BD.device.type, enabled=False):
            h_BH = self._step(x_BD.to(state["h"].dtype), state["h"])
        return h_BH, {"h": h_BH}

    def _step(self, x_BD: Tensor, h_BH: Tensor) -> Tensor:
        raise NotImplementedError


class _RnnCell(_KernelCell):
    def __init__(self, input_size: int, *, hidden_size: int, bias: bool, nonlinearity: str = "tanh") -> None:
        super().__init__(nn.RNN(input_size, hidden_size, bias=bias, batch_first=True, nonlinearity=nonlinearity))
        self._step_function = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}[nonlinearity]

    def _step(self, x_BD: Tensor, h_BH: Tensor) -> Tensor:
        return self._step_function(x_BD, h_BH, *self._weights())


class _GruCell(_KernelCell):
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

    def forward(self, x_BTD: Tensor, state: State, rows: Rows | None, *, final_state: bool) -> tuple[Tensor, State]:
        hx = (state["h"][None], state["c"][None])
        device = x_BTD.device.type
        if torch.is_autocast_enabled(device) and not _autocast_lstm_works(device, torch.get_autocast_dtype(device)):
            with torch.autocast(device, enabled=False):
                h_BTH, ends = self.rnn(x_BTD.to(state["h"].dtype), hx)
        else:
            h_BTH, ends = self.rnn(x_BTD, hx)
        if not final_state:
            return h_BTH, {}
        dtype = state["h"].dtype
        if rows is None:
            return h_BTH, {"h": ends[0][0].to(dtype), "c": ends[1][0].to(dtype)}
        with torch.autocast(device, enabled=False):
            c_BH = self._last_c(x_BTD.to(dtype), h_BTH.to(dtype), state, rows)
        return h_BTH, {"h": rows.last(h_BTH).to(dtype), "c": c_BH}

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
        h_BH, c_BH = state["h"], state["c"]
        with torch.autocast(x_BD.device.type, enabled=False):
            h_BH, c_BH = torch.lstm_cell(x_BD.to(h_BH.dtype), (h_BH, c_BH), *self._weights())
        return h_BH, {"h": h_BH, "c": c_BH}


@functools.cache
def _autocast_lstm_works(device: str, dtype: torch.dtype) -> bool:
    """Whether the LSTM kernel runs in `dtype` here; oneDNN has none for bf16 on CPUs without AVX-512."""
    if device != "cpu":
        return True
    try:
        # Not nn.LSTM(1, 1), whose initial weights would take numbers from the run's random stream.
        one = torch.zeros(1, 1, 1)
        with torch.autocast(device, dtype=dtype):
            weights = [torch.zeros(4, 1)] * 2 + [torch.zeros(4)] * 2
            torch.lstm(one, (one, one), weights, True, 1, 0.0, True, False, True)
    except RuntimeError:
        return False
    return True


class _MinCell(Cell):
    """One projection of the input and one scan: no weights between time steps."""

    def __init__(self, input_size: int, *, hidden_size: int, bias: bool, form: GateForm) -> None:
        super().__init__()
        self.form = form
        self.project = nn.Linear(input_size, form.num_gates * hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor, state: State, rows: Rows | None, *, final_state: bool) -> tuple[Tensor, State]:
        h_BTH, last_BH = gated_scan(self.project(x_BTD), state["h"], form=self.form, rows=rows)
        return h_BTH, {"h": last_BH} if final_state else {}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        h_BH = gated_step(self.project(x_BD), state["h"], form=self.form)
        return h_BH, {"h": h_BH}


class _MinGruCell(_MinCell):
    def __init__(self, input_size: int, *, hidden_size: int, bias: bool) -> None:
        super().__init__(input_size, hidden_size=hidden_size, bias=bias, form=GateForm.mingru)


class _MinLstmCell(_MinCell):
    def __init__(self, input_size: int, *, hidden_size: int, bias: bool, normalize_gates: bool = True) -> None:
        form = GateForm.minlstm if normalize_gates else GateForm.minlstm_raw
        super().__init__(input_size, hidden_size=hidden_size, bias=bias, form=form)


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

    Source: Feng et al. 2024, arXiv 2410.01201, section 3.1.
    """

    cell_type = _MinGruCell


class MinLSTM(RecurrentStack):
    """LSTM whose gates and candidate see only the input.

    Source: Feng et al. 2024, arXiv 2410.01201, section 3.2.

    Args:
        normalize_gates: divide the forget and input gates by their sum, as the published equations
            do; False keeps them as they are, as the published code does unless told otherwise.
    """

    cell_type = _MinLstmCell
