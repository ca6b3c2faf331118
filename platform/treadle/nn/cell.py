"""What a recurrent cell is: one layer in one direction.

Shape letters: B or S rows, T time steps, D features, H state, N frames of all rows laid end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from treadle.nn.rows import Rows

__all__ = ["Cell", "Reading", "State"]

State = dict[str, Tensor]
"""What a stack carries from one time step to the next: fp32 tensors with the rows at dimension 1.

"h" [L, B, H]; for the LSTM "c" alike; with a convolution "conv0", "conv1", ...: [K - 1, B, D], the frames before,
the latest first. Inside a cell the tensors are [B, H].
"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a cell reads the frames it is given.

    Args:
        rows: which frames belong to which row.
        reverse: from each row's last frame to its first; only packed cells see it, the others get flipped frames.
        starts_N: True where the state restarts before the frame, in reading order; packed cells only.
        reset: what it restarts from, [1, H]; beside `starts_N`.
        decay: in [0, 1], what is left of the state when a frame is read, laid out like the frames.
        final_state: whether the state at the end is wanted.
    """

    rows: Rows
    reverse: bool = False
    starts_N: Tensor | None = None
    reset: State | None = None
    decay: Tensor | None = None
    final_state: bool = True


class Cell(nn.Module, ABC):
    """One recurrent layer in one direction. States are [B, H] here.

    Padded slots hold finite values on entry; what a cell writes there is not looked at.
    """

    packed: ClassVar[bool] = False
    """Whether the cell wants frames packed, [N, D], or padded, [B, T, D]."""
    state_names: ClassVar[tuple[str, ...]] = ("h",)
    state_size: int
    """Width of each state tensor."""
    output_size: int
    """Width of the output."""
    step_overhead: int = 8
    """What a time step costs on the CPU whatever the number of rows, in rows; padded cells only."""

    @abstractmethod
    def forward(self, x: Tensor, state: State, reading: Reading) -> tuple[Tensor, State]:
        """Outputs laid out like `x`, and the state at the last frame of every row ({} where it is not wanted)."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """The output at one time step and the state after it."""
