"""One layer of a stack: a cell ahead and, where asked, one back, with what stands around them.

Shape letters: B or S rows, T time steps, D features, H hidden, N frames of all rows laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.autocast import without_autocast
from treadle.nn.cell import Cell, Reading, State
from treadle.nn.conv import CausalConv
from treadle.nn.feedforward import FeedForward
from treadle.nn.frames import Frames
from treadle.nn.irregular import TimeDecay
from treadle.nn.rows import Rows

__all__ = ["Layer", "LayerOptions"]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What stands around the cells of a layer; see `RecurrentStack`."""

    bidirectional: bool
    norm: bool
    residual: bool
    time_decay: bool
    conv_size: int
    mlp_factor: float

    def __post_init__(self) -> None:
        if self.conv_size == 1 or self.conv_size < 0:
            raise ConfigError(f"conv_size: got {self.conv_size}, expected 0 (none) or 2 taps and more")
        if self.conv_size and self.bidirectional:
            raise ConfigError("conv_size: got a causal convolution in a bidirectional stack, expected 0")
        if self.mlp_factor < 0:
            raise ConfigError(f"mlp_factor: got {self.mlp_factor}, expected 0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """The state of one layer: of its cell in each direction [B, H], and of its convolution."""

    cells: list[State]
    window: Tensor | None = None


class Layer(nn.Module):
    """See `RecurrentStack` for the order of things."""

    def __init__(
        self, make_cell: Callable[[int], Cell], input_size: int, options: LayerOptions, *, dropout: float
    ) -> None:
        super().__init__()
        self.conv = CausalConv(input_size, options.conv_size) if options.conv_size else None
        self.norm = nn.RMSNorm(input_size, eps=1e-6) if options.norm else None
        self.ahead = make_cell(input_size)
        self.back = make_cell(input_size) if options.bidirectional else None
        directions = ("ahead", "back") if options.bidirectional else ("ahead",)
        size = self.ahead.state_size
        self.decay = nn.ModuleDict({name: TimeDecay(size) for name in directions if options.time_decay})
        self.dropout = nn.Dropout(dropout)
        output_size = self.ahead.output_size * len(directions)
        self.residual = options.residual and input_size == output_size
        self.mlp = FeedForward(output_size, options.mlp_factor, dropout) if options.mlp_factor else None

    def forward(
        self, x: Tensor, state: LayerState, frames: Frames, reset: LayerState | None, *, final_state: bool
    ) -> tuple[Tensor, LayerState]:
        """Outputs laid out like `x`, and the state at the last frame of every row.

        Args:
            x: frames in the layout of `frames`, whose own values are not looked at.
            state: before the first frame.
            frames: what is known of them beside their values.
            reset: what the state restarts from.
            final_state: whether the state at the end is wanted.
        """
        window = None
        if self.conv is not None and state.window is not None:
            added, window = _convolved(self.conv, x, state.window, frames)
            x = x + added
        inner = self._normed(x)
        reading = Reading(
            rows=frames.rows,
            starts_N=None if frames.padded else frames.starts_N,
            reset=None if reset is None else reset.cells[0],
            decay=self._decayed("ahead", frames.gaps, frames.starts),
            final_state=final_state,
        )
        y, end = self.ahead(inner, state.cells[0], reading)
        ends = [end]
        if self.back is not None:
            gaps, starts = frames.read_backwards()
            reading = replace(
                reading,
                reverse=not frames.padded,
                starts_N=None if frames.padded else starts,
                reset=None if reset is None else reset.cells[1],
                decay=self._decayed("back", gaps, starts),
            )
            inner = frames.rows.flipped(inner) if frames.padded else inner
            back, end = self.back(inner, state.cells[1], reading)
            y = torch.cat((y, frames.rows.flipped(back) if frames.padded else back), dim=-1)
            ends.append(end)
        return self._around(x, y), LayerState(cells=ends, window=window)

    def step(
        self, x_BD: Tensor, state: LayerState, gaps: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """The output at one time step and the state after it; `starts` marks states that have just restarted."""
        window = None
        if self.conv is not None and state.window is not None:
            added_BD, window = self.conv.step(x_BD, state.window)
            x_BD = x_BD + added_BD
        before = state.cells[0]
        decay_BH = self._decayed("ahead", gaps, starts)
        if decay_BH is not None:
            before = {name: part * decay_BH for name, part in before.items()}
        y_BH, after = self.ahead.step(self._normed(x_BD), before)
        return self._around(x_BD, y_BH), LayerState(cells=[after], window=window)

    def _normed(self, x: Tensor) -> Tensor:
        # Explicitly in the weights' format: beside bf16 inputs torch warns and leaves its fused kernel.
        return x if self.norm is None else self.norm(x.to(self.norm.weight.dtype))

    def _decayed(self, direction: str, gaps: Tensor | None, starts: Tensor | None) -> Tensor | None:
        """What is left of the state at each frame; all of it where it has just restarted."""
        if gaps is None:
            return None
        with without_autocast(gaps):
            decay = self.decay[direction](gaps)
        return decay if starts is None else decay.masked_fill(starts[..., None], 1.0)

    def _around(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.dropout(y.to(x.dtype))
        if self.residual:
            y = x + y
        return y if self.mlp is None else y + self.mlp(y)


def _convolved(conv: CausalConv, x: Tensor, window_KSD: Tensor, frames: Frames) -> tuple[Tensor, Tensor]:
    if not frames.padded:
        return conv(x, window_KSD, frames.rows, frames.rows.last_S, frames.starts_N)
    slots = Rows.full(x.shape[0], x.shape[1], x.device)  # padding stands behind a row's frames, which do not see it
    y_ND, window_KSD = conv(x.flatten(0, 1), window_KSD, slots, slots.offsets[:-1] + frames.rows.lengths_S - 1, None)
    return y_ND.view_as(x), window_KSD
