"""Evaluation of rows of any length, chunk by chunk, the state carried along each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from treadle.data import Lease, Manifest, RowReader, StreamBatch, ahead, read_pieces
from treadle.nn import Network
from treadle.plan import StreamPieces
from treadle.spec import JobSpec
from treadle.train.carry import run_streams
from treadle.train.evaluate import Evaluator, Judged
from treadle.train.frame_tasks import FrameTask
from treadle.train.precision import PrecisionChoice
from treadle.train.scores import Scores, Task
from treadle.train.world import World

__all__ = ["ChunkedEvaluator"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The `number`-th chunk of those of some rows that are long enough for it."""

    number: int
    rows_B: Ints
    batch: StreamBatch
    lease: Lease


class ChunkedEvaluator(Evaluator):
    """As `Evaluator`, for tasks of frames: the numbers of whole rows in the memory of a chunk of them.

    No state goes from one row to another, so the numbers depend neither on ranks nor on how rows are dealt.

    Args:
        spec: with `batch.streams`: so many rows are read side by side.
    """

    def __init__(
        self, spec: JobSpec, manifest: Manifest, reader: RowReader, *, split: str, task: Task, world: World
    ) -> None:
        super().__init__(spec, manifest, reader, split=split, task=task, world=world)
        assert isinstance(task, FrameTask)
        self._frame_task = task
        self._manifest = manifest
        self._rows = manifest.rows_of(split)
        self._rows_at_once, self._chunk = spec.batch.streams or 1, spec.batch.chunk

    def _judged(self, network: nn.Module, precision: PrecisionChoice, scores: Scores) -> list[Judged]:
        assert isinstance(network, Network)
        task, samples, state = self._frame_task, list[Judged](), dict[str, torch.Tensor]()
        for chunk in ahead(self._chunks):
            num_rows, rows_before = len(chunk.rows_B), scores.rows
            before = network.stack.initial_state(num_rows) if not chunk.number else state
            before = {name: part[:, :num_rows].contiguous() for name, part in before.items()}
            with precision.autocast():
                logits, state = run_streams(network, chunk.batch, before, self._world.device)
                loss = task.loss_sum(logits, chunk.batch)
            scores.loss_sum += float(loss)
            scores.loss_count += task.count(chunk.batch)
            judged = task.judge(scores, logits, chunk.batch, [])
            if chunk.number:
                scores.rows = rows_before  # they have been counted, and their beginnings kept
            else:
                samples += [(rows, *found) for rows, found in zip(chunk.rows_B[:, None], judged, strict=True)]
            chunk.lease.release()
        return samples

    def _chunks(self) -> Iterator[_Chunk]:
        """This rank's rows, the longest first, as many side by side as there are streams."""
        lengths_N = self._lengths[self._rows].astype(np.int64)
        order_N = np.argsort(-lengths_N, kind="stable")
        size = self._rows_at_once
        for start in range(self._world.rank * size, len(order_N), self._world.size * size):
            places_B = order_N[start : start + size]
            for number in range(-(-int(lengths_N[places_B[0]]) // self._chunk)):
                alive_B = places_B[lengths_N[places_B] > number * self._chunk]
                lease = self._buffers.lease()
                pieces = self._pieces(number, lengths_N[alive_B])
                rows_B = self._rows[alive_B]
                batch = read_pieces(self._reader, self._manifest, rows_B, pieces, lease=lease)
                yield _Chunk(number=number, rows_B=rows_B, batch=batch, lease=lease)

    def _pieces(self, number: int, lengths_B: Ints) -> StreamPieces:
        places_B, starts_B = np.arange(len(lengths_B)), np.full(len(lengths_B), number * self._chunk)
        return StreamPieces(
            streams_P=places_B,
            rows_P=places_B,
            starts_P=starts_B,
            stops_P=np.minimum(starts_B + self._chunk, lengths_B),
            begins_P=np.zeros(len(lengths_B), np.bool_),  # who begins is given the state to begin with
        )
