"""How often a row stands in an epoch: once, unless its label is rare.

Shape letters: N rows, E entries: rows as often as they stand in the epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treadle.errors import ConfigError, DataError
from treadle.plan.order import Draw, raw_bits
from treadle.spec import BatchSpec

__all__ = ["class_repeats", "draw_entries"]

_GRAIN = 1 << 16
"""Repeats are whole multiples of 1 / _GRAIN: powers may differ in their last bit from machine to machine."""


def class_repeats(labels_N: NDArray[np.int64], batch: BatchSpec) -> NDArray[np.float64] | None:
    """How often each row is to stand in an epoch, on average, so that rare labels count more; None: all once.

    Args:
        labels_N: the label of each row; -1 where it has none, and the row stands once.
        batch: rows of a label that occurs n times where the most frequent one occurs m times stand
            (m / n) ** class_balance times, and max_repeats times at most.
    """
    known = labels_N[labels_N >= 0]
    if not batch.class_balance or not len(known):
        return None
    counts = np.bincount(known)
    ratios: NDArray[np.float64] = (counts.max() / np.maximum(counts, 1)) ** batch.class_balance
    ratios = np.round(np.minimum(ratios, batch.max_repeats) * _GRAIN) / _GRAIN
    return np.where(labels_N >= 0, ratios[labels_N], 1.0)


def draw_entries(repeats_N: NDArray[np.float64], *, seed: int, epoch: int) -> NDArray[np.uint32]:
    """The row of each entry of an epoch, ascending.

    A row stands floor(repeats) times, and once more with the probability of what is left.

    Raises:
        DataError: a number of repeats that is not finite or below 0.
        ConfigError: no row stands in this epoch.
    """
    repeats_N = np.asarray(repeats_N, np.float64)
    bad = ~(np.isfinite(repeats_N) & (repeats_N >= 0) & (repeats_N < 2**31))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"repeats of row {row}: got {repeats_N[row]}, expected a number from 0 up")
    whole_N = np.floor(repeats_N)
    times_N = whole_N.astype(np.int64)
    for start, raw in raw_bits(Draw.repeats, len(repeats_N), seed=seed, epoch=epoch):
        part = slice(start, start + len(raw))
        # A product by a power of two is exact, so the comparison is one of whole numbers.
        left = ((repeats_N[part] - whole_N[part]) * (1 << 53)).astype(np.uint64)
        times_N[part] += (raw >> np.uint64(11)) < left
    if not times_N.any():
        raise ConfigError("data: got no row that stands in the epoch, expected repeats above 0")
    return np.repeat(np.arange(len(repeats_N), dtype=np.uint32), times_N)
