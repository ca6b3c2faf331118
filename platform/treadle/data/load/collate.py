"""A padded batch of rows that come from a request instead of a data set; what a reader gives, bit for bit.

Shape letters: B rows, T time steps, N frames, D stored channels, C channels that a model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.data.load.gather import Scaling, put_gaps
from treadle.data.manifest import Preprocessing
from treadle.errors import DataError

__all__ = ["collate_inputs"]


def collate_inputs(
    values: Sequence[NDArray[Any]],
    preprocessing: Preprocessing,
    gaps: Sequence[NDArray[np.float32]] | None = None,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows as one padded array, [B, T] or [B, T, C], and their lengths; frames are scaled as in training.

    Args:
        values: of each row, at least one: ids of the model's vocabulary, or raw frames laid end to end, [N * D].
        preprocessing: of the model.
        gaps: of each row, the time since the frame before; for models that read it.

    Raises:
        DataError: no gaps for a model that reads them.
    """
    width = len(preprocessing.channels) or 1
    lengths_B = np.array([len(row) // width for row in values], np.int64)
    shape = (len(values), int(lengths_B.max()))
    if preprocessing.symbols:
        tokens_BT = np.zeros(shape, np.int64)
        for i, row in enumerate(values):
            tokens_BT[i, : len(row)] = row
        return tokens_BT, lengths_B
    scaling = Scaling.of(preprocessing)
    frames_BTC = np.zeros((*shape, scaling.width), np.float32)
    for i, row in enumerate(values):
        frames = scaling.scaled(row.reshape(-1, width).astype(np.float32, copy=False))
        frames_BTC[i, : len(frames), : frames.shape[1]] = frames
    if preprocessing.gap:
        if gaps is None:
            raise DataError("gaps: got none, expected the time since the frame before, which the model reads")
        gaps_BT = np.zeros(shape, np.float32)
        for i, row in enumerate(gaps):
            gaps_BT[i, : len(row)] = row
        put_gaps(frames_BTC, gaps_BT, lengths_B, preprocessing.gap)
    return frames_BTC, lengths_B
