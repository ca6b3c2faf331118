"""One microbatch, and the two layouts that its frames may have.

Shape letters: B rows, T time steps of the longest row, N frames of all rows laid end to end, C channels that a model
reads, U targets, K values of a target.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch", "Form"]


class Form(enum.Enum):
    """How the frames of a batch lie: a row beside the other with zeros behind the shorter ones, or end to end."""

    padded = "padded"
    packed = "packed"


class Batch(NamedTuple):
    """One microbatch.

    Args:
        inputs: padded int64 [B, T] or float32 [B, T, C], 0 behind a row's end; packed int64 [N] or float32 [N, C].
            Symbols are ids of the model's vocabulary, frames are scaled.
        lengths_B: frames of each row.
        labels_BU: label ids, [B, 1] of rows, [B, U] of sequences padded with 0, [B, T] of frames padded with -1;
            [B, 0] where targets are no labels.
        label_lengths_B: how many of them count.
        rows_B: row numbers of the data set.
        weights_B: what each row counts in the loss.
        values: raw float32 [B, K] of rows, or [B, T, K] of frames padded with NaN; None where targets are no values.
        gaps: raw time since the frame before, float32 [B, T] padded with 0, or packed [N]; None without times.
        form: the layout of `inputs` and `gaps`. Targets are padded in both.
    """

    # A tuple, because a loader makes thousands a second: a frozen dataclass takes six times as long.
    inputs: NDArray[Any]
    lengths_B: NDArray[np.int64]
    labels_BU: NDArray[np.int64]
    label_lengths_B: NDArray[np.int64]
    rows_B: NDArray[np.int64]
    weights_B: NDArray[np.float32]
    values: NDArray[np.float32] | None = None
    gaps: NDArray[np.float32] | None = None
    form: Form = Form.padded

    @property
    def frames(self) -> int:
        """Real time steps."""
        return int(self.lengths_B.sum())

    @property
    def slots(self) -> int:
        """Time steps that `inputs` has room for, padding included."""
        return self.inputs.shape[0] * (self.inputs.shape[1] if self.form is Form.padded else 1)
