"""What a recurrent cell is: one layer in one direction.

Shape letters: B or S rows, T time steps, D features, H state, N frames of all rows laid end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.nn.rows import Rows

__all__ = ["Cell", "Reading", "State", "check_like", "check_shapes", "check_state"]

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


def check_state(
    state: State, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> None:
    """Refuse a state that is not what a layer carries.

    Raises:
        ConfigError: other names, or a tensor of another shape, format or device; the message names it.
    """
    if state.keys() != shapes.keys():
        raise ConfigError(f"state: got {sorted(state)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        got, dtype = state[name], dtypes[name]
        if got.shape != shape or got.dtype != dtype or got.device != device:
            raise ConfigError(
                f"state[{name!r}]: got {tuple(got.shape)} {got.dtype} on {got.device}, "
                f"expected {shape} {dtype} on {device}",
                hint="a state keeps its own format, whatever that of the frames" if got.shape == shape else "",
            )


def check_like(state: State, initial: State) -> None:
    """`check_state` against a state that fits."""
    shapes = {name: tuple(part.shape) for name, part in initial.items()}
    check_state(
        state, shapes, {name: part.dtype for name, part in initial.items()}, next(iter(initial.values())).device
    )


def check_shapes(state: State, initial: State) -> None:
    """Refuse a state whose names or shapes are not those of one that fits; formats may differ.

    Raises:
        ConfigError: both, side by side.
    """
    shapes = {name: tuple(part.shape) for name, part in state.items()}
    if shapes != (expected := {name: tuple(part.shape) for name, part in initial.items()}):
        raise ConfigError(f"state: got {shapes}, expected {expected}")
