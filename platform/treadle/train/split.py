"""Microbatches read in parts, where a device has too little memory for a whole one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from treadle.data import Batch, Form, StreamBatch
from treadle.errors import InfeasibleError
from treadle.train.feed import Micro

__all__ = ["Splitter", "out_of_memory", "split_batch"]

_SIGNS = ("can't allocate memory", "out of memory", "bad_alloc", "alloc_cpu")
"""How a CPU's RuntimeError says that it had too little memory; on CUDA there is a class for it."""
_CUT_SIGN = "[enforce fail a"
"""What is left of it where not even the message found room."""


class Splitter:
    """In how many parts microbatches are read: in one, until memory runs out, then in 2, 4, 8 and so on."""

    def __init__(self) -> None:
        self.parts = 1

    def shares(self, micros: Sequence[Micro]) -> list[tuple[Micro, ...]]:
        """A microbatch in parts of its rows; the pieces of one row stay as they are."""
        if self.parts == 1 or len(micros) > 1:
            return [tuple(micros)]
        whole = micros[0]
        batches = split_batch(whole.batch, self.parts)
        return [(replace(whole, batch=batch, part=number),) for number, batch in enumerate(batches)]

    def halve(self, micros: Sequence[Micro], why: str) -> None:
        """Read smaller parts from now on.

        Raises:
            InfeasibleError: each part is a single row already.
        """
        most_rows = max((len(micro.batch.lengths_B) for micro in micros), default=1)
        if self.parts >= most_rows:
            longest = max((int(micro.batch.lengths_B.max()) for micro in micros), default=0)
            raise InfeasibleError(
                f"memory: got too little for a single row of {longest} time steps ({why})",
                hint="batch.long_rows=chunk and a smaller batch.max_slots, a smaller model.hidden_size, or more memory",
            )
        self.parts *= 2


def out_of_memory(error: BaseException) -> str:
    """What an error says of memory that could not be had; "" where it is another."""
    line = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return line or type(error).__name__
    is_told = line == _CUT_SIGN or any(sign in line.lower() for sign in _SIGNS)
    return line if is_told and isinstance(error, RuntimeError) else ""


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut by rows into at most so many parts of about as many rows each; views, no copies."""
    num_rows = len(batch.lengths_B)
    bounds = np.linspace(0, num_rows, min(parts, num_rows) + 1).round().astype(int).tolist()
    if isinstance(batch, StreamBatch):  # what a feed of streams hands out in its place
        return [cast("Batch", batch.part(*span)) for span in itertools.pairwise(bounds)]
    frames = np.concatenate(([0], np.cumsum(batch.lengths_B)))
    return [_rows(batch, slice(a, b), slice(int(frames[a]), int(frames[b]))) for a, b in itertools.pairwise(bounds)]


def _rows(batch: Batch, rows: slice, frames: slice) -> Batch:
    """Some rows, padded as far as before: no new shapes."""
    of_frames = frames if batch.form is Form.packed else rows
    spans = dict.fromkeys(_PER_ROW, rows) | dict.fromkeys(_PER_FRAME, of_frames)
    return batch._replace(**{name: part[spans[name]] for name in spans if (part := getattr(batch, name)) is not None})


_PER_ROW = ("lengths_B", "labels_BU", "label_lengths_B", "rows_B", "weights_B", "values")
_PER_FRAME = ("inputs", "gaps")
