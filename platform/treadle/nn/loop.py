"""The gated scan in plain torch operations: differentiable to any order, and the back end of last resort.

Shape letters: S rows, T time steps of the longest row, H hidden, G = H * gates of the form, N frames of
all rows laid end to end.

`reference_scan` is the definition that every back end must agree with. `forward` and `backward` do the same in one
operation a time step each way, everything else at once over all frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle.nn.gates import ScanOptions, gates, pre_gradients
from treadle.nn.rows import Rows

__all__ = ["backward", "forward", "reference_scan"]


def reference_scan(
    pre_NG: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    """`treadle::gated_scan` as a graph of ordinary operations, for derivatives of any order.

    Cost: one small operation a time step, and memory for a, b and h of every slot.
    """
    a_NH, b_NH = gates(pre_NG, options)
    if decay_NH is not None:
        a_NH = a_NH * (decay_NH if starts_N is None else decay_NH.masked_fill(starts_N[:, None], 1.0))
    read = _Reading(offsets, pre_NG.shape[0], reverse=options.reverse)
    restarts = read.restarts(starts_N)
    reset = torch.zeros_like(h0_SH[0]) if reset_H is None else reset_H
    h_SH, steps = h0_SH, []
    # unbind, not x[:, t]: the backward of an index fills a zero tensor of the size of x at every t.
    for a_SH, b_SH, restart_S1 in zip(read.steps(a_NH), read.steps(b_NH), restarts, strict=True):
        # Chosen, not multiplied by 0: a restart must also end what is not a number.
        before_SH = h_SH if restart_S1 is None else torch.where(restart_S1, reset, h_SH)
        h_SH = torch.addcmul(b_SH, a_SH, before_SH)
        steps.append(h_SH)
    h_NH = read.frames(torch.stack(steps))
    return h_NH.to(pre_NG.dtype), h_NH.index_select(0, read.last_S)


def forward(
    pre_NG: Tensor,
    h0_SH: Tensor,
    offsets: Tensor,
    starts_N: Tensor | None,
    reset_H: Tensor | None,
    decay_NH: Tensor | None,
    *codes: Any,
) -> tuple[Tensor, Tensor]:
    """h_NH and the state after each row's last frame."""
    options = ScanOptions.of(*codes)
    with torch.no_grad():
        return reference_scan(pre_NG, h0_SH, offsets, starts_N, reset_H, decay_NH, options)


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
    *codes: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dpre_NG, dh0_SH, dreset_H, ddecay_NH), the last two None where there was no such input."""
    options = ScanOptions.of(*codes)
    with torch.no_grad():
        dtype = h0_SH.dtype
        starts_N1 = None if starts_N is None else starts_N[:, None]
        keep_NH, _ = gates(pre_NG, options)
        scale_NH = None if decay_NH is None else decay_NH.to(dtype)
        if scale_NH is not None and starts_N1 is not None:
            scale_NH = scale_NH.masked_fill(starts_N1, 1.0)
        a_NH = keep_NH if scale_NH is None else keep_NH * scale_NH
        read = _Reading(offsets, pre_NG.shape[0], reverse=options.reverse)
        total_NH, dh0_SH = read.totals(grad_h_NH.to(dtype), grad_last_SH, a_NH, starts_N)
        before_NH = read.before(h_NH.to(dtype), h0_SH)
        if starts_N1 is not None:
            reset = torch.zeros_like(h0_SH[0]) if reset_H is None else reset_H
            before_NH = torch.where(starts_N1, reset, before_NH)

        dkept_NH = total_NH * keep_NH  # the gradient of what the frame met, decay included
        dreset_H = ddecay_NH = None
        if reset_H is not None:
            dreset_H = torch.zeros_like(reset_H)
            if starts_N1 is not None:
                dreset_H = dkept_NH.masked_fill(~starts_N1, 0.0).sum(0)
        if scale_NH is not None:
            ddecay_NH = dkept_NH * before_NH
            if starts_N1 is not None:
                ddecay_NH = ddecay_NH.masked_fill(starts_N1, 0.0)
            ddecay_NH = ddecay_NH.to(pre_NG.dtype)
            before_NH = before_NH * scale_NH
        dpre_NG = pre_gradients(pre_NG, total_NH, before_NH, options)
        return dpre_NG.to(pre_NG.dtype), dh0_SH, dreset_H, ddecay_NH


class _Reading:
    """The order in which frames are read: the t-th of every row side by side.

    A row that has ended goes on reading its last frame; nobody looks at what comes of it.
    """

    def __init__(self, offsets: Tensor, num_frames: int, *, reverse: bool) -> None:
        rows = Rows(offsets, num_frames)
        self.num_rows, self.num_steps = rows.num_rows, rows.num_steps
        lengths_S = rows.lengths_S
        read_TS = torch.minimum(torch.arange(self.num_steps, device=offsets.device)[:, None], lengths_S - 1)
        place_N = rows.position_N
        if reverse:
            read_TS = lengths_S - 1 - read_TS
            place_N = lengths_S.index_select(0, rows.row_N) - 1 - place_N
        self._frame_M = (read_TS + offsets[:-1]).flatten()
        self._slot_N = place_N * self.num_rows + rows.row_N
        self.last_S = offsets[:-1] if reverse else rows.last_S

    def steps(self, x_NH: Tensor) -> tuple[Tensor, ...]:
        """[S, H] of every time step."""
        return self._unbound(x_NH.index_select(0, self._frame_M))

    def _unbound(self, x_MH: Tensor) -> tuple[Tensor, ...]:
        return x_MH.view(self.num_steps, self.num_rows, -1).unbind(0)

    def frames(self, x_TSH: Tensor) -> Tensor:
        """The inverse of `steps`: [N, H]."""
        return x_TSH.flatten(0, 1).index_select(0, self._slot_N)

    def before(self, h_NH: Tensor, h0_SH: Tensor) -> Tensor:
        """What stood before each frame was read: the frame read before it, or the row's h0."""
        return self.frames(torch.stack((h0_SH, *self.steps(h_NH)[:-1])))

    def restarts(self, starts_N: Tensor | None) -> tuple[Tensor | None, ...]:
        """True where a row restarts, [S, 1] of every time step; None where none does."""
        return (None,) * self.num_steps if starts_N is None else self.steps(starts_N)

    def totals(
        self, grad_NH: Tensor, grad_last_SH: Tensor, a_NH: Tensor, starts_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of every state, its own and what comes back from later frames, and that of h0."""
        grad_NH = grad_NH.index_add(0, self.last_S, grad_last_SH)
        slots_MH = grad_NH.new_zeros(self.num_steps * self.num_rows, grad_NH.shape[1])
        grads = self._unbound(slots_MH.index_copy_(0, self._slot_N, grad_NH))
        passed_SH, totals = torch.zeros_like(grad_last_SH), []
        steps = zip(grads, self.steps(a_NH), self.restarts(starts_N), strict=True)
        for grad_SH, a_SH, restart_S1 in reversed(list(steps)):
            total_SH = grad_SH + passed_SH
            passed_SH = a_SH * total_SH
            if restart_S1 is not None:
                passed_SH = passed_SH.masked_fill(restart_S1, 0.0)
            totals.append(total_SH)
        return self.frames(torch.stack(totals[::-1])), passed_SH
