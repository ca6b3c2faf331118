"""Which slots of a padded batch are frames, and what follows from it.

Shape letters: B rows, T time steps, D features, N = B * T slots laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError, DataError

__all__ = ["Lengths", "Rows"]

Lengths = Tensor | Sequence[int]
"""Frames of each row: whole numbers on the host, so that no shape decision waits for a device."""


def _host_lengths(lengths_B: Lengths, num_rows: int, num_steps: int) -> list[int]:
    if isinstance(lengths_B, Tensor) and lengths_B.device.type != "cpu":
        raise ConfigError(
            f"lengths_B: got a tensor on {lengths_B.device}, expected one on the CPU",
            hint="keep lengths on the host; reading them back would stall the device",
        )
    lengths: list[int] = lengths_B.tolist() if isinstance(lengths_B, Tensor) else list(lengths_B)
    if len(lengths) != num_rows:
        raise ConfigError(f"lengths_B: got {len(lengths)} lengths, expected {num_rows}, one a row")
    for row, length in enumerate(lengths):
        if not 1 <= length <= num_steps:
            raise DataError(f"lengths_B[{row}]: got {length}, expected 1 to {num_steps}", hint="leave empty rows out")
    return lengths


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The frames of a batch of rows of unlike length; `Rows.of` gives None where nothing is padded.

    Args:
        lengths_B: frames of each row, int64, on the device.
        valid_BT: True on frames.
        last_N: for each row, where its last frame stands among the N slots.
        flip_N: for each slot, the slot that holds the mirrored frame; padding maps to itself.
    """

    lengths_B: Tensor
    valid_BT: Tensor
    last_N: Tensor
    flip_N: Tensor

    @classmethod
    def of(cls, lengths_B: Lengths | None, x_BTD: Tensor) -> Rows | None:
        """The rows of `x_BTD`, or None where every slot is a frame. Never waits for the device.

        Raises:
            ConfigError: lengths on a device, or not one a row.
            DataError: an empty row, or one longer than `x_BTD`; the message names its index.
        """
        num_rows, num_steps = x_BTD.shape[:2]
        if num_rows == 0 or num_steps == 0:
            raise DataError(f"batch: got shape {tuple(x_BTD.shape)}, expected at least one row and one time step")
        if lengths_B is None:
            return None
        lengths = _host_lengths(lengths_B, num_rows, num_steps)
        if min(lengths) == num_steps:
            return None
        host_B = torch.tensor(lengths)
        step_T = torch.arange(num_steps)
        start_B = torch.arange(num_rows) * num_steps
        valid_BT = step_T < host_B[:, None]
        mirrored_BT = torch.where(valid_BT, host_B[:, None] - 1 - step_T, step_T)
        on_host = (host_B, valid_BT, start_B + host_B - 1, (start_B[:, None] + mirrored_BT).flatten())
        if x_BTD.device.type == "cuda":  # a copy from memory that is not pinned waits for the device
            on_host = tuple(part.pin_memory() for part in on_host)
        lengths_, valid, last, flip = (part.to(x_BTD.device, non_blocking=True) for part in on_host)
        return cls(lengths_B=lengths_, valid_BT=valid, last_N=last, flip_N=flip)

    def zeroed(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` with zeros at padded slots, whatever stood there (NaN too); no gradient passes them."""
        return x_BTD.masked_fill(~self.valid_BT[..., None], 0.0)

    def last(self, x_BTD: Tensor) -> Tensor:
        """The last frame of each row, [B, D]."""
        return x_BTD.flatten(0, 1).index_select(0, self.last_N)

    def flipped(self, x_BTD: Tensor) -> Tensor:
        """Each row read from its own last frame to its first; its own inverse."""
        return _Flip.apply(x_BTD, self.flip_N)  # type: ignore[no-any-return]


class _Flip(torch.autograd.Function):
    """A permutation of slots that is its own inverse: the backward pass is the same permutation.

    Left to autograd, the backward of a gather adds into a zeroed tensor, which costs more and
    whose order of additions is not fixed on CUDA.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, flip_N: Tensor) -> Tensor:
        ctx.save_for_backward(flip_N)
        return x_BTD.flatten(0, 1).index_select(0, flip_N).view(x_BTD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (flip_N,) = ctx.saved_tensors
        return _Flip.apply(grads[0], flip_N), None  # type: ignore[return-value]
