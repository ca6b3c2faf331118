"""The gated linear recurrence that minGRU and minLSTM share: one operator, three back ends.

Shape letters: B or S rows, H hidden, G = H * gates of the form, N frames of all rows laid end to end.

The state runs in linear space and in fp32 whatever the precision around it: the share kept of
it lies in (0, 1), so the recurrence is stable as it stands, and log space would only be needed by
a cumulative sum. Every back end must agree with a float64 loop over the time steps
(tests/unit/nn/test_scan.py): Triton on CUDA, a C kernel on the CPU, plain torch where neither is.

`treadle::gated_scan` is registered with torch, so that `torch.compile` and `torch.export` keep it whole.
It saves pre-activations and outputs for the backward pass, nothing else of the size of the frames.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.nn import loop, native
from treadle.nn.autocast import without_autocast
from treadle.nn.gates import ScanOptions, gates, state_dtype
from treadle.nn.rows import Rows

__all__ = ["ScanBackend", "gated_scan", "gated_step", "scan_backends"]


def gated_scan(
    pre_NG: Tensor,
    h0_SH: Tensor,
    rows: Rows,
    options: ScanOptions,
    *,
    starts_N: Tensor | None = None,
    reset_H: Tensor | None = None,
    decay_NH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The state after every frame, and after the last frame that is read of every row.

    Source: Feng et al. 2024, arXiv 2410.01201, sections 3.1 and 3.2, in their sequential form.

    Args:
        pre_NG: pre-activations, the gates side by side as the form lists them.
        h0_SH: state before each row's first frame.
        rows: where rows begin.
        options: how gates become the recurrence, and in which direction rows are read.
        starts_N: True where the state restarts before the frame is read.
        reset_H: what it restarts from; zeros when not given.
        decay_NH: in [0, 1], what is left of the state when the frame is read; not applied where it restarts.

    Returns:
        h_NH in the format of `pre_NG`, and the last state [S, H] in the state's format.

    Cost: one pass over `pre_NG` and h forward, two backward; 3 numbers saved per frame and channel by minGRU, 4 by
    minLSTM.
    """
    dtype = state_dtype(pre_NG.dtype)
    with without_autocast(pre_NG):
        return torch.ops.treadle.gated_scan(
            pre_NG.contiguous(),
            h0_SH.to(dtype).contiguous(),
            rows.offsets,
            None if starts_N is None else starts_N.contiguous(),
            None if reset_H is None else reset_H.to(dtype).contiguous(),
            None if decay_NH is None else decay_NH.to(pre_NG.dtype).contiguous(),
            options.form.value,
            options.candidate.value,
            options.reverse,
            rows.known_num_steps,
        )


def gated_step(pre_BG: Tensor, h_BH: Tensor, options: ScanOptions) -> Tensor:
    """The state one time step after `h_BH`: `gated_scan` of rows of a single frame."""
    with without_autocast(pre_BG):
        if _backend(pre_BG) is loop:  # whose bookkeeping for many frames costs more than one frame
            a_BH, b_BH = gates(pre_BG, options)
            return torch.addcmul(b_BH, a_BH, h_BH.to(a_BH.dtype))
        rows = Rows.full(pre_BG.shape[0], 1, pre_BG.device)
        return gated_scan(pre_BG, h_BH, rows, options)[1]


@dataclass(frozen=True, kw_only=True)
class ScanBackend:
    """What runs the scan on a kind of device here.

    Args:
        device: "cpu" or "cuda".
        fused: whether it is a fused kernel; the loop of torch operations is about twice as slow.
        detail: which one, or why only the loop.
    """

    device: str
    fused: bool
    detail: str


def scan_backends() -> list[ScanBackend]:
    """What runs the scan on the CPU and, where there is one, on the GPU. Builds the CPU's kernel when first asked."""
    status = native.status()
    found = [ScanBackend(device="cpu", fused=status.available, detail=status.detail)]
    if torch.cuda.is_available():
        triton_scan = _triton()
        fused, detail = (False, "triton is not installed") if triton_scan is None else triton_scan.available()
        found.append(ScanBackend(device="cuda", fused=fused, detail=detail))
    return found


_ARGUMENTS = "Tensor pre, Tensor h0, Tensor offsets, Tensor? starts, Tensor? reset, Tensor? decay"
_OPTIONS = "int form, int candidate, bool reverse, int max_length"
_library = torch.library.Library("treadle", "DEF")
_library.define(f"gated_scan({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"gated_scan_backward(Tensor grad_h, Tensor grad_last, Tensor h, {_ARGUMENTS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def _cpu_kernel(dtype: torch.dtype) -> bool:
    return native.supports(dtype)


@functools.cache
def _triton() -> Any:
    """The module of CUDA kernels, or None; imported late, since it takes a second and few machines have it."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("treadle.nn.triton_scan")


def _backend(pre_NG: Tensor) -> Any:
    """What runs a scan of `pre_NG`: a module with `forward` and `backward`."""
    if pre_NG.device.type == "cpu" and _cpu_kernel(pre_NG.dtype):
        return native
    if pre_NG.device.type == "cuda" and (triton_scan := _triton()) is not None and triton_scan.available()[0]:
        return triton_scan
    return loop


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _backend(args[0]).forward(*args)


def _backward(grad_h: Tensor, grad_last: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    pre, *tensors = args[:6]
    grads = _backend(pre).backward(grad_h.contiguous(), grad_last.contiguous(), pre, h, *tensors, *args[6:])
    return tuple(pre.new_empty(0) if grad is None else grad for grad in grads)


def _fake_forward(pre: Tensor, h0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape[0], h0.shape[1]), torch.empty_like(h0)


def _fake_backward(_grad_h: Tensor, _grad_last: Tensor, _h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    pre, h0, _offsets, _starts, reset, decay = args[:6]
    nothing = pre.new_empty(0)
    optional = (nothing if like is None else torch.empty_like(like) for like in (reset, decay))
    return torch.empty_like(pre), torch.empty_like(h0), *optional


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[6:]
    ctx.save_for_backward(output[0], *inputs[:6])


def _gradients(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    h, pre, h0, offsets, starts, reset, decay = ctx.saved_tensors
    if torch.is_grad_enabled():
        # The gradient will itself be differentiated: take it from the definition, in ordinary operations.
        outputs = loop.reference_scan(pre, h0, offsets, starts, reset, decay, ScanOptions.of(*ctx.options))
        wanted = [x for x in (pre, h0, reset, decay) if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, (grad_h, grad_last), create_graph=True, allow_unused=True))
        dpre, dh0, dreset, ddecay = (
            next(found) if x is not None and x.requires_grad else None for x in (pre, h0, reset, decay)
        )
    else:
        dpre, dh0, dreset, ddecay = torch.ops.treadle.gated_scan_backward(
            grad_h, grad_last, h, pre, h0, offsets, starts, reset, decay, *ctx.options
        )
        dreset = None if reset is None else dreset
        ddecay = None if decay is None else ddecay
    return dpre, dh0, None, None, dreset, ddecay, None, None, None, None


for _name, _real, _fake in (
    ("gated_scan", _forward, _fake_forward),
    ("gated_scan_backward", _backward, _fake_backward),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"treadle::{_name}", _fake, lib=_library)
torch.library.register_autograd("treadle::gated_scan", _gradients, setup_context=_save, lib=_library)
