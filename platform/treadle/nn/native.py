"""The gated scan of the CPU: scan.c, compiled on this machine when it is first needed.

Shape letters: S rows, H hidden, G = H * gates of the form, N frames of all rows laid end to end.

`treadle.native` says how it is compiled and where it is kept. Where no object can be had, `load` gives None and
`status` says why.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch  # before any object is loaded: it brings the OpenMP runtime that the object then shares
from torch import Tensor

from treadle import native
from treadle.native import Kernel, NativeStatus

__all__ = ["SELF_CHECK", "SOURCE", "Kernel", "NativeStatus", "backward", "forward", "load", "status", "supports"]

SOURCE = Path(__file__).with_name("scan.c")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_logger = logging.getLogger(__name__)


def supports(dtype: torch.dtype) -> bool:
    """True where the compiled scan can be had and computes in `dtype`."""
    return dtype in _DTYPES and load() is not None


def load() -> Kernel | None:
    """The compiled scan, built if need be; None where it cannot be had.

    Cost: a compilation the first time on a machine; milliseconds once a process after that.
    """
    return _found()[0]


def status() -> NativeStatus:
    """Whether the compiled scan is used, and why."""
    kernel, detail = _found()
    return NativeStatus(available=kernel is not None, detail=detail)


def forward(
    pre_NG: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    form: int,
    candidate: int,
    reverse: bool,
    _max_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """h_NH and the state after each row's last frame; `treadle.nn.loop.forward` says what the arguments are."""
    h_NH = pre_NG.new_empty(pre_NG.shape[0], h0_SH.shape[1])
    last_SH = torch.empty_like(h0_SH)
    tensors = (pre_NG, h0_SH, offsets, starts_N, reset_H, decay_NH, h_NH, last_SH, *(None,) * 7)
    _call("treadle_scan_forward", tensors, form, candidate, reverse)
    return h_NH, last_SH


def backward(
    grad_h_NH: Tensor,
    grad_last_SH: Tensor,
    pre_NG: Tensor,
    h_NH: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    form: int,
    candidate: int,
    reverse: bool,
    _max_length: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dpre_NG, dh0_SH, dreset_H, ddecay_NH), the last two None where there was no such input."""
    dpre_NG, dh0_SH = torch.empty_like(pre_NG), torch.empty_like(h0_SH)
    dreset_SH = None if reset_H is None else torch.empty_like(h0_SH)
    dreset_H = None if reset_H is None else torch.empty_like(reset_H)
    ddecay_NH = None if decay_NH is None else torch.empty_like(decay_NH)
    inputs = (pre_NG, h0_SH, offsets, starts_N, reset_H, decay_NH, h_NH, None, grad_h_NH, grad_last_SH)
    tensors = (*inputs, dpre_NG, dh0_SH, dreset_SH, dreset_H, ddecay_NH)
    _call("treadle_scan_backward", tensors, form, candidate, reverse)
    return dpre_NG, dh0_SH, dreset_H, ddecay_NH


def _call(name: str, tensors: Sequence[Tensor | None], form: int, candidate: int, reverse: bool) -> None:
    kernel = load()
    if kernel is None:
        raise RuntimeError("the compiled scan is not available: ask supports() first")
    pre_NG, h0_SH = tensors[0], tensors[1]
    assert pre_NG is not None
    assert h0_SH is not None
    words = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    words += [*h0_SH.shape, _DTYPES[pre_NG.dtype], form, candidate, int(reverse), torch.get_num_threads()]
    getattr(kernel.library, name)((ctypes.c_int64 * len(words))(*words))


@functools.cache
def _found() -> tuple[Kernel | None, str]:
    kernel, detail = native.find(native.folders(), native.COMPILERS, SOURCE, SELF_CHECK)
    if kernel is None:
        _logger.info("the gated scan runs as a plain torch loop: %s", detail)
    return kernel, detail


# Run on every new object, without torch, whose import takes a second: every format, form and candidate, and a number
# of channels that no vector divides.
SELF_CHECK = """
import ctypes, itertools, math, struct, sys
scan = ctypes.CDLL(sys.argv[1])
H, T = 37, 3
sigmoid = lambda v: 1 / (1 + math.exp(-v))
candidates = (lambda v: v + 0.5 if v >= 0 else sigmoid(v), math.tanh, lambda v: v)
bits = lambda v: struct.unpack("<I", struct.pack("<f", v))[0] >> 16
value = lambda b: struct.unpack("<f", struct.pack("<I", b << 16))[0]
same = lambda v: v
f4, f8 = ctypes.c_float, ctypes.c_double
formats = ((f4, f4, same, same, 1e-5), (ctypes.c_uint16, f4, bits, value, 2e-2), (f8, f8, same, same, 1e-12))
for (dtype, form, which) in itertools.product(range(3), range(3), range(3)):
    stored, real, store, load, close = formats[dtype]
    G = (2 if form == 0 else 3) * H
    pre = (stored * (T * G))(*(store(3 * math.sin(1 + 7 * i)) for i in range(T * G)))
    ones, h0, dh0, last = ((real * H)(*[v] * H) for v in (1.0, 0.25, 0.0, 0.0))
    h, zeros, dpre = (stored * (T * H))(), (stored * (T * H))(), (stored * (T * G))()
    offsets = (ctypes.c_int64 * 2)(0, T)
    tensors = (pre, h0, offsets, None, None, None, h, last, zeros, ones, dpre, dh0, None, None, None)
    addresses = (0 if tensor is None else ctypes.addressof(tensor) for tensor in tensors)
    words = (ctypes.c_int64 * 22)(*addresses, 1, H, dtype, form, which, 0, 1)
    scan.treadle_scan_forward(words)
    scan.treadle_scan_backward(words)
    for j in range(H):
        state, slope = 0.25, 1.0
        for t in range(T):
            *shares, x = (load(pre[t * G + k * H + j]) for k in range(G // H))
            shares = [sigmoid(v) for v in shares]
            keep, take = (1 - shares[0], shares[0]) if form == 0 else shares
            if form == 1:
                keep, take = keep / (keep + take), take / (keep + take)
            state, slope = keep * state + take * candidates[which](x), slope * keep
            assert abs(load(h[t * H + j]) - state) < close, "wrong state"
        assert abs(last[j] - state) < close and abs(dh0[j] - slope) < close, "wrong last state or gradient"
    assert all(math.isfinite(load(v)) for v in dpre), "a gradient is not finite"
"""
