"""Which frames belong to which row, and the two layouts of a batch: packed and padded.

Shape letters: S (or B) rows, T time steps of the longest row, D features, N frames of all rows laid end to end.

Packed is [N, D] with the offsets [S + 1] at which rows begin; it holds no padding. Padded is [B, T, D].
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import numbers
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError, DataError

__all__ = ["Lengths", "Offsets", "Rows", "debug_checks", "pick", "refuse_nan"]

Lengths = Tensor | Sequence[int]
"""Frames of each row: whole numbers on the host, so that no shape decision waits for a device."""

Offsets = Tensor | Sequence[int]
"""Where rows begin among packed frames, and, last, the number of frames: rising whole numbers from 0."""

_CHECKING: ContextVar[bool] = ContextVar("treadle_debug_checks", default=False)


@contextlib.contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Within it, layers look for NaN and infinity in their input and check offsets that stand on a device.

    Both wait for the device, so they are off otherwise.
    """
    token = _CHECKING.set(enabled)
    try:
        yield
    finally:
        _CHECKING.reset(token)


def refuse_nan(name: str, x: Tensor, rows: Rows | None = None) -> None:
    """Under `debug_checks`, refuse a frame that is not finite, and say where the first one stands.

    Args:
        name: what `x` is called in the message.
        x: packed frames, or padded ones beside `rows`.
        rows: which slots of a padded `x` are frames; the others may hold anything.

    Raises:
        DataError: a frame holds NaN or infinity.
    """
    if not _CHECKING.get() or not x.is_floating_point():
        return
    x = x if rows is None else rows.zeroed(x)
    if bool(x.isfinite().all()):
        return
    where = (~x.isfinite()).nonzero()[0].tolist()
    raise DataError(f"{name}{where}: got {float(x[tuple(where)])}, expected finite numbers")


class Rows:
    """The rows of a batch. What follows from lengths is computed when first asked for, on the device.

    Attributes:
        num_rows: S.
        num_frames: N.
        offsets: int64 [S + 1], on the device.
    """

    def __init__(
        self, offsets: Tensor, num_frames: int, *, lengths: tuple[int, ...] | None = None, width: int | None = None
    ) -> None:
        """From parts that fit one another; see `full`, `of_lengths` and `of_offsets`."""
        self.offsets = offsets
        self.num_rows: int = offsets.shape[0] - 1
        self.num_frames = num_frames
        self._lengths = lengths
        self._width = width  # time steps of the padded form, where that is not simply the longest row

    @classmethod
    def full(cls, num_rows: int, length: int, device: torch.device) -> Rows:
        """`num_rows` rows of one length: packing and padding are views."""
        offsets = torch.arange(num_rows + 1, device=device) * length
        return cls(offsets, num_rows * length, width=length)

    @classmethod
    def of_lengths(
        cls, lengths: Lengths, *, device: torch.device | str = "cpu", padded: tuple[int, int] | None = None
    ) -> Rows:
        """Rows of the given lengths; never waits for the device.

        Args:
            lengths: frames of each row, on the host.
            device: where the frames are.
            padded: rows and time steps of the padded form, where there already is one.

        Raises:
            ConfigError: lengths on a device, or not one for each padded row.
            DataError: an empty row, or one longer than the padded form; the message names its index.
        """
        if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
            raise ConfigError(
                f"lengths: got a tensor on {lengths.device}, expected one on the CPU",
                hint="keep lengths on the host; reading them back would stall the device",
            )
        device = torch.device(device)
        host: tuple[int, ...] = tuple(lengths.tolist() if isinstance(lengths, Tensor) else lengths)
        if not all(isinstance(length, numbers.Integral) for length in host):
            got = f"shape {tuple(lengths.shape)} of {lengths.dtype}" if isinstance(lengths, Tensor) else str(host[:8])
            raise ConfigError(f"lengths: got {got}, expected whole numbers, one a row")
        num_rows, width = padded or (len(host), None)
        if len(host) != num_rows or not host:
            raise ConfigError(f"lengths: got {len(host)} lengths, expected {num_rows or 'some'}, one a row")
        for row, length in enumerate(host):
            if length < 1 or (width is not None and length > width):
                rule = "1 or more" if width is None else f"1 to {width}"
                hint = "leave empty rows out" if length == 0 else ""
                raise DataError(f"lengths[{row}]: got {length}, expected {rule}", hint=hint)
        if min(host) == max(host) == (width or host[0]):
            return cls.full(num_rows, host[0], device)
        offsets = torch.tensor((0, *host)).cumsum(0)
        return cls(_to(offsets, device), sum(host), lengths=host, width=width)

    @classmethod
    def of_offsets(cls, offsets: Offsets | Rows, num_frames: int, *, device: torch.device) -> Rows:
        """Rows that begin at the given packed frames; rows that are known already are only checked to fit.

        Offsets on the host are checked; on a device only under `debug_checks`, since reading them stalls it.

        Raises:
            ConfigError: not whole numbers in one dimension, not from 0 to `num_frames`, or on another device.
            DataError: an empty row; the message names its index.
        """
        if isinstance(offsets, Rows):
            if (offsets.num_frames, offsets.device) != (num_frames, device):
                got = f"rows of {offsets.num_frames} frames on {offsets.device}"
                raise ConfigError(f"offsets: got {got}, expected {num_frames} frames on {device}")
            return offsets
        given = offsets if isinstance(offsets, Tensor) else torch.tensor(list(offsets))
        if given.ndim != 1 or given.shape[0] < 2 or given.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"offsets: got shape {tuple(given.shape)} of {given.dtype}, expected whole numbers in one dimension: "
                "where each row begins, and the number of frames"
            )
        given = given.to(torch.int64)
        if given.device.type != "cpu" and not _CHECKING.get():
            if given.device != device:
                raise ConfigError(f"offsets: got {given.device}, expected {device} like the frames, or the CPU")
            return cls(given, num_frames)
        host: list[int] = given.tolist()
        if host[0] != 0 or host[-1] != num_frames:
            raise ConfigError(f"offsets: got {host[0]} to {host[-1]}, expected 0 to {num_frames}, the number of frames")
        lengths = tuple(after - before for before, after in itertools.pairwise(host))
        for row, length in enumerate(lengths):
            if length < 1:
                raise DataError(
                    f"offsets[{row}:{row + 2}]: got {host[row]} to {host[row + 1]}, expected rows of one frame or more",
                    hint="leave empty rows out",
                )
        if len(set(lengths)) == 1:
            return cls.full(len(lengths), lengths[0], device)
        return cls(_to(given, device), num_frames, lengths=lengths)

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @property
    def is_full(self) -> bool:
        """Whether no slot of the padded form is known to be padding; packing and padding are views then."""
        return self._lengths is None and self._width is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of each row, on the host; waits for the device where only that knows them."""
        if self._width is not None and self._lengths is None:
            return (self._width,) * self.num_rows
        if self._lengths is None:
            host: list[int] = self.offsets.tolist()
            self._lengths = tuple(after - before for before, after in itertools.pairwise(host))
        return self._lengths

    @property
    def num_steps(self) -> int:
        """Time steps of the padded form: the longest row's, or more where it was given so."""
        return self._width if self._width is not None else max(self.lengths)

    @property
    def known_num_steps(self) -> int:
        """`num_steps` where the host knows it, else 0."""
        return 0 if self._width is None and self._lengths is None else self.num_steps

    @functools.cached_property
    def lengths_S(self) -> Tensor:
        """Frames of each row, int64."""
        return self.offsets.diff()

    @functools.cached_property
    def row_N(self) -> Tensor:
        """The row of each frame, int64."""
        rows_S = torch.arange(self.num_rows, device=self.device)
        return rows_S.repeat_interleave(self.lengths_S, output_size=self.num_frames)

    @functools.cached_property
    def position_N(self) -> Tensor:
        """The place of each frame in its row, from 0."""
        return torch.arange(self.num_frames, device=self.device) - self.offsets.index_select(0, self.row_N)

    @functools.cached_property
    def last_S(self) -> Tensor:
        """The packed frame that ends each row."""
        return self.offsets[1:] - 1

    @functools.cached_property
    def valid_BT(self) -> Tensor:
        """True at the slots of the padded form that are frames."""
        return torch.arange(self.num_steps, device=self.device) < self.lengths_S[:, None]

    @functools.cached_property
    def slot_N(self) -> Tensor:
        """The slot of the padded form, of its B * T, that each frame stands in."""
        return self.row_N * self.num_steps + self.position_N

    @functools.cached_property
    def _flip_slots(self) -> Tensor:
        """For each slot of the padded form, the slot that holds the mirrored frame; padding maps to itself."""
        step_T = torch.arange(self.num_steps, device=self.device)
        mirrored_BT = torch.where(self.valid_BT, self.lengths_S[:, None] - 1 - step_T, step_T)
        first_B = torch.arange(self.num_rows, device=self.device) * self.num_steps
        return (first_B[:, None] + mirrored_BT).flatten()

    def pack(self, x_BTD: Tensor) -> Tensor:
        """The frames of padded rows, end to end: [N, D]."""
        x_ND = x_BTD.flatten(0, 1)
        return x_ND if self.is_full else pick(x_ND, self.slot_N)

    def pad(self, x_ND: Tensor) -> Tensor:
        """Packed frames as padded rows [B, T, D], zeros at padded slots."""
        shape = (self.num_rows, self.num_steps, *x_ND.shape[1:])
        if self.is_full:
            return x_ND.view(shape)
        return _Place.apply(x_ND, self.slot_N, self.num_rows * self.num_steps).view(shape)  # type: ignore[union-attr]

    def select(self, rows_G: Tensor) -> tuple[Rows, Tensor]:
        """Some of the rows, given by index on the host, and the packed frames that they are made of."""
        chosen = Rows.of_lengths([self.lengths[row] for row in rows_G.tolist()], device=self.device)
        first_G = self.offsets.index_select(0, _to(rows_G, self.device))
        return chosen, first_G.index_select(0, chosen.row_N) + chosen.position_N

    def zeroed(self, x_BTD: Tensor) -> Tensor:
        """Padded rows with zeros at padded slots, whatever stood there (NaN too); no gradient passes them."""
        return x_BTD if self.is_full else x_BTD.masked_fill(~self.valid_BT[..., None], 0.0)

    def last(self, x_BTD: Tensor) -> Tensor:
        """The last frame of each padded row, [B, D]."""
        if self.is_full:
            return x_BTD[:, -1]
        first_B = torch.arange(self.num_rows, device=self.device) * x_BTD.shape[1]
        return x_BTD.flatten(0, 1).index_select(0, first_B + self.lengths_S - 1)

    def flipped(self, x_BTD: Tensor) -> Tensor:
        """Each padded row read from its own last frame to its first; its own inverse."""
        if self.is_full:
            return x_BTD.flip(1)
        flat = x_BTD.flatten(0, 1)
        return _Flip.apply(flat, self._flip_slots).view(x_BTD.shape)  # type: ignore[union-attr]


def _to(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`, without waiting for it: a copy from memory that is not pinned would."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# Gathers whose indices differ: left to autograd, the backward pass adds into a zeroed tensor, which costs more
# and whose order of additions is not fixed on CUDA.


def pick(x_MD: Tensor, index_N: Tensor) -> Tensor:
    """`x_MD[index_N]` for indices that differ from one another."""
    return _Pick.apply(x_MD, index_N)  # type: ignore[return-value]


class _Pick(torch.autograd.Function):
    """x[index], each index at most once."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.num_slots = x_MD.shape[0]
        return x_MD.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return _Place.apply(grads[0], index_N, ctx.num_slots), None  # type: ignore[return-value]


class _Place(torch.autograd.Function):
    """Zeros [num_slots, D] with x at the given places, each at most once."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_N: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(index_N)
        return x_ND.new_zeros((num_slots, *x_ND.shape[1:])).index_copy_(0, index_N, x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        return _Pick.apply(grads[0], index_N), None, None  # type: ignore[return-value]


class _Flip(torch.autograd.Function):
    """A permutation that is its own inverse: the backward pass is the same permutation."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, flip_M: Tensor) -> Tensor:
        ctx.save_for_backward(flip_M)
        return x_MD.index_select(0, flip_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (flip_M,) = ctx.saved_tensors
        return _Flip.apply(grads[0], flip_M), None  # type: ignore[return-value]
