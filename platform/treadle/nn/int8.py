"""Linear and recurrent layers with int8 weights, for inference on the CPU.

Shape letters: N frames of all rows laid end to end, S or B rows, K inputs, G outputs, H hidden.

Each output's weights share one scale, and each frame is rounded to int8 by its own largest value when it is read.
So what comes of a frame depends on no other frame's values: a row alone, in company, in pieces or step by step gives
the same. Gates and states are fp32.

int8.c does the work, compiled like the gated scan's kernel. Without it, plain torch gives the same numbers to
rounding, slower than fp32 layers.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle import native
from treadle.errors import ConfigError
from treadle.nn.cell import Cell, Reading, State
from treadle.nn.rows import Rows

__all__ = ["Int8Cell", "Int8Embedding", "Int8Linear", "Recurrence", "kernel_status", "round_rows"]

_SOURCE = Path(__file__).with_name("int8.c")
_QUAD, _LANES = 4, 8  # of int8.c
_logger = logging.getLogger(__name__)


class Recurrence(enum.Enum):
    """The recurrences of int8.c, by its codes."""

    rnn_tanh = 0
    rnn_relu = 1
    lstm = 2
    gru = 3


def round_rows(weight_GK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and the scale of each row: weight = int8 * scale, to half a scale."""
    scale_G = weight_GK.detach().float().abs().amax(1) / 127
    divisor_G = torch.where(scale_G > 0, scale_G, 1.0)
    return (weight_GK.detach().float() / divisor_G[:, None]).round().to(torch.int8), scale_G


def _to_panels(int8_GK: Tensor) -> Tensor:
    """[panels, quads, lanes, 4]: the layout in which int8.c reads weights."""
    num_outputs, num_inputs = int8_GK.shape
    whole = functional.pad(int8_GK, (0, -num_inputs % _QUAD, 0, -num_outputs % _LANES))
    return whole.view(-1, _LANES, whole.shape[1] // _QUAD, _QUAD).transpose(1, 2).contiguous()


def _of_panels(panels: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    whole = panels.transpose(1, 2).reshape(panels.shape[0] * _LANES, -1)
    return whole[:num_outputs, :num_inputs].contiguous()


class Int8Linear(nn.Module):
    """`nn.Linear` with int8 weights; gives fp32. Its state dict holds int8 [G, K], scale [G] and bias [G].

    Args:
        linear_weight: [G, K], to be rounded.
        bias: [G], or None.
    """

    panels: Tensor

    def __init__(self, linear_weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = linear_weight.shape
        int8_GK, scale_G = round_rows(linear_weight)
        self.register_buffer("panels", _to_panels(int8_GK))
        self.scale = nn.Parameter(scale_G, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.register_state_dict_post_hook(_write_plain)
        self.register_load_state_dict_pre_hook(_read_plain)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        return cls(linear.weight, linear.bias)

    @property
    def int8_GK(self) -> Tensor:
        """The weights as whole numbers."""
        return _of_panels(self.panels, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The scales, [G, 1]: fp32 and in the layer's place, which is what others ask a layer's weight for.

        Not the weights: making those anew at each question would cost more than the layer. See `dequantised`.
        """
        return self.scale[:, None]

    def dequantised(self) -> Tensor:
        """The weights that the whole numbers stand for, fp32."""
        return self.int8_GK.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        _check(x)
        x_NK = x.detach().float().reshape(-1, self.in_features).contiguous()
        kernel = _kernel()
        if kernel is None:
            y_NG = _linear(x_NK, self.int8_GK, self.scale, self.bias)
        else:
            y_NG = x_NK.new_empty(x_NK.shape[0], self.out_features)
            tensors = (x_NK, self.panels, self.scale, self.bias, y_NG)
            sizes = (x_NK.shape[0], self.in_features, self.out_features, torch.get_num_threads())
            _call(kernel.treadle_int8_linear, tensors, sizes)
        return y_NG.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def _write_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    del state_dict[f"{prefix}panels"]
    state_dict[f"{prefix}int8"] = cast("Int8Linear", module).int8_GK


def _read_plain(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}int8" in state_dict:
        state_dict[f"{prefix}panels"] = _to_panels(state_dict.pop(f"{prefix}int8"))


class Int8Embedding(nn.Module):
    """`nn.Embedding` with int8 vectors; gives fp32."""

    int8: Tensor

    def __init__(self, vectors_VE: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = vectors_VE.shape
        int8_VE, scale_V = round_rows(vectors_VE)
        self.register_buffer("int8", int8_VE)
        self.scale = nn.Parameter(scale_V, requires_grad=False)

    def dequantised(self) -> Tensor:
        """The vectors that the whole numbers stand for, fp32."""
        return self.int8.float() * self.scale[:, None]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.int8[tokens].float() * self.scale[tokens][..., None]


class Int8Cell(Cell):
    """RNN, LSTM or GRU with int8 weights. It takes packed frames, restarts and decay as the others do.

    Args:
        kind: which recurrence.
        rnn: torch's layer whose weights to round; of one layer and one direction.
    """

    packed = True

    def __init__(self, kind: Recurrence, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.kind = kind
        self.state_size = self.output_size = size = rnn.hidden_size
        w_ih, w_hh, *biases = rnn.parameters()
        from_x = sum(biases[1:], start=biases[0]) if biases else None
        from_h = None
        if biases and kind is Recurrence.gru:  # its candidate's own bias stands inside the product with the reset gate
            from_h = functional.pad(biases[1][2 * size :], (2 * size, 0))
            from_x = biases[0] + biases[1] - from_h
        self.from_x, self.from_h = Int8Linear(w_ih, from_x), Int8Linear(w_hh, from_h)

    @property
    def weight(self) -> Tensor:
        return self.from_x.weight

    @staticmethod
    def of(kind: Recurrence, rnn: nn.RNNBase) -> Int8Cell:
        return (_Int8LstmCell if kind is Recurrence.lstm else Int8Cell)(kind, rnn)

    def forward(self, x: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        _check(x)
        if tuple(x.shape[:-1]) != (reading.rows.num_frames,):
            raise ConfigError(f"x: got shape {tuple(x.shape)}, expected {reading.rows.num_frames} packed frames")
        y_NH, last = self._run(self.from_x(x), {name: part.contiguous() for name, part in state.items()}, reading)
        return y_NH, last if reading.final_state else {}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        return self(x_BD, state, Reading(rows=Rows.full(x_BD.shape[0], 1, x_BD.device)))

    def _run(self, pre_NG: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        rows, reset = reading.rows, reading.reset or {}
        decay_NH = None if reading.decay is None else reading.decay.float().contiguous()
        kernel = _kernel()
        if kernel is None:
            return self._run_in_torch(pre_NG, state, reading)
        y_NH = pre_NG.new_empty(pre_NG.shape[0], self.state_size)
        last = {name: torch.empty_like(part) for name, part in state.items()}
        # A row of full batches is as long as any; else the longest first, so that fewer and fewer rows go on.
        order_S = torch.arange(rows.num_rows) if rows.is_full else rows.lengths_S.argsort(descending=True)
        starts_N = None if reading.starts_N is None else reading.starts_N.contiguous()
        resets = {name: part.detach().contiguous() for name, part in reset.items()}
        tensors = (
            *(pre_NG, self.from_h.panels, self.from_h.scale, self.from_h.bias, state["h"], state.get("c")),
            *(rows.offsets, starts_N, resets.get("h"), resets.get("c"), decay_NH),
            *(y_NH, last["h"], last.get("c"), order_S),
        )
        sizes = (rows.num_rows, self.state_size, pre_NG.shape[1], self.kind.value, reading.reverse)
        _call(kernel.treadle_int8_recurrence, tensors, (*sizes, torch.get_num_threads()))
        return y_NH, last

    def _run_in_torch(self, pre_NG: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        """What int8.c does, row by row."""
        y_NH = pre_NG.new_empty(pre_NG.shape[0], self.state_size)
        ends: list[State] = []
        int8_GH = self.from_h.int8_GK
        for row, (begin, end) in enumerate(zip(reading.rows.offsets[:-1], reading.rows.offsets[1:], strict=True)):
            now = {name: part[row : row + 1] for name, part in state.items()}
            frames = range(int(begin), int(end))
            for n in reversed(frames) if reading.reverse else frames:
                now = _met(now, n, reading)
                from_h = _linear(now["h"], int8_GH, self.from_h.scale, self.from_h.bias)
                now = _gates(self.kind, pre_NG[n : n + 1], from_h, now)
                y_NH[n] = now["h"][0]
            ends.append(now)
        return y_NH, {name: torch.cat([end[name] for end in ends]) for name in state}


class _Int8LstmCell(Int8Cell):
    state_names = ("h", "c")


def _met(state: State, n: int, reading: Reading) -> State:
    """The state that frame n meets."""
    if reading.starts_N is not None and bool(reading.starts_N[n]):
        reset = reading.reset or {}
        return {name: reset.get(name, torch.zeros_like(part)) for name, part in state.items()}
    return state if reading.decay is None else {name: part * reading.decay[n] for name, part in state.items()}


def _gates(kind: Recurrence, from_x: Tensor, from_h: Tensor, state: State) -> State:
    if kind is Recurrence.lstm:
        i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
        c = torch.sigmoid(f) * state["c"] + torch.sigmoid(i) * torch.tanh(g)
        return {"h": torch.sigmoid(o) * torch.tanh(c), "c": c}
    if kind is Recurrence.gru:
        (rx, zx, nx), (rh, zh, nh) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
        candidate = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return {"h": candidate + torch.sigmoid(zx + zh) * (state["h"] - candidate)}
    return {"h": torch.tanh(from_x + from_h) if kind is Recurrence.rnn_tanh else torch.relu(from_x + from_h)}


def _linear(x_NK: Tensor, int8_GK: Tensor, scale_G: Tensor, bias_G: Tensor | None) -> Tensor:
    """What int8.c does: sums of whole numbers are exact in float64."""
    most_N1 = x_NK.abs().amax(1, keepdim=True)
    factor_N1 = torch.full_like(most_N1, 127.0) / most_N1
    usable_N1 = (factor_N1 <= 3e38) & most_N1.isfinite()
    rounded_NK = (x_NK * factor_N1).round().masked_fill(~usable_N1, 0.0)
    undo_N1 = torch.where(usable_N1, most_N1 / 127, torch.where(most_N1.isfinite(), 0.0, torch.nan))
    y_NG = (rounded_NK.double() @ int8_GK.double().T).float() * (undo_N1 * scale_G)
    return y_NG if bias_G is None else y_NG + bias_G


def _check(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ConfigError(f"x: got a tensor on {x.device}, expected the CPU: int8 weights are for inference there")
    if x.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            "x: got one that asks for a gradient, expected none: int8 weights have none to give",
            hint="run under torch.inference_mode(), or train the original",
        )


# ---- the kernel ----


def kernel_status() -> native.NativeStatus:
    """Whether int8.c is used, and why."""
    kernel, detail = _found()
    return native.NativeStatus(available=kernel is not None, detail=detail)


def _kernel() -> Any:
    return _found()[0]


@functools.cache
def _found() -> tuple[Any, str]:
    kernel, detail = native.find(native.folders(), native.COMPILERS, _SOURCE, _CHECK)
    if kernel is None:
        _logger.info("int8 layers run in plain torch: %s", detail)
        return None, detail
    return kernel.library, detail


def _call(function: Any, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    words = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    words += [int(size) for size in sizes]
    if function((ctypes.c_int64 * len(words))(*words)):
        raise MemoryError("int8 layer: no memory for the rounded frames of a block")


# Without torch, whose import takes a second. Inputs that fill no vector, and every recurrence.
_CHECK = """
import ctypes, math, sys
kernel = ctypes.CDLL(sys.argv[1])
def call(function, *words):
    here = [0 if w is None else w if isinstance(w, int) else ctypes.addressof(w) for w in words]
    assert function((ctypes.c_int64 * len(here))(*here)) == 0
def floats(values):
    return (ctypes.c_float * len(values))(*values)
def panels(rows, K):
    G, width = len(rows), -(-K // 4) * 4
    at = lambda g, k: rows[g][k] if g < G and k < K else 0
    flat = [at(p + j, k + i) for p in range(0, G, 8) for k in range(0, width, 4) for j in range(8) for i in range(4)]
    return (ctypes.c_int8 * len(flat))(*flat)
def product(x, rows, scales):
    most = max(map(abs, x))
    q = [round(v * 127 / most) if most else 0 for v in x]
    return [sum(map(int.__mul__, q, row)) * most / 127 * s for row, s in zip(rows, scales)]
def whole(G, K):
    return [[round(127 * math.sin(1 + 7 * g + 3 * k)) for k in range(K)] for g in range(G)]
for N, K, G in ((3, 37, 45), (1, 4, 8)):
    rows, scales, bias = whole(G, K), floats([0.01] * G), floats([0.5] * G)
    x, y = [[math.sin(n * K + k) for k in range(K)] for n in range(N)], (ctypes.c_float * (N * G))()
    call(kernel.treadle_int8_linear, floats(sum(x, [])), panels(rows, K), scales, bias, y, N, K, G, 1)
    for n in range(N):
        for g, v in enumerate(product(x[n], rows, scales)):
            assert abs(y[n * G + g] - v - 0.5) < 1e-4 * (1 + abs(v)), "wrong product"
sigmoid = lambda v: 1 / (1 + math.exp(-v))
H, T = 11, 4
for kind, gates in enumerate((1, 1, 4, 3)):
    G = gates * H
    rows, scales = whole(G, H), floats([0.004] * G)
    pre, offsets, order = floats([math.sin(i) for i in range(T * G)]), (ctypes.c_int64 * 2)(0, T), ctypes.c_int64()
    h, c, y, last = [0.25] * H, [0.5] * H, (ctypes.c_float * (T * H))(), [(ctypes.c_float * H)() for _ in range(2)]
    tensors = (pre, panels(rows, H), scales, None, floats(h), floats(c), offsets, None, None, None, None, y, *last)
    call(kernel.treadle_int8_recurrence, *tensors, order, 1, H, G, kind, 0, 1)
    for t in range(T):
        more = product(h, rows, scales)
        for j in range(H):
            x = [pre[t * G + g * H + j] for g in range(gates)]
            p = [x[g] + more[g * H + j] for g in range(gates)]
            if kind < 2:
                h[j] = math.tanh(p[0]) if kind == 0 else max(p[0], 0)
            elif kind == 2:
                c[j] = sigmoid(p[1]) * c[j] + sigmoid(p[0]) * math.tanh(p[2])
                h[j] = sigmoid(p[3]) * math.tanh(c[j])
            else:
                new = math.tanh(x[2] + sigmoid(p[0]) * more[2 * H + j])
                h[j] = new + sigmoid(p[1]) * (h[j] - new)
            assert abs(y[t * H + j] - h[j]) < 1e-3, "wrong state"
    assert all(abs(last[0][j] - h[j]) < 1e-3 for j in range(H)), "wrong last state"
"""
