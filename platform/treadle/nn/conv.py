"""A causal depthwise convolution over rows of any length, in any chunks.

Shape letters: S rows, D features, K taps, N frames of all rows laid end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.nn.rows import Rows

__all__ = ["CausalConv"]


class CausalConv(nn.Module):
    """y_t = bias + sum over k of weight_k * x_(t-k), feature by feature, never across the start of a row.

    Args:
        size: features D.
        taps: frames seen, the present one included.

    The weights start at zero: beside a residual connection the layer starts as the identity.
    """

    def __init__(self, size: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.zeros(taps, size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(
        self, x_ND: Tensor, window_KSD: Tensor, rows: Rows, last_S: Tensor, starts_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The convolution of packed frames, and the window after each row's last frame.

        Args:
            x_ND: packed frames.
            window_KSD: [K - 1, S, D], the frames before each row, the latest first; zeros where there were none.
            rows: where rows begin.
            last_S: the frame that counts as the end of each row.
            starts_N: True at frames that see nothing before them.
        """
        age_N, intact_N = _ages(rows, starts_N)
        y_ND = torch.addcmul(self.bias.to(x_ND.dtype), x_ND, self.weight[0].to(x_ND.dtype))
        for k in range(1, self.taps):
            earlier_ND = functional.pad(x_ND, (0, 0, k, 0))[:-k].masked_fill((age_N < k)[:, None], 0.0)
            y_ND = y_ND + self.weight[k].to(x_ND.dtype) * earlier_ND
        window_KSD = window_KSD.to(x_ND.dtype)
        lengths_S = last_S - rows.offsets[:-1] + 1
        for place in range(self.taps - 1):
            # Frame `place` of a row is short of taps - 1 - place frames, which stand in the window.
            frame_S = (rows.offsets[:-1] + place).clamp(max=rows.num_frames - 1)
            sees_S = (lengths_S > place) & intact_N.index_select(0, frame_S)
            weight_KD = self.weight[place + 1 :].to(x_ND.dtype)
            missing_SD = (weight_KD[:, None] * window_KSD[: self.taps - 1 - place]).sum(0)
            y_ND = y_ND.index_add(0, frame_S, missing_SD.masked_fill(~sees_S[:, None], 0.0))
        return y_ND, self._window(x_ND, window_KSD, age_N, intact_N, last_S, lengths_S)

    def _window(
        self, x_ND: Tensor, window_KSD: Tensor, age_N: Tensor, intact_N: Tensor, last_S: Tensor, lengths_S: Tensor
    ) -> Tensor:
        """The last K - 1 frames of every row, the latest first."""
        age_S, intact_S = age_N.index_select(0, last_S), intact_N.index_select(0, last_S)
        row_S = torch.arange(window_KSD.shape[1], device=x_ND.device)
        latest = []
        for back in range(self.taps - 1):
            own_SD = x_ND.index_select(0, (last_S - back).clamp(min=0)).masked_fill((age_S < back)[:, None], 0.0)
            older_SD = window_KSD[(back - lengths_S).clamp(min=0), row_S].masked_fill(~intact_S[:, None], 0.0)
            latest.append(torch.where((lengths_S > back)[:, None], own_SD, older_SD))
        return torch.stack(latest)

    def step(self, x_BD: Tensor, window_KBD: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution at one time step and the window after it."""
        seen_KBD = torch.cat((x_BD[None], window_KBD.to(x_BD.dtype)))
        y_BD = self.bias.to(x_BD.dtype) + (self.weight.to(x_BD.dtype)[:, None] * seen_KBD).sum(0)
        return y_BD, seen_KBD[:-1]


def _ages(rows: Rows, starts_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Frames of the same document before each frame of its row, and whether its row has not restarted so far."""
    age_N = rows.position_N
    if starts_N is None:
        return age_N, torch.ones_like(age_N, dtype=torch.bool)
    frame_N = torch.arange(rows.num_frames, device=age_N.device)
    begin_N = frame_N - age_N
    latest_N = torch.where(starts_N, frame_N, -1).cummax(0).values
    intact_N = latest_N < begin_N
    return torch.where(intact_N, age_N, frame_N - latest_N), intact_N
