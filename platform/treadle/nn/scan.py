"""The gated linear recurrence that minGRU and minLSTM share.

Shape letters: B rows, T time steps, H hidden, G = H * gates of the form.

The state runs in linear space and in fp32 whatever the precision around it: the share kept of
it lies in (0, 1), so the recurrence is stable as it stands, and log space would only be needed by
a cumulative sum. Every backend of `gated_scan` must agree with a float64 loop over the time steps
(tests/unit/nn/test_scan.py).
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor
from torch.nn import functional

from treadle.nn.rows import Rows

__all__ = ["GateForm", "gated_scan", "gated_step", "state_dtype"]


class GateForm(enum.Enum):
    """How pre-activations become the recurrence; the value is how many of them a hidden unit has."""

    mingru = ("mingru", 2)
    """[k, x]: h' = h + z (g(x) - h), z = sigmoid(k)."""
    minlstm = ("minlstm", 3)
    """[p_f, p_i, x]: the same with z = i / (f + i), f = sigmoid(p_f), i = sigmoid(p_i)."""
    minlstm_raw = ("minlstm_raw", 3)
    """[p_f, p_i, x]: h' = f h + i g(x)."""

    @property
    def num_gates(self) -> int:
        return self.value[1]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format of a recurrent state beside values of `dtype`: float64 beside float64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated_scan(pre_BTG: Tensor, h0_BH: Tensor, *, form: GateForm, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """The state after every time step, and after the last frame of every row.

    Source: Feng et al. 2024, arXiv 2410.01201, sections 3.1 and 3.2, in their sequential form.

    Args:
        pre_BTG: pre-activations, the gates side by side as `form` lists them.
        h0_BH: state before the first time step.
        form: how gates become the recurrence.
        rows: which slots are frames; None where all are. The state at a padded slot is finite and
            means nothing.

    Returns:
        h_BTH and h_last_BH in the state's number format.

    Cost: T small elementwise operations forward, two to three times that backward.
    """
    with torch.autocast(pre_BTG.device.type, enabled=False):
        share_BTH, value_BTH = _gates(pre_BTG, form)
        h_BH = h0_BH.to(share_BTH.dtype)
        steps: list[Tensor] = []
        # unbind, not x[:, t]: the backward of an index fills a zero tensor of the size of x at every t.
        for share_BH, value_BH in zip(share_BTH.unbind(1), value_BTH.unbind(1), strict=True):
            h_BH = _advance(h_BH, share_BH, value_BH, form)
            steps.append(h_BH)
        h_BTH = torch.stack(steps, dim=1)
        return h_BTH, h_BH if rows is None else rows.last(h_BTH)


def gated_step(pre_BG: Tensor, h_BH: Tensor, *, form: GateForm) -> Tensor:
    """The state one time step after `h_BH`: `gated_scan` of a single frame."""
    with torch.autocast(pre_BG.device.type, enabled=False):
        share_BH, value_BH = _gates(pre_BG, form)
        return _advance(h_BH.to(share_BH.dtype), share_BH, value_BH, form)


def _gates(pre: Tensor, form: GateForm) -> tuple[Tensor, Tensor]:
    """(z, g), or (f, i g) of the form whose gates do not sum to 1."""
    parts = pre.to(state_dtype(pre.dtype)).chunk(form.num_gates, dim=-1)
    x = parts[-1]
    g = torch.where(x >= 0, x + 0.5, torch.sigmoid(x))  # the published candidate, positive everywhere
    if form is GateForm.mingru:
        return torch.sigmoid(parts[0]), g
    if form is GateForm.minlstm:
        # i / (f + i) itself is 0 / 0 where both gates are shut; the difference of their logarithms is not.
        return torch.sigmoid(functional.logsigmoid(parts[1]) - functional.logsigmoid(parts[0])), g
    return torch.sigmoid(parts[0]), torch.sigmoid(parts[1]) * g


def _advance(h_BH: Tensor, share_BH: Tensor, value_BH: Tensor, form: GateForm) -> Tensor:
    if form is GateForm.minlstm_raw:
        return torch.addcmul(value_BH, share_BH, h_BH)
    return torch.lerp(h_BH, value_BH, share_BH)
