"""From a manifest and a plan to padded batches, one thread ahead of the training loop.

Shape letters: B rows, T time steps, D channels, U labels.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from treadle.data.manifest import Manifest, Preprocessing
from treadle.errors import IntegrityError

__all__ = ["Batch", "RowReader", "ahead", "collate_inputs"]


class Readable(Protocol):
    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def local_path(self, key: str) -> Path | None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One microbatch, padded at the end with zeros.

    Args:
        inputs: int64 [B, T] of symbol ids, or float32 [B, T, D] of scaled frames.
        lengths_B: time steps of each row, int64.
        labels_BU: label ids, padded with 0. label_lengths_B: how many of them count.
        rows_B: row numbers in the manifest.
    """

    inputs: NDArray[Any]
    lengths_B: NDArray[np.int64]
    labels_BU: NDArray[np.int64]
    label_lengths_B: NDArray[np.int64]
    rows_B: NDArray[np.int64]

    @property
    def frames(self) -> int:
        return int(self.lengths_B.sum())

    @property
    def slots(self) -> int:
        return int(self.inputs.shape[0] * self.inputs.shape[1])


class RowReader:
    """Reads rows by number, block by block, each block checked when it is read. Threads may share it.

    Args:
        blobs: where the shards are; local folders are mapped into memory, others read by range.
        cache_blocks: decoded blocks kept.
    """

    def __init__(self, blobs: Readable, manifest: Manifest, *, cache_blocks: int = 256) -> None:
        self._blobs = blobs
        self._manifest = manifest
        self._cache_blocks = cache_blocks
        self._blocks: OrderedDict[int, _Decoded] = OrderedDict()
        self._maps: dict[str, pa.Buffer] = {}
        self._schemas: dict[str, pa.Schema] = {}
        self._lock = threading.Lock()

    def batch(self, rows_B: NDArray[np.int64]) -> Batch:
        """The padded batch of these rows.

        Raises:
            IntegrityError: a block is not what was written; the message names it.
        """
        values, labels = self._rows(rows_B)
        label_lengths = np.array([len(row) for row in labels], np.int64)
        labels_BU = np.zeros((len(rows_B), int(label_lengths.max())), np.int64)
        for i, row in enumerate(labels):
            labels_BU[i, : len(row)] = row
        inputs, lengths = collate_inputs(values, self._manifest.header.preprocessing)
        return Batch(
            inputs=inputs,
            lengths_B=lengths,
            labels_BU=labels_BU,
            label_lengths_B=label_lengths,
            rows_B=rows_B,
        )

    def entity(self, row: int) -> str:
        """The entity of a row, as the preparation script named it."""
        column = self._manifest.columns
        return self._block(int(column["block"][row])).entities[int(column["row"][row])].as_py()

    def _rows(self, rows_B: NDArray[np.int64]) -> tuple[list[NDArray[Any]], list[NDArray[np.int32]]]:
        columns = self._manifest.columns
        values: list[NDArray[Any]] = []
        labels: list[NDArray[np.int32]] = []
        for number, i in zip(columns["block"][rows_B].tolist(), columns["row"][rows_B].tolist(), strict=True):
            block = self._block(number)
            values.append(block.values[block.value_offsets[i] : block.value_offsets[i + 1]])
            labels.append(block.labels[block.label_offsets[i] : block.label_offsets[i + 1]])
        return values, labels

    def _block(self, number: int) -> _Decoded:
        with self._lock:  # evaluation reads on the main thread while the next batches are read ahead
            found = self._blocks.get(number)
            if found is None:
                found = self._blocks[number] = self._read(number)
                if len(self._blocks) > self._cache_blocks:
                    self._blocks.popitem(last=False)
            else:
                self._blocks.move_to_end(number)
            return found

    def _read(self, number: int) -> _Decoded:
        block = self._manifest.header.blocks[number]
        raw = self._bytes(block.key, block.offset, block.size)
        if xxhash.xxh3_128_hexdigest(raw) != block.checksum:
            raise IntegrityError(
                f"{block.key}: block {number} is not what was written (checksum)", hint="prepare the data set again"
            )
        if block.key not in self._schemas:
            head = self._bytes(block.key, 8, self._manifest.header.blocks[self._first(block.key)].offset - 8)
            self._schemas[block.key] = pa.ipc.read_schema(pa.py_buffer(head))
        batch = pa.ipc.read_record_batch(pa.py_buffer(raw), self._schemas[block.key])
        values, labels = batch.column("values"), batch.column("labels")
        return _Decoded(
            values=values.values.to_numpy(),
            value_offsets=values.offsets.to_numpy(),
            labels=labels.values.to_numpy(),
            label_offsets=labels.offsets.to_numpy(),
            entities=batch.column("entity"),
        )

    def _first(self, key: str) -> int:
        return next(i for i, block in enumerate(self._manifest.header.blocks) if block.key == key)

    def _bytes(self, key: str, offset: int, size: int) -> Any:
        path = self._blobs.local_path(key)
        if path is None:
            return self._blobs.get(key, offset=offset, size=size)
        if key not in self._maps:
            try:
                self._maps[key] = pa.memory_map(str(path)).read_buffer()
            except OSError as error:
                raise IntegrityError(f"{key}: {error}", hint="prepare the data set again") from None
        if offset + size > self._maps[key].size:
            raise IntegrityError(f"{key}: cut off at {self._maps[key].size} bytes", hint="prepare the data set again")
        return self._maps[key].slice(offset, size)


@dataclass(frozen=True, eq=False)
class _Decoded:
    values: NDArray[Any]
    value_offsets: NDArray[np.int64]
    labels: NDArray[np.int32]
    label_offsets: NDArray[np.int32]
    entities: pa.Array


def collate_inputs(
    values: Sequence[NDArray[Any]], preprocessing: Preprocessing
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat rows as one padded array and their lengths; frames are scaled as in training."""
    if preprocessing.symbols:
        lengths = np.array([len(row) for row in values], np.int64)
        tokens_BT = np.zeros((len(values), int(lengths.max())), np.int64)
        for i, row in enumerate(values):
            tokens_BT[i, : len(row)] = row
        return tokens_BT, lengths
    width = len(preprocessing.channels)
    lengths = np.array([len(row) // width for row in values], np.int64)
    frames_BTD = np.zeros((len(values), int(lengths.max()), width), np.float32)
    mean = np.array(preprocessing.mean, np.float32)
    deviation = np.array(preprocessing.deviation, np.float32)
    for i, row in enumerate(values):
        frames_BTD[i, : lengths[i]] = (row.reshape(-1, width) - mean) / deviation
    return frames_BTD, lengths


def ahead(make: Callable[[], Iterator[Any]], *, depth: int = 2) -> Iterator[Any]:
    """The items of `make()`, produced by one thread at most `depth` items ahead.

    NumPy's copies release the interpreter lock, so one thread costs a fifth of worker processes. The
    thread ends when the iterator is closed or exhausted; an error in it is raised here.
    """
    items: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            for item in make():
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=run, name="treadle-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
