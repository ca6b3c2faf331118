"""How pre-activations become a linear recurrence h' = a h + b, and the way back of their gradients.

Shape letters: H hidden, G = H * gates of the form, N frames of all rows laid end to end.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Candidate", "GateForm", "ScanOptions", "gates", "pre_gradients", "state_dtype"]


class GateForm(enum.Enum):
    """How pre-activations, side by side, become the recurrence."""

    mingru = 0
    """[k, x]: h' = h + z (g(x) - h), z = sigmoid(k)."""
    minlstm = 1
    """[p_f, p_i, x]: the same with z = i / (f + i), f = sigmoid(p_f), i = sigmoid(p_i)."""
    minlstm_raw = 2
    """[p_f, p_i, x]: h' = f h + i g(x)."""

    @property
    def num_gates(self) -> int:
        """Pre-activations that a hidden unit has."""
        return 2 if self is GateForm.mingru else 3


class Candidate(enum.Enum):
    """What x becomes before it enters the state."""

    g = 0
    """x + 0.5 from 0 on, sigmoid(x) below: the published code's, positive everywhere."""
    tanh = 1
    identity = 2
    """As the published equations have it."""


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What is fixed about a scan.

    Args:
        form: how gates become the recurrence.
        candidate: what enters the state.
        reverse: read each row from its last frame to its first.
    """

    form: GateForm
    candidate: Candidate = Candidate.g
    reverse: bool = False

    @classmethod
    def of(cls, form: int, candidate: int, reverse: bool, *_: int) -> ScanOptions:
        """From the codes that an operator of torch can take."""
        return cls(form=GateForm(form), candidate=Candidate(candidate), reverse=reverse)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format of a recurrent state beside values of `dtype`: float64 beside float64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gates(pre: Tensor, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """(a, b) of h' = a h + b for pre-activations of any leading shape, in the state's number format."""
    *shares, x = pre.to(state_dtype(pre.dtype)).chunk(options.form.num_gates, dim=-1)
    g = _candidate(x, options.candidate)
    if options.form is GateForm.minlstm_raw:
        return torch.sigmoid(shares[0]), torch.sigmoid(shares[1]) * g
    z = torch.sigmoid(_share(shares, options.form))
    return 1 - z, z * g


def pre_gradients(pre_NG: Tensor, grad_NH: Tensor, before_NH: Tensor, options: ScanOptions) -> Tensor:
    """The gradient of the pre-activations.

    Args:
        pre_NG: pre-activations.
        grad_NH: the whole gradient of the state after each frame.
        before_NH: the state that each frame met.
        options: the form and the candidate.
    """
    *shares, x = pre_NG.to(grad_NH.dtype).chunk(options.form.num_gates, dim=-1)
    g = _candidate(x, options.candidate)
    if options.form is GateForm.minlstm_raw:
        f, i = torch.sigmoid(shares[0]), torch.sigmoid(shares[1])
        grads = [grad_NH * before_NH * f * (1 - f), grad_NH * g * i * (1 - i)]
        return torch.cat((*grads, grad_NH * i * _slope(x, g, options.candidate)), dim=-1)
    z = torch.sigmoid(_share(shares, options.form))
    grad_share = grad_NH * (g - before_NH) * z * (1 - z)
    grad_x = grad_NH * z * _slope(x, g, options.candidate)
    if options.form is GateForm.mingru:
        return torch.cat((grad_share, grad_x), dim=-1)
    f, i = torch.sigmoid(shares[0]), torch.sigmoid(shares[1])
    return torch.cat((-grad_share * (1 - f), grad_share * (1 - i), grad_x), dim=-1)


def _share(parts: list[Tensor], form: GateForm) -> Tensor:
    """The pre-activation of z, the share of the state that the candidate takes."""
    if form is GateForm.mingru:
        return parts[0]
    # i / (f + i) itself is 0 / 0 where both gates are shut; the difference of their logarithms is not.
    return functional.logsigmoid(parts[1]) - functional.logsigmoid(parts[0])


def _candidate(x: Tensor, candidate: Candidate) -> Tensor:
    if candidate is Candidate.g:
        return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))
    return torch.tanh(x) if candidate is Candidate.tanh else x


def _slope(x: Tensor, g: Tensor, candidate: Candidate) -> Tensor:
    """The derivative of the candidate g at x."""
    if candidate is Candidate.g:
        return torch.where(x >= 0, 1.0, g * (1 - g))
    return 1 - g * g if candidate is Candidate.tanh else torch.ones_like(x)
