"""Random changes of training rows: crop, drop, warp, scale, jitter, and masks of channels and of time.

Done on batches as models read them, already scaled: a blank frame is 0, the mean of every channel, and a blank symbol
is id 0, which training never saw. Every number is drawn from (seed, epoch, row), so that a row is changed in the same
way whatever batch, form or rank it is read in (tests/unit/data/test_augment.py).

Shape letters: B rows of a batch, T time steps, C channels that a model reads, D of them scaled values, N frames of all
rows laid end to end, M slots: B * T of a padded batch, N of a packed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.load.batch import Batch, Form
from treadle.data.load.draws import Draws, Purpose
from treadle.data.manifest import Preprocessing
from treadle.spec import AugmentSpec, Missing

__all__ = ["augment_batch"]

Ints = NDArray[np.int64]
MIDDLE_MARGIN = 0.05
"""A warped middle stays this share of the row away from its ends, so that no half is crushed to nothing."""


def augment_batch(
    batch: Batch,
    spec: AugmentSpec,
    preprocessing: Preprocessing,
    *,
    seed: int,
    epoch: int,
    per_frame: bool = False,
    multiple_of: int = 1,
    starts_B: Ints | None = None,
) -> Batch:
    """The batch with its rows changed as `spec` asks. Takes the batch over: its arrays may be written into.

    In this order: crop, drop, warp, scale, jitter, channel masks, time masks. Jitter and scale change scaled values
    that were observed, never gaps or what says that a value was observed. What a mask blanks counts as not observed.
    The gaps of frames left out are added to the gap of the next one that stays; a row's first has none, as ever. A
    warp moves the times with the frames, and the labels of frames with the nearest one.

    Args:
        batch: of training rows, from a reader; not used again by the caller.
        spec: what to change; `treadle.plan.check_augment` has accepted it.
        preprocessing: of the data set.
        seed: of the job. epoch: from 0.
        per_frame: whether targets are one a frame, which follow their frames.
        multiple_of: what a shortened padded batch is padded to a multiple of.
        starts_B: first frame of each row's piece, where rows are read in pieces: noise goes on where the piece before
            ended, and each piece has time masks of its own.

    Cost: a value takes 8 ns to jitter, 7 to warp, 1 to 7 for the others, where reading it takes .7 and an LSTM of 128
        units 400 (tests/bench/data_augment.py).
    """
    if spec == AugmentSpec():
        return batch
    draws = Draws(batch.rows_B, seed=seed, epoch=epoch)
    change = _Change(spec=spec, draws=draws, preprocessing=preprocessing, per_frame=per_frame, starts_B=starts_B)
    if spec.shortens:
        batch = _shortened(batch, change, multiple_of)
    if not batch.inputs.flags.writeable:
        batch = batch._replace(inputs=batch.inputs.copy())
    steps: tuple[tuple[bool | float, Callable[[Batch, _Change], Batch]], ...] = (
        (spec.warp, _warped),
        (spec.scale, _scaled),
        (spec.jitter, _jittered),
        (spec.channel_masks, _channels_masked),
        (spec.time_masks, _times_masked),
    )
    for asked, step in steps:
        if asked:
            batch = step(batch, change)
    return batch


@dataclass(frozen=True, kw_only=True)
class _Change:
    spec: AugmentSpec
    draws: Draws
    preprocessing: Preprocessing
    per_frame: bool
    starts_B: Ints | None

    @property
    def num_values(self) -> int:
        """D; 0 for tokens."""
        return len(self.preprocessing.channels)

    @property
    def has_observed(self) -> bool:
        return self.num_values > 0 and self.preprocessing.missing is Missing.indicator

    @property
    def num_blanked(self) -> int:
        """Channels that a blank frame has as 0: all but the gap, which stands last."""
        return self.num_values * (2 if self.has_observed else 1)

    def gap_channel(self, gaps: NDArray[np.float32]) -> NDArray[np.float32]:
        mean, deviation = self.preprocessing.gap
        return (np.log1p(gaps) - np.float32(mean)) / np.float32(deviation)

    def integer(self, purpose: Purpose, number: int, top_B: Ints, starts_B: Ints | None = None) -> Ints:
        """0 to `top_B` inclusive, all alike likely."""
        u_B = self.draws.uniform(purpose, number, starts_B)
        return np.minimum((u_B * (top_B + 1)).astype(np.int64), top_B)


class _Slots:
    """Where the frames of a batch lie in its flat inputs."""

    def __init__(self, batch: Batch) -> None:
        self.packed = batch.form is Form.packed
        self.lengths_B = batch.lengths_B
        self.num_rows = len(batch.lengths_B)
        self.width = 0 if self.packed else batch.inputs.shape[1]
        self.first_B = np.concatenate(([0], np.cumsum(self.lengths_B)[:-1])) if self.packed else self._strides()

    def _strides(self) -> Ints:
        return np.arange(self.num_rows, dtype=np.int64) * self.width

    @cached_property
    def row_M(self) -> Ints:
        counts = self.lengths_B if self.packed else np.full(self.num_rows, self.width)
        return np.repeat(np.arange(self.num_rows), counts)

    @cached_property
    def position_M(self) -> Ints:
        return np.arange(len(self.row_M)) - self.first_B[self.row_M]

    @cached_property
    def valid_M(self) -> NDArray[np.bool_]:
        return self.position_M < self.lengths_B[self.row_M]

    @property
    def is_full(self) -> bool:
        """Whether no slot is padding."""
        return self.packed or bool((self.lengths_B == self.width).all())

    def flat(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of inputs or gaps with the slots in one dimension."""
        return array if self.packed else array.reshape(-1, *array.shape[2:])

    def spread(self, of_rows: NDArray[Any]) -> NDArray[Any]:
        """What is of rows [B, ...], to stand beside inputs [N, ...] or [B, 1, ...]."""
        return np.repeat(of_rows, self.lengths_B, axis=0) if self.packed else of_rows[:, None]


# ---- rows that lose frames ----


def _shortened(batch: Batch, change: _Change, multiple_of: int) -> Batch:
    slots = _Slots(batch)
    keep_M = _kept(slots, change)
    if keep_M.sum() == batch.lengths_B.sum():
        return batch
    kept_N = np.flatnonzero(keep_M)
    row_N = slots.row_M[kept_N]
    lengths_B = np.bincount(row_N, minlength=slots.num_rows).astype(np.int64)
    starts_B = np.concatenate(([0], np.cumsum(lengths_B)[:-1]))
    place_N = np.arange(len(kept_N)) - starts_B[row_N]
    width = -(-int(lengths_B.max()) // multiple_of) * multiple_of

    def laid_out(flat: NDArray[Any], empty: float = 0) -> NDArray[Any]:
        if slots.packed:
            return flat[kept_N]
        return _padded(flat[kept_N], row_N, place_N, (slots.num_rows, width), empty)

    changes: dict[str, Any] = {"inputs": laid_out(slots.flat(batch.inputs)), "lengths_B": lengths_B}
    if batch.gaps is not None:
        before_N = slots.flat(batch.gaps)[kept_N]
        gaps_N = _summed_gaps(slots.flat(batch.gaps), kept_N, place_N, slots.first_B[row_N])
        shape = (slots.num_rows, width)
        changes["gaps"] = gaps_N if slots.packed else _padded(gaps_N, row_N, place_N, shape, 0)
        if change.preprocessing.gap:
            moved_N = np.flatnonzero(gaps_N != before_N)
            at_N = moved_N if slots.packed else row_N[moved_N] * width + place_N[moved_N]
            flat = changes["inputs"].reshape(-1, changes["inputs"].shape[-1])
            flat[at_N, -1] = change.gap_channel(gaps_N[moved_N])
    if change.per_frame:
        from_N, shape = slots.position_M[kept_N], (slots.num_rows, width)
        if batch.values is not None:
            changes["values"] = _padded(batch.values[row_N, from_N], row_N, place_N, shape, np.nan)
        if batch.labels_BU.shape[1]:
            changes["labels_BU"] = _padded(batch.labels_BU[row_N, from_N], row_N, place_N, shape, -1)
            changes["label_lengths_B"] = lengths_B
    return batch._replace(**changes)


def _padded(flat_N: NDArray[Any], row_N: Ints, place_N: Ints, shape: tuple[int, int], empty: float) -> NDArray[Any]:
    whole = np.full((*shape, *flat_N.shape[1:]), empty, dtype=flat_N.dtype)
    whole[row_N, place_N] = flat_N
    return whole


def _kept(slots: _Slots, change: _Change) -> NDArray[np.bool_]:
    """Which slots stay: within the crop of their row, and not dropped; one of each row at least."""
    spec, lengths_B = change.spec, slots.lengths_B
    top_B = np.minimum(np.floor(spec.crop * lengths_B).astype(np.int64), lengths_B - 1)
    cut_B = change.integer(Purpose.crop, 0, top_B)
    first_B = change.integer(Purpose.crop, 1, cut_B)
    inside_M = (slots.position_M >= first_B[slots.row_M]) & (
        slots.position_M < (first_B + lengths_B - cut_B)[slots.row_M]
    )
    if not spec.drop:
        return inside_M
    u_M = change.draws.uniform_frames(Purpose.drop, slots.row_M, slots.position_M)
    keep_M = inside_M & (u_M >= spec.drop)
    left_B = np.bincount(slots.row_M[keep_M], minlength=slots.num_rows)
    for row in np.flatnonzero(left_B == 0):  # few: the frame that was nearest to staying
        start = slots.first_B[row] + first_B[row]
        window = u_M[start : start + lengths_B[row] - cut_B[row]]
        keep_M[start + int(window.argmax())] = True
    return keep_M


def _summed_gaps(gaps_M: NDArray[np.float32], kept_N: Ints, place_N: Ints, first_N: Ints) -> NDArray[np.float32]:
    """The gap of each kept frame and of those left out before it; 0 for the first of a row."""
    since_N = np.where(place_N == 0, first_N, np.roll(kept_N, 1) + 1)
    ends = np.stack((since_N, kept_N + 1), axis=1).ravel()
    sums_N = np.add.reduceat(np.append(gaps_M, 0).astype(np.float64), ends)[::2]  # [since, kept], each on its own
    return np.where(place_N == 0, 0, sums_N).astype(np.float32)


# ---- rows that keep their length ----


def _warped(batch: Batch, change: _Change) -> Batch:
    slots = _Slots(batch)
    row_M, position_M = slots.row_M, slots.position_M
    source_M = _warp_sources(slots, change)
    low_M = source_M.astype(np.int64)
    high_M = np.minimum(low_M + 1, slots.lengths_B[row_M] - 1)
    share_M = (source_M - low_M).astype(np.float32)
    # Padding comes from itself.
    low_M, high_M = (np.where(slots.valid_M, place_M, position_M) for place_M in (low_M, high_M))
    near_M = np.where(share_M < 0.5, low_M, high_M)
    first_M = slots.first_B[row_M]
    flat = slots.flat(batch.inputs)
    blended = flat[first_M + low_M]
    if change.has_observed:  # between a value and none there is nothing to blend
        num = change.num_values
        near = flat[first_M + near_M]
        both = (blended[:, num : 2 * num] > 0) & (flat[first_M + high_M, num : 2 * num] > 0)
        mixed = _between(blended[:, :num], flat[first_M + high_M, :num], share_M)
        near[:, :num] = np.where(both, mixed, near[:, :num])
        blended = near
    else:
        blended = _between(blended, flat[first_M + high_M], share_M)
    changes: dict[str, Any] = {}
    if batch.gaps is not None:
        gaps_M = _warped_gaps(slots, slots.flat(batch.gaps), low_M, high_M, share_M)
        changes["gaps"] = gaps_M.reshape(batch.gaps.shape)
        if change.preprocessing.gap:
            blended[:, -1] = np.where(slots.valid_M, change.gap_channel(gaps_M), 0)
    changes["inputs"] = blended.reshape(batch.inputs.shape)
    if change.per_frame:
        at = (row_M[slots.valid_M], position_M[slots.valid_M])
        source = (at[0], near_M[slots.valid_M])
        for name in ("values", "labels_BU"):
            old = getattr(batch, name)
            if old is not None and old.shape[1]:
                changes[name] = old.copy()
                changes[name][at] = old[source]
    return batch._replace(**changes)


def _warp_sources(slots: _Slots, change: _Change) -> NDArray[np.float64]:
    """Where in its row each slot's new frame comes from: two straight lines that meet at the moved middle."""
    last_B = (slots.lengths_B - 1).astype(np.float64)
    u_B = change.draws.uniform(Purpose.warp) * 2 - 1
    margin_B = MIDDLE_MARGIN * last_B
    middle_B = last_B / 2
    moved_B = np.clip(middle_B + u_B * change.spec.warp * slots.lengths_B, margin_B, last_B - margin_B)
    before_B = middle_B / np.where(moved_B > 0, moved_B, 1)
    rest_B = last_B - moved_B
    after_B = (last_B - middle_B) / np.where(rest_B > 0, rest_B, 1)
    row_M, position_M = slots.row_M, slots.position_M
    moved_M = moved_B[row_M]
    late_M = last_B[row_M] - (last_B[row_M] - position_M) * after_B[row_M]
    source_M = np.where(position_M <= moved_M, position_M * before_B[row_M], late_M)
    return np.clip(source_M, 0, last_B[row_M])


def _between(low: NDArray[np.float32], high: NDArray[np.float32], share_M: NDArray[np.float32]) -> Any:
    return low + share_M[:, None] * (high - low)


def _warped_gaps(
    slots: _Slots, gaps_M: NDArray[np.float32], low_M: Ints, high_M: Ints, share_M: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Time since the frame before, where frames moved together with their times."""
    width = int(slots.lengths_B.max()) if slots.packed else slots.width
    times_BT = np.zeros((slots.num_rows, width))
    times_BT[slots.row_M, slots.position_M] = gaps_M
    np.cumsum(times_BT, axis=1, out=times_BT)
    low, high = times_BT[slots.row_M, low_M], times_BT[slots.row_M, high_M]
    time_M = low + share_M.astype(np.float64) * (high - low)
    gap_M = np.diff(time_M, prepend=0.0)
    keep = slots.valid_M & (slots.position_M > 0)
    return np.where(keep, np.maximum(gap_M, 0), 0).astype(np.float32)


def _scaled(batch: Batch, change: _Change) -> Batch:
    factor_B = (1 + change.spec.scale * (2 * change.draws.uniform(Purpose.scale) - 1)).astype(np.float32)
    values = batch.inputs[..., : change.num_values]
    values *= _Slots(batch).spread(factor_B)[..., None]
    return batch


def _jittered(batch: Batch, change: _Change) -> Batch:
    slots, num = _Slots(batch), change.num_values
    flat = slots.flat(batch.inputs)
    open_MV = None if slots.is_full else slots.valid_M[:, None]
    if change.has_observed:
        open_MV = flat[:, num : 2 * num] > 0  # 0 at padding, too
    position_M = slots.position_M
    if change.starts_B is not None:
        position_M = position_M + change.starts_B[slots.row_M]
    change.draws.add_noise(flat[:, :num], change.spec.jitter, row_M=slots.row_M, position_M=position_M, open_MV=open_MV)
    return batch


def _channels_masked(batch: Batch, change: _Change) -> Batch:
    num, spec = change.num_values, change.spec
    widest = np.full(len(batch.lengths_B), int(spec.channel_mask_share * num))
    channel_D = np.arange(num)
    blank_BD = np.zeros((len(batch.lengths_B), num), dtype=bool)
    for i in range(spec.channel_masks):
        width_B = change.integer(Purpose.channel_mask, 2 * i, widest)
        first_B = change.integer(Purpose.channel_mask, 2 * i + 1, num - width_B)
        blank_BD |= (channel_D >= first_B[:, None]) & (channel_D < (first_B + width_B)[:, None])
    blank = np.tile(blank_BD, 2) if change.has_observed else blank_BD
    np.copyto(batch.inputs[..., : change.num_blanked], 0, where=_Slots(batch).spread(blank))
    return batch


def _times_masked(batch: Batch, change: _Change) -> Batch:
    slots, spec = _Slots(batch), change.spec
    longest_B = np.floor(spec.time_mask_share * batch.lengths_B).astype(np.int64)
    flat = slots.flat(batch.inputs)
    for i in range(spec.time_masks):
        width_B = change.integer(Purpose.time_mask, 2 * i, longest_B, change.starts_B)
        first_B = change.integer(Purpose.time_mask, 2 * i + 1, batch.lengths_B - width_B, change.starts_B)
        at = _spans(slots.first_B + first_B, width_B)
        if flat.ndim == 1:
            flat[at] = 0
        else:
            flat[at, : change.num_blanked] = 0
    return batch


def _spans(first_B: Ints, width_B: Ints) -> Ints:
    """first_B[i] .. first_B[i] + width_B[i] of every i, end to end."""
    starts_B = np.cumsum(width_B) - width_B
    return np.repeat(first_B - starts_B, width_B) + np.arange(int(width_B.sum()))
