"""From row numbers to batches, at the speed of memory.

Shape letters: R rows, B rows of a batch, T time steps, N frames of all rows laid end to end, C channels that a model
reads, U targets, K values of a target.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from treadle.data.blocks import BlockRows
from treadle.data.load.batch import Batch, Form
from treadle.data.load.block_cache import BlockCache
from treadle.data.load.buffers import Lease
from treadle.data.load.fetch_blocks import FarBlocks, Reading
from treadle.data.load.gather import Column, Gather, Located, Scaling, put_gaps
from treadle.data.load.gather_native import best_gather
from treadle.data.load.near import BlockSource, NearBlocks
from treadle.data.load.opened import OpenBlocks
from treadle.data.manifest import Manifest
from treadle.data.order import starts_of
from treadle.spec import TargetKind, TargetPer

__all__ = ["Readable", "RowReader"]

Ints = NDArray[np.int64]
_T = TypeVar("_T")
_New = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]
_ALIGNED = 16
"""Numbers: batches begin at a cache line."""
_AHEAD = 4
"""Blocks in memory before `blocks` comes to them."""


class Readable(Protocol):
    """A store of shards."""

    def get(self, key: str, *, offset: int = 0, size: int | None = None) -> bytes: ...
    def local_path(self, key: str) -> Path | None: ...


class RowReader:
    """Reads rows by number. Every block is checked when it is first used. Threads may share a reader.

    Args:
        blobs: where the shards are. Those in a folder are mapped into memory, others are read by range.
        manifest: of the data set; `batch` needs one that is split.
        cache: where blocks of a far store are kept; None: nowhere but in memory.
        reading: how blocks are read that are not mapped.
        mapped: whether blocks in a folder are mapped; pages that were touched stay resident then, as far as there is
            memory, and count as this process's.
        gather: who copies; C where there is a compiler.
    """

    def __init__(
        self,
        blobs: Readable,
        manifest: Manifest,
        *,
        cache: BlockCache | None = None,
        reading: Reading | None = None,
        mapped: bool = True,
        gather: Gather | None = None,
    ) -> None:
        self._manifest = manifest
        self._gather = gather or best_gather()
        preprocessing = manifest.header.preprocessing
        content = manifest.header.content
        self._gap = () if preprocessing is None else preprocessing.gap
        self._scaling = None if preprocessing is None or not content.channels else Scaling.of(preprocessing)
        self._symbol_ids = None if preprocessing is None else _ids_of(content.symbols, preprocessing.symbols, other=0)
        self._label_ids = None if preprocessing is None else _ids_of(content.labels, preprocessing.labels, other=-1)
        labels_R = _row_labels(manifest, self._label_ids)
        self._is_class = labels_R is not None
        self._open = OpenBlocks(_source(blobs, manifest, cache, reading, mapped=mapped), manifest, labels_R)
        self._lock = threading.Lock()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads that read ahead. Arrays that were given out stay."""
        self._open.source.close()

    def batch(
        self,
        rows_B: Ints,
        *,
        form: Form = Form.padded,
        starts_B: Ints | None = None,
        stops_B: Ints | None = None,
        steps: int = 0,
        lease: Lease | None = None,
    ) -> Batch:
        """The batch of these rows, in this order.

        Args:
            rows_B: row numbers, at least one; a row may stand there more than once.
            form: padded or packed.
            starts_B, stops_B: frames of each row to read, [start, stop); None: all.
            steps: time steps to pad to, where that is more than the longest row.
            lease: memory that is used again; fresh where there is none.

        Raises:
            IntegrityError: a block is not what was written; the message names it.
            TransientError: a far store does not answer.

        Cost: .6 of the rate of a plain copy of as many bytes (tests/bench/data_loading.py).
        """
        rows_B = np.ascontiguousarray(rows_B, np.int64)
        starts_B = None if starts_B is None else np.ascontiguousarray(starts_B, np.int64)
        stops_B = None if stops_B is None else np.ascontiguousarray(stops_B, np.int64)

        def made() -> Batch | None:
            found = self._gather.locate(self._open.values, rows_B, starts_B, stops_B)
            return None if found is None else self._batches(found, stops_B, form, [steps], lease)[0]

        return self._with_open(rows_B, made)

    def batches(
        self, parts: Sequence[Ints], *, form: Form = Form.padded, steps: Sequence[int] = (), lease: Lease | None = None
    ) -> list[Batch]:
        """The batch of each of several lists of rows.

        Cost: less than as many calls of `batch`: what Python does between two copies takes a third of the time of one
        while it does it with cold caches.
        """
        rows_B = np.concatenate(parts).astype(np.int64, copy=False)
        sizes = [len(part) for part in parts]

        def made() -> list[Batch] | None:
            found = self._gather.locate(self._open.values, rows_B, sizes=sizes)
            return None if found is None else self._batches(found, None, form, steps, lease)

        return self._with_open(rows_B, made)

    def raw(self, rows_R: Ints) -> BlockRows:
        """These rows as they are stored, copied, in this order.

        All their blocks are open at once: ask for few rows of a large data set, or for neighbours.
        """
        rows_R = np.ascontiguousarray(rows_R, np.int64)

        def made() -> BlockRows | None:
            found = self._gather.locate(self._open.values, rows_R)
            return None if found is None else self._raw(found)

        return self._with_open(rows_R, made)

    def blocks(self) -> Iterator[tuple[int, BlockRows]]:
        """All blocks in order, each with the number of its first row; views of memory that stays while they do."""
        opened, starts = self._open, self._open.starts
        for number in range(len(opened.blocks)):
            opened.source.expect(range(number + 1, min(number + 1 + _AHEAD, len(opened.blocks))))
            with self._lock:
                rows = opened.rows.get(number)
            yield int(starts[number]), opened.read([number])[0] if rows is None else rows

    def entity(self, row: int) -> str:
        """The entity of a row, as its source named it."""
        (number,) = self._open.blocks_of(np.array([row]))
        within = row - int(self._open.starts[number])

        def made() -> str | None:
            rows = self._open.rows.get(number)
            return None if rows is None else rows.entities[within].as_py()

        return self._with_open(np.array([row]), made)

    def labels(self, rows_R: Ints) -> tuple[Ints, Ints]:
        """`labels_BU` and `label_lengths_B` of a batch of these rows, without the rest of it."""
        rows_R = np.ascontiguousarray(rows_R, np.int64)

        def made() -> tuple[Ints, Ints] | None:
            found = self._gather.locate(self._open.values, rows_R)
            return None if found is None else self._targets(found, None, found.largest[0], np.empty)[:2]

        return self._with_open(rows_R, made)

    @property
    def is_far(self) -> bool:
        """Whether it is worth saying which rows will be needed."""
        return self._open.source.max_bytes is not None

    def expect(self, rows: Ints) -> bool:
        """Begin to read the blocks of rows that are needed soon; False where enough is under way."""
        with self._lock:
            numbers = [number for number in self._open.blocks_of(rows) if number not in self._open.rows]
        return self._open.source.expect(numbers)

    def _with_open(self, rows_B: Ints, made: Callable[[], _T | None]) -> _T:
        """What `made` gives when the blocks of these rows are open, under the lock."""
        with self._lock:
            result = made()
        if result is not None:
            return result
        wanted = self._open.blocks_of(rows_B)
        with self._lock:
            self._open.wanted.update(wanted)
        try:
            missing = [number for number in wanted if number not in self._open.rows]
            blocks = self._open.read(missing)
            with self._lock:
                for number, rows in zip(missing, blocks, strict=True):
                    self._open.add(number, rows)
                result = made()
        finally:
            with self._lock:
                self._open.wanted.subtract(wanted)
        assert result is not None
        return result

    def _batches(
        self, found: Located, stops_B: Ints | None, form: Form, steps: Sequence[int], lease: Lease | None
    ) -> list[Batch]:
        """Every batch of what was found; `stops_B` goes with a single one."""
        longest = found.largest
        if any(steps):
            longest = [max(*pair) for pair in zip(longest, steps, strict=True)]
        widths = [0] * len(longest) if form is Form.packed else longest
        inputs = self._inputs(found, widths, lease)
        if self._is_class and self._open.gaps is None:
            return self._class_batches(found, inputs, form)
        batches: list[Batch] = []
        new = np.empty if lease is None else lease.array
        for number, filled in enumerate(inputs):
            part = found.part(number)
            labels_BU, label_lengths_B, values = self._targets(part, stops_B, longest[number], new)
            gaps = None
            if self._open.gaps is not None:
                gaps = self._gaps(self._open.gaps, part, stops_B, widths[number], new)
                if self._gap:
                    put_gaps(filled, gaps, part.counts_B, self._gap)
            batches.append(
                Batch(
                    inputs=filled,
                    lengths_B=part.counts_B,
                    labels_BU=labels_BU,
                    label_lengths_B=label_lengths_B,
                    rows_B=part.rows_B,
                    weights_B=part.weights_B,
                    values=values,
                    gaps=gaps,
                    form=form,
                )
            )
        return batches

    def _class_batches(self, found: Located, inputs: Sequence[NDArray[Any]], form: Form) -> list[Batch]:
        """Batches of rows with one label each and nothing else.

        What Python does between two copies runs with cold caches: this took a fifth of the time of a batch when it was
        done as for all others.
        """
        rows_B, counts_B, weights_B = found.rows_B, found.counts_B, found.weights_B
        labels_BU, ones_B = found.labels_B[:, None], np.ones(len(rows_B), np.int64)
        a, batches = 0, []
        for filled, b in zip(inputs, found.edges[1:], strict=True):
            batches.append(
                Batch(filled, counts_B[a:b], labels_BU[a:b], ones_B[a:b], rows_B[a:b], weights_B[a:b], None, None, form)
            )
            a = b
        return batches

    def _inputs(self, found: Located, widths: Sequence[int], lease: Lease | None) -> list[NDArray[Any]]:
        """Of each batch, one behind the other in the same memory."""
        scaling, new = self._scaling, np.empty if lease is None else lease.array
        shapes, places, size = [], [], 0
        for a, b, width, total in zip(found.edges, found.edges[1:], widths, found.totals, strict=False):
            count, shape = ((b - a) * width, (b - a, width)) if width else (total, (total,))
            if scaling is not None:
                count, shape = count * scaling.width, (*shape, scaling.width)
            shapes.append(shape)
            places.append(size)
            size += -(-count // _ALIGNED) * _ALIGNED
        flat: NDArray[Any] = new((size,), np.int64 if scaling is None else np.float32)
        inputs = [
            flat[place : place + math.prod(shape)].reshape(shape) for place, shape in zip(places, shapes, strict=True)
        ]
        if scaling is not None:
            self._gather.frames(self._open.values, found, flat, places, widths, scaling)
            return inputs
        for number, (out, width) in enumerate(zip(inputs, widths, strict=True)):
            self._gather.ids(self._open.values, found.part(number), out, width, self._symbol_ids)
        return inputs

    def _gaps(self, column: Column, found: Located, stops_B: Ints | None, steps: int, new: _New) -> NDArray[np.float32]:
        gaps = new((len(found.rows_B), steps) if steps else (found.totals[0],), np.float32)
        self._gather.copy(column, self._frames_of(column, found, stops_B), gaps[..., None], steps)
        return gaps

    def _targets(
        self, found: Located, stops_B: Ints | None, longest: int, new: _New
    ) -> tuple[Ints, Ints, NDArray[np.float32] | None]:
        """(labels_BU, label_lengths_B, values) of the rows."""
        if self._is_class:
            return found.labels_B[:, None], np.ones(len(found.rows_B), np.int64), None
        column, content, rows_B = self._open.targets, self._manifest.header.content, found.rows_B
        none_B, num_rows = np.zeros(len(rows_B), np.int64), len(rows_B)
        per, nothing_BU = content.target_per, np.zeros((num_rows, 0), np.int64)
        if column is None:
            return nothing_BU, none_B, None
        per_frame = per is TargetPer.frame
        targets = self._frames_of(column, found, stops_B) if per_frame else self._items_of(column, rows_B)
        steps = longest if per_frame else targets.largest[0]
        if content.target is TargetKind.labels:
            labels_BU = new((num_rows, steps), np.int64)
            self._gather.ids(column, targets, labels_BU, steps, self._label_ids, -1 if per_frame else 0)
            return labels_BU, targets.counts_B, None
        values = new((num_rows, steps, column.width), np.float32)
        self._gather.copy(column, targets, values, steps, np.nan)
        return nothing_BU, none_B, values if per_frame else values[:, 0]

    def _frames_of(self, column: Column, found: Located, stops_B: Ints | None) -> Located:
        """The same frames in another column."""
        located = self._gather.locate(column, found.rows_B, found.starts_B, stops_B)
        assert located is not None  # all columns of a block open together
        return located

    def _items_of(self, column: Column, rows_R: Ints) -> Located:
        """All that these rows have in another column."""
        located = self._gather.locate(column, rows_R)
        assert located is not None
        return located

    def _raw(self, found: Located) -> BlockRows:
        """Rows as they are stored; all their blocks are open."""
        opened, content = self._open, self._manifest.header.content
        dtype = np.float32 if content.channels else np.int32
        values = self._copied(opened.values, found, dtype)
        targets, target_counts = np.zeros(0, np.int32), np.zeros(len(found.rows_B), np.int64)
        if opened.targets is not None:
            located = self._items_of(opened.targets, found.rows_B)
            dtype = np.float32 if content.target is TargetKind.values else np.int32
            targets = self._copied(opened.targets, located, dtype)
            target_counts = located.counts_B * opened.targets.width
        gaps = None
        if opened.gaps is not None:
            gaps = self._copied(opened.gaps, self._items_of(opened.gaps, found.rows_B), np.float32)
        return BlockRows(
            values=values,
            value_offsets=starts_of(found.counts_B * opened.values.width),
            targets=targets,
            target_offsets=starts_of(target_counts),
            gaps_N=gaps,
            entities=self._entities(found.rows_B),
        )

    def _copied(self, column: Column, found: Located, dtype: DTypeLike) -> NDArray[Any]:
        out = np.empty((found.totals[0], column.width), dtype)
        self._gather.copy(column, found, out, 0)
        return out.reshape(-1)

    def _entities(self, rows_R: Ints) -> pa.StringArray:
        order_R = np.argsort(rows_R, kind="stable")
        sorted_R = rows_R[order_R]
        numbers = np.searchsorted(self._open.starts, sorted_R, side="right") - 1
        parts = []
        for number in np.unique(numbers).tolist():
            within = sorted_R[numbers == number] - int(self._open.starts[number])
            parts.append(self._open.rows[number].entities.take(pa.array(within)))
        whole = pa.concat_arrays(parts) if parts else pa.array([], pa.string())
        return whole.take(pa.array(np.argsort(order_R, kind="stable")))


def _source(
    blobs: Readable, manifest: Manifest, cache: BlockCache | None, reading: Reading | None, *, mapped: bool
) -> BlockSource:
    blocks = manifest.header.blocks
    paths = {key: blobs.local_path(key) for key in dict.fromkeys(block.key for block in blocks)}
    if mapped and all(path is not None for path in paths.values()):
        return NearBlocks({key: path for key, path in paths.items() if path is not None}, blocks)
    return FarBlocks(blobs, blocks, cache, reading)


def _row_labels(manifest: Manifest, label_ids: Ints | None) -> Ints | None:
    """The label of each row as a model knows it, where there is one per row."""
    content = manifest.header.content
    if content.target is not TargetKind.labels or content.target_per is not TargetPer.row:
        return None
    labels_R = manifest.columns["label"].astype(np.int64)
    return labels_R if label_ids is None else np.where(labels_R < 0, -1, label_ids[labels_R])


def _ids_of(stored: tuple[str, ...], known: tuple[str, ...], *, other: int) -> Ints | None:
    """The id that a model has for each stored id, `other` where it has none; None where they are the same."""
    if stored == known:
        return None
    ids = {name: i for i, name in enumerate(known)}
    return np.array([ids.get(name, other) for name in stored], np.int64)
