"""The forms in which frames come to a layer, and the forms in which its kernels want them.

Shape letters: B or S rows, T time steps, D features, N frames of all rows laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from treadle.errors import ConfigError, DataError
from treadle.nn.rows import Lengths, Offsets, Rows, pick, refuse_nan

__all__ = ["Frames", "Segments", "groups_of_like_length", "read_frames", "split_at_starts"]


@dataclass(frozen=True, kw_only=True)
class Frames:
    """A batch as a stack works on it.

    Args:
        values: [N, D] packed, or [B, T, D] where `padded`, with anything at padded slots.
        rows: which frames belong to which row.
        padded: the layout of `values`.
        starts_N: True at frames that restart the state.
        gaps_N: time since the frame before.
        restore: from values of this layout to the form in which the caller gave them.
    """

    values: Tensor
    rows: Rows
    padded: bool
    starts_N: Tensor | None
    gaps_N: Tensor | None
    restore: Callable[[Tensor], Any]

    @property
    def gaps(self) -> Tensor | None:
        """The gaps laid out like the values, 0 at padded slots."""
        return self.rows.pad(self.gaps_N) if self.padded and self.gaps_N is not None else self.gaps_N

    @property
    def starts(self) -> Tensor | None:
        """The restarts laid out like the values."""
        return self.rows.pad(self.starts_N) if self.padded and self.starts_N is not None else self.starts_N

    def read_backwards(self) -> tuple[Tensor | None, Tensor | None]:
        """Gaps and restarts as one meets them who reads each row from its end; of padded rows in that order.

        The gap before a frame is met when leaving it, and a document that begins at a frame is left there. Before
        its last frame a row has no gap, so with gaps that frame counts as a restart.
        """
        gaps_N, starts_N = self.gaps_N, self.starts_N
        if starts_N is not None:
            starts_N = torch.cat((starts_N[1:], torch.zeros_like(starts_N[:1])))
        if gaps_N is not None:
            gaps_N = torch.cat((gaps_N[1:], gaps_N[:1])).index_fill(0, self.rows.last_S, 0.0)
            starts_N = torch.zeros_like(gaps_N, dtype=torch.bool) if starts_N is None else starts_N
            starts_N = starts_N.index_fill(0, self.rows.last_S, True)
        if not self.padded:
            return gaps_N, starts_N
        rows = self.rows
        gaps, starts = (None if part is None else rows.flipped(rows.pad(part)) for part in (gaps_N, starts_N))
        return gaps, starts

    def packed(self) -> Frames:
        """The same without padding."""
        if not self.padded:
            return self
        rows, restore = self.rows, self.restore
        return replace(self, values=rows.pack(self.values), padded=False, restore=lambda x_ND: restore(rows.pad(x_ND)))


def read_frames(
    x: Tensor | PackedSequence,
    *,
    input_size: int,
    batch_first: bool,
    lengths: Lengths | None,
    offsets: Offsets | Rows | None,
    starts: Tensor | None,
    gaps: Tensor | None,
) -> Frames:
    """The frames of any of the three forms: padded, packed with offsets, torch's PackedSequence.

    Raises:
        ConfigError: arguments that do not fit one another; the message names the argument.
        DataError: an empty row, or, under `debug_checks`, a number that is not finite.
    """
    if isinstance(x, PackedSequence):
        _refuse("a PackedSequence", lengths=lengths, offsets=offsets, starts=starts, gaps=gaps)
        return _read_sequence(x, input_size)
    if not isinstance(x, Tensor):
        raise ConfigError(f"x: got {type(x).__name__}, expected a tensor or a PackedSequence")
    if offsets is not None:
        _refuse("packed frames", lengths=lengths)
        return _read_packed(x, input_size, offsets, starts, gaps)
    if not batch_first and x.ndim == 3:
        frames = _read_padded(x.transpose(0, 1), input_size, lengths, _turned(starts), _turned(gaps))
        return replace(frames, restore=lambda y_BTD: y_BTD.transpose(0, 1))
    return _read_padded(x, input_size, lengths, starts, gaps)


def _turned(marks: Tensor | None) -> Tensor | None:
    return None if marks is None or marks.ndim < 2 else marks.transpose(0, 1)


def _read_padded(
    x_BTD: Tensor, input_size: int, lengths: Lengths | None, starts: Tensor | None, gaps: Tensor | None
) -> Frames:
    if x_BTD.ndim != 3 or x_BTD.shape[-1] != input_size:
        hint = "packed frames [N, D] need offsets=" if x_BTD.ndim == 2 else ""
        raise ConfigError(f"x: got shape {tuple(x_BTD.shape)}, expected (rows, time steps, {input_size})", hint=hint)
    shape = (x_BTD.shape[0], x_BTD.shape[1])
    if 0 in shape:
        raise DataError(f"x: got shape {tuple(x_BTD.shape)}, expected at least one row and one time step")
    device = x_BTD.device
    rows = Rows.full(*shape, device) if lengths is None else Rows.of_lengths(lengths, device=device, padded=shape)
    _check_marks(starts, gaps, shape, device)
    refuse_nan("x", x_BTD, rows)
    return Frames(
        values=x_BTD,
        rows=rows,
        padded=True,
        starts_N=None if starts is None else rows.pack(starts),
        gaps_N=None if gaps is None else rows.pack(gaps),
        restore=lambda y_BTD: y_BTD,
    )


def _read_packed(
    x_ND: Tensor, input_size: int, offsets: Offsets | Rows, starts: Tensor | None, gaps: Tensor | None
) -> Frames:
    if x_ND.ndim != 2 or x_ND.shape[-1] != input_size:
        raise ConfigError(f"x: got shape {tuple(x_ND.shape)}, expected (frames, {input_size}) beside offsets")
    rows = Rows.of_offsets(offsets, x_ND.shape[0], device=x_ND.device)
    _check_marks(starts, gaps, tuple(x_ND.shape[:1]), x_ND.device)
    refuse_nan("x", x_ND)
    return Frames(values=x_ND, rows=rows, padded=False, starts_N=starts, gaps_N=gaps, restore=lambda y_ND: y_ND)


def _read_sequence(x: PackedSequence, input_size: int) -> Frames:
    """torch's form: the t-th frames of all rows that reach so far, side by side, longest row first."""
    if x.data.shape[-1] != input_size:
        raise ConfigError(f"x: got a PackedSequence of {x.data.shape[-1]} features, expected {input_size}")
    sizes_T = x.batch_sizes
    sorted_rows = torch.arange(int(sizes_T[0])) if x.sorted_indices is None else x.sorted_indices.cpu()
    lengths_S = (sizes_T[None] > sorted_rows.argsort()[:, None]).sum(1)
    rows = Rows.of_lengths(lengths_S, device=x.data.device)
    first_T = (sizes_T.cumsum(0) - sizes_T).to(x.data.device)
    place_S = sorted_rows.argsort().to(x.data.device)
    frame_N = first_T.index_select(0, rows.position_N) + place_S.index_select(0, rows.row_N)
    refuse_nan("x", x.data)

    def restore(y_ND: Tensor) -> PackedSequence:
        return x._replace(data=pick(y_ND, frame_N.argsort()))

    values = pick(x.data, frame_N)
    return Frames(values=values, rows=rows, padded=False, starts_N=None, gaps_N=None, restore=restore)


def _refuse(form: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name}: got a value beside {form}, expected none")


def _check_marks(starts: Tensor | None, gaps: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    for name, marks in (("starts", starts), ("gaps", gaps)):
        if marks is None:
            continue
        if not isinstance(marks, Tensor):
            raise ConfigError(f"{name}: got {type(marks).__name__}, expected a tensor, one value for each frame")
        if tuple(marks.shape) != shape or marks.device != device:
            got = f"shape {tuple(marks.shape)} on {marks.device}"
            raise ConfigError(f"{name}: got {got}, expected {shape} on {device}, one for each frame")
    if starts is not None and starts.dtype != torch.bool:
        raise ConfigError(f"starts: got {starts.dtype}, expected torch.bool")
    if gaps is not None and not gaps.is_floating_point():
        raise ConfigError(f"gaps: got {gaps.dtype}, expected a floating-point format")


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Rows cut where the state restarts: each piece is a row of its own.

    Args:
        rows: the pieces.
        parent_S: the row that each piece is part of.
        carries_S: True where a piece goes on from its row's state: it stands first and does not restart.
        last_B: the last piece of each row.
    """

    rows: Rows
    parent_S: Tensor
    carries_S: Tensor
    last_B: Tensor


def split_at_starts(rows: Rows, starts_N: Tensor) -> Segments:
    """The pieces of rows between restarts. Waits for the device, since their number decides shapes."""
    begins_N = starts_N.clone()
    begins_N[rows.offsets[:-1]] = True
    first_S = begins_N.nonzero()[:, 0]
    offsets = torch.cat((first_S, rows.offsets[-1:]))
    parent_S = rows.row_N.index_select(0, first_S)
    return Segments(
        rows=Rows.of_offsets(offsets.cpu(), rows.num_frames, device=rows.device),
        parent_S=parent_S,
        carries_S=~starts_N.index_select(0, first_S),
        last_B=torch.searchsorted(first_S, rows.offsets[1:]) - 1,
    )


def groups_of_like_length(rows: Rows, step_overhead: int) -> list[Tensor]:
    """Rows that had better be padded together: indices, on the host.

    Args:
        rows: rows of any lengths.
        step_overhead: what a time step costs whatever the number of rows, in rows. It decides how much padding is
            worth a group less.
    """
    if rows.is_full:
        return [torch.arange(rows.num_rows)]
    lengths = rows.lengths
    longest_first = sorted(range(rows.num_rows), key=lengths.__getitem__, reverse=True)
    groups: list[list[int]] = []
    for row in longest_first:
        if groups and lengths[row] * 5 >= lengths[groups[-1][0]] * 4:
            groups[-1].append(row)
        else:
            groups.append([row])
    merged = groups[:1]
    for group in groups[1:]:
        longest = lengths[merged[-1][0]]
        if (longest - lengths[group[0]]) * len(group) <= lengths[group[0]] * step_overhead:
            merged[-1] += group
        else:
            merged.append(group)
    return [torch.tensor(sorted(group)) for group in merged]
