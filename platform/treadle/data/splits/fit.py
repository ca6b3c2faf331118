"""What is measured of the training rows, and of no others: scales, vocabulary, target values.

Shape letters: R rows of a block, N frames of all rows laid end to end, D channels, V values laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.data.blocks import BlockRows
from treadle.data.draft import SPLITS
from treadle.data.manifest import NO_SPLIT, Content, Manifest, Preprocessing
from treadle.errors import ConfigError, DataError
from treadle.spec import DataSpec, Missing, TargetKind

__all__ = ["UNKNOWN", "Moments", "RowSource", "fit_preprocessing"]

UNKNOWN = "<unknown>"
"""The symbol with id 0 of every model: what no training row held."""

_CHUNK = 1 << 16
"""Values worked on at once. 65,536 of them in float64 stay in the second-level cache: 2.2 to 2.8 GB/s of float32 on one
core, where chunks of 4,096 gave 1.1."""
_FOLD = 1024
"""Least width of an addition: numpy adds rows of a few channels ten times slower than rows of a thousand."""

_RUN_BYTES = 256
"""Runs of rows below it are copied faster frame by frame than each by itself."""


class RowSource(Protocol):
    """The part of a reader that fitting and auditing need."""

    def blocks(self) -> Iterator[tuple[int, BlockRows]]:
        """All blocks in order, each with the number of its first row."""
        ...

    def raw(self, rows: NDArray[np.int64], /) -> BlockRows:
        """Some rows as they are stored, in the asked order."""
        ...


class Moments:
    """Mean and deviation of channels over observed values, seen piece by piece.

    Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance": pieces are merged pairwise.
    Each piece is shifted by the mean so far (the first by its first value), so that nothing large cancels.

    Accuracy: 1e-9 of the deviation for means of 1e6 deviations (tests/unit/data/test_preprocessing.py).
    """

    def __init__(self, width: int) -> None:
        self.count_D = np.zeros(width, np.int64)
        self.mean_D = np.zeros(width)
        self._squares_D = np.zeros(width)

    @property
    def deviation_D(self) -> NDArray[np.float64]:
        """Of the whole population; 1 where all values are one value."""
        deviation_D = np.sqrt(self._squares_D / np.maximum(self.count_D, 1))
        return np.where(deviation_D > 0, deviation_D, 1.0)

    def add(self, values_V: NDArray[Any], *, missing: bool = False) -> None:
        """Take in frames laid end to end.

        Args:
            values_V: D values for each frame.
            missing: whether a value may be NaN: not observed.
        """
        if not len(values_V):
            return
        shift_D = self._shift(values_V, missing=missing)
        count_D, sum_D, squares_D = _shifted_sums(values_V, shift_D, missing=missing)
        seen_D = np.maximum(count_D, 1)
        squares_D = np.maximum(squares_D - sum_D**2 / seen_D, 0)
        total_D = np.maximum(self.count_D + count_D, 1)
        apart_D = np.where(count_D > 0, shift_D + sum_D / seen_D - self.mean_D, 0)
        self._squares_D += squares_D + apart_D**2 * (self.count_D * (count_D / total_D))
        self.mean_D += np.where(self.count_D > 0, apart_D * (count_D / total_D), apart_D)
        self.count_D += count_D

    def _shift(self, values_V: NDArray[Any], *, missing: bool) -> NDArray[np.float64]:
        values_ND = values_V.reshape(-1, len(self.mean_D))
        if self.count_D.all():
            return self.mean_D.copy()
        first_D = (~np.isnan(values_ND)).argmax(axis=0) if missing else np.zeros(len(self.mean_D), np.int64)
        value_D = np.nan_to_num(values_ND[first_D, np.arange(len(first_D))].astype(np.float64))
        return np.where(self.count_D > 0, self.mean_D, value_D)


def _shifted_sums(
    values_V: NDArray[Any], shift_D: NDArray[np.float64], *, missing: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Per channel: how many values are observed, the sum and the sum of squares of their distances from the shift."""
    width = len(shift_D)
    step = max(_CHUNK // width, 1) * width
    shifts, room = np.tile(shift_D, step // width), np.empty(min(step, len(values_V)))
    count_D = np.full(width, len(values_V) // width)
    sum_D, squares_D = np.zeros(width), np.zeros(width)
    for start in range(0, len(values_V), step):
        chunk = values_V[start : start + step]
        apart = np.subtract(chunk, shifts[: len(chunk)], out=room[: len(chunk)])
        if missing:
            count_D -= _blank(apart, width)
        sum_D += _fold_sum(apart, width)
        squares_D += _fold_sum(np.multiply(apart, apart, out=apart), width)
    return count_D, sum_D, squares_D


def _blank(apart: NDArray[np.float64], width: int) -> NDArray[np.int64]:
    """Zero what is NaN; gives how many of each channel are.

    By bits and without a branch for each value: assigning through a mask takes six times as long where 3 in 10 are NaN.
    """
    hidden = np.isnan(apart).view(np.int8)
    bits = apart.view(np.int64)
    np.bitwise_and(bits, np.subtract(hidden, 1, dtype=np.int64), out=bits)
    return _fold_sum(hidden, width, dtype=np.int8)  # a column of a chunk has 127 values at most


def _fold_sum(values_V: NDArray[Any], width: int, dtype: Any = None) -> NDArray[Any]:
    """The sum over frames of each channel; `dtype` holds the first sums, of `_FOLD` columns."""
    wide = max(_FOLD // width, 1) * width
    head = len(values_V) // wide * wide
    folded = values_V[:head].reshape(-1, wide).sum(axis=0, dtype=dtype).reshape(-1, width).sum(axis=0)
    return folded + values_V[head:].reshape(-1, width).sum(axis=0)


def fit_preprocessing(rows: Manifest, split_R: NDArray[np.uint8], reader: RowSource, data: DataSpec) -> Preprocessing:
    """How stored values become what a model reads, measured on the training rows alone.

    Args:
        rows: what is in the blocks. split_R: place in SPLITS of each row, or NO_SPLIT.
        data: `missing` and `gaps` are read.

    Raises:
        ConfigError: `data.gaps` of rows without times.
        DataError: values missing where `data.missing` refuses them, or channels and targets that no training row has.

    Cost: one pass over the blocks, one of them in memory at a time; beside reading them 1 to 2 GB/s of float32 frames
    on one core.
    """
    content = rows.header.content
    if data.gaps and not content.timed:
        raise ConfigError(
            "data.gaps: got true for rows without times", hint="columns.times=<column>, or data.gaps=false"
        )
    fitted = _Fitted(content, data)
    for first, block in reader.blocks():
        fitted.add(block, split_R[first : first + block.num_rows])
    return fitted.result(int((split_R == SPLITS.index("train")).sum()))


class _Fitted:
    """What the blocks seen so far say."""

    def __init__(self, content: Content, data: DataSpec) -> None:
        self.content = content
        self.data = data
        self.frames = Moments(len(content.channels)) if content.channels else None
        self.values = Moments(len(content.value_names)) if content.target is TargetKind.values else None
        self.gap = Moments(1) if data.gaps else None
        self.seen = np.zeros(len(content.symbols), bool)
        self.missing_D = np.zeros(len(content.channels), np.int64)

    def add(self, block: BlockRows, split_R: NDArray[np.uint8]) -> None:
        train_R = split_R == SPLITS.index("train")
        if self.content.missing and self.data.missing is Missing.refuse:
            self._count_missing(block, split_R != NO_SPLIT)
        if not train_R.any():
            return
        values = _kept(block.values, block.value_offsets, train_R, width=len(self.content.channels) or 1)
        if self.frames is not None:
            self.frames.add(values, missing=self.content.missing)
        else:
            self.seen[values] = True
        if self.values is not None:
            width = len(self.content.value_names)
            self.values.add(_kept(block.targets, block.target_offsets, train_R, width=width), missing=True)
        if self.gap is not None:
            self.gap.add(np.log1p(self._gaps(block, train_R)))

    def _gaps(self, block: BlockRows, train_R: NDArray[np.bool_]) -> NDArray[np.float64]:
        assert block.gaps_N is not None
        offsets = block.value_offsets // (len(self.content.channels) or 1)
        return _kept(block.gaps_N, offsets, train_R, width=1).astype(np.float64)

    def _count_missing(self, block: BlockRows, used_R: NDArray[np.bool_]) -> None:
        width = len(self.content.channels)
        hidden = np.isnan(_kept(block.values, block.value_offsets, used_R, width=width))
        self.missing_D += _fold_sum(hidden, width)

    def result(self, fitted_rows: int) -> Preprocessing:
        self._check()
        content, frames, values = self.content, self.frames, self.values
        symbols = [content.symbols[i] for i in np.flatnonzero(self.seen)]
        return Preprocessing(
            symbols=(UNKNOWN, *(s for s in symbols if s != UNKNOWN)) if content.symbols else (),
            channels=content.channels,
            mean=tuple(frames.mean_D.tolist()) if frames else (),
            deviation=tuple(frames.deviation_D.tolist()) if frames else (),
            labels=content.labels,
            missing=self.data.missing if frames else Missing.refuse,
            gap=(float(self.gap.mean_D[0]), float(self.gap.deviation_D[0])) if self.gap else (),
            values=tuple(zip(values.mean_D.tolist(), values.deviation_D.tolist(), strict=True)) if values else (),
            fitted_rows=fitted_rows,
        )

    def _check(self) -> None:
        """Refuse what cannot be scaled."""
        if count := int(self.missing_D.sum()):
            named = ", ".join(
                f"{self.content.channels[i]} ({self.missing_D[i]})" for i in np.flatnonzero(self.missing_D)[:5]
            )
            raise DataError(
                f"data.missing: got {count} values that are missing, in {named}; expected none",
                hint="data.missing=mean or data.missing=indicator",
            )
        for what, names, moments in (
            ("channels", self.content.channels, self.frames),
            ("targets", self.content.value_names, self.values),
        ):
            if moments is not None and not moments.count_D.all():
                named = ", ".join(repr(names[i]) for i in np.flatnonzero(moments.count_D == 0)[:10])
                raise DataError(
                    f"{what}: got {named} without a value in any training row, expected one at least",
                    hint="leave them out, or another split.seed",
                )


def _kept(values: NDArray[Any], offsets: NDArray[np.int64], keep_R: NDArray[np.bool_], *, width: int) -> NDArray[Any]:
    """The values of some rows, laid end to end; a copy unless all are kept."""
    if keep_R.all():
        return values[offsets[0] : offsets[-1]]
    edges = offsets[np.flatnonzero(np.diff(keep_R.view(np.int8), prepend=0, append=0))]
    if values.nbytes >= _RUN_BYTES * len(edges):
        runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        return np.concatenate([values[:0], *(values[start:stop] for start, stop in runs)])
    keep_N = np.repeat(keep_R, np.diff(offsets) // width)
    return values[offsets[0] : offsets[-1]].reshape(-1, width)[keep_N].reshape(-1)
