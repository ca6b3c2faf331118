"""From rows in many blocks to one buffer, in NumPy; `gather_native` does the same in C.

Shape letters: R rows of the data set, B rows asked for, T time steps of a padded batch, N items of all rows asked for
laid end to end, D stored channels, C channels that a model reads.

An item is what a row has many of: a frame, a symbol, a label, a vector of values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.data.manifest import Preprocessing
from treadle.spec import Missing

__all__ = ["Column", "Gather", "Located", "NumpyGather", "Scaling", "edges_of", "put_gaps"]

Ints = NDArray[np.int64]
GROUP = 8
"""Frames for which gather.c has the means end to end."""
_WIDE = 4096


ENTRY = np.dtype([("address", np.int64), ("count", np.uint32), ("weight", np.float32), ("label", np.int64)])
"""What is looked up of a row, as gather.c reads it: 24 bytes a row spare a search in every batch."""


class Located(NamedTuple):
    """Where the items of the rows of one batch, or of several after one another, are.

    Args:
        rows_B: as asked, of all batches. counts_B: items of each.
        starts_B: the first item of each; None: 0.
        edges: where the rows of each batch begin, and the end.
        largest, totals: of the counts, for each batch.
        labels_B, weights_B: facts of the rows.
        address: where C has noted the places of the items, until the column is asked again; 0 where NumPy copies.
    """

    rows_B: Ints
    counts_B: Ints
    starts_B: Ints | None
    edges: list[int]
    largest: list[int]
    totals: list[int]
    labels_B: Ints
    weights_B: NDArray[np.float32]
    address: int = 0

    def part(self, number: int) -> Located:
        """One of several batches."""
        if len(self.totals) == 1:
            return self
        a, b = self.edges[number : number + 2]
        return Located(
            rows_B=self.rows_B[a:b],
            counts_B=self.counts_B[a:b],
            starts_B=None if self.starts_B is None else self.starts_B[a:b],
            edges=[0, b - a],
            largest=self.largest[number : number + 1],
            totals=self.totals[number : number + 1],
            labels_B=self.labels_B[a:b],
            weights_B=self.weights_B[a:b],
            address=self.address and self.address + 8 * a,
        )


class Column:
    """One column of the shards, as far as its blocks are open.

    Args:
        block_starts: the first row of each block, and the number of rows.
        counts_R: items of each row; None: one each.
        width: numbers of an item.
        labels_R, weights_R: facts of each row to be looked up on the way.
    """

    def __init__(
        self,
        block_starts: Ints,
        counts_R: NDArray[Any] | None,
        width: int,
        *,
        labels_R: NDArray[Any] | None = None,
        weights_R: NDArray[Any] | None = None,
    ) -> None:
        self.block_starts = block_starts
        self.width = width
        self.num_rows = int(block_starts[-1])
        self.entries_R = np.zeros(self.num_rows, ENTRY)
        self.entries_R["count"] = 1 if counts_R is None else counts_R
        self.entries_R["label"] = 0 if labels_R is None else labels_R
        self.entries_R["weight"] = 0 if weights_R is None else weights_R
        self.blocks: dict[int, tuple[NDArray[Any], Ints]] = {}
        self._sorted: dict[int, bool] = {}
        self.notes: Any = None
        """Of a copy in C."""

    def fits(self, block: int, offsets: Ints) -> bool:
        """Whether a block has as many items of each row as the manifest says: nothing is read past its end then."""
        return bool(offsets[0] == 0 and np.array_equal(np.diff(offsets), self.counts(self._rows(block)) * self.width))

    def open(self, block: int, values: NDArray[Any], offsets: Ints) -> None:
        """The block's rows may be read from now on, as long as `values` stays where it is."""
        self.blocks[block] = (values, offsets)
        self.entries_R["address"][self._rows(block)] = values.ctypes.data + offsets[:-1] * values.itemsize

    def is_sorted(self, block: int) -> bool:
        """Whether no row of a block has fewer items than one before it: rows of one size lie side by side then."""
        found = self._sorted.get(block)
        if found is None:
            found = self._sorted[block] = bool((np.diff(self.counts(self._rows(block))) >= 0).all())
        return found

    def close(self, block: int) -> None:
        self.entries_R["address"][self._rows(block)] = 0
        del self.blocks[block]

    def counts(self, rows: Ints | slice) -> Ints:
        """Items of each of these rows."""
        return self.entries_R["count"][rows].astype(np.int64)

    def _rows(self, block: int) -> slice:
        return slice(int(self.block_starts[block]), int(self.block_starts[block + 1]))


class Scaling:
    """What becomes of stored frames: (x - mean) / deviation, 0 where x is NaN, and which were observed.

    Args:
        mean_D, inverse_D: float32; the inverse of the deviation.
        missing: 0: there is no NaN; 1: NaN becomes 0, the mean; 2: and D channels more are 1 where a value is observed.
        width: C; one more than these where the gap is read too.
    """

    def __init__(self, mean_D: NDArray[np.float32], inverse_D: NDArray[np.float32], missing: int, width: int) -> None:
        self.mean_D = mean_D
        self.inverse_D = inverse_D
        self.missing = missing
        self.width = width
        self.tiled = np.stack([np.tile(mean_D, GROUP), np.tile(inverse_D, GROUP)])
        """Both, end to end for GROUP frames, as gather.c reads them."""
        self._tiles = self.tiled

    def scaled(self, items: NDArray[np.float32], *, in_place: bool = False) -> NDArray[np.float32]:
        """[..., N, D] as stored, to [..., N, D] or [..., N, 2 D]; contiguous, and lost where `in_place`."""
        frames = items if in_place else items.copy()
        # NumPy adds rows of a few channels six times slower than rows of a thousand: all frames of a row at once.
        mean, inverse = self._wide(items.shape[-2])
        wide = frames.reshape(-1, len(mean))
        wide -= mean
        wide *= inverse
        if not self.missing:
            return frames
        unseen = np.isnan(frames)
        frames[unseen] = 0.0
        return np.concatenate([frames, (~unseen).astype(np.float32)], axis=-1) if self.missing == 2 else frames

    def _wide(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and inverse of so many frames end to end, or of one where that would be much."""
        count = count if count <= _WIDE else 1
        width = len(self.mean_D)
        if self._tiles.shape[1] < count * width:
            self._tiles = np.stack([np.tile(self.mean_D, count), np.tile(self.inverse_D, count)])
        mean, inverse = self._tiles[:, : count * width]
        return mean, inverse

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Scaling:
        """As a model was fitted."""
        mean = np.array(preprocessing.mean, np.float32)
        inverse = (1.0 / np.array(preprocessing.deviation, np.float64)).astype(np.float32)
        missing = {Missing.refuse: 0, Missing.mean: 1, Missing.indicator: 2}[preprocessing.missing]
        return cls(mean, inverse, missing, preprocessing.input_size)


class Gather(Protocol):
    """Copies rows. `steps` is T of a padded batch; 0 makes a packed one.

    What `out` holds before is not read; all of it is written but the channel of gaps.
    """

    def locate(
        self,
        column: Column,
        rows_B: Ints,
        starts_B: Ints | None = None,
        stops_B: Ints | None = None,
        *,
        sizes: Sequence[int] = (),
    ) -> Located | None:
        """Where these rows are; None where a block of theirs is not open.

        Args:
            sizes: rows of each batch, together these, none of them 0; one batch where there is none.

        Raises:
            IndexError: no such row, or it has no such items.
        """
        ...

    def frames(
        self,
        column: Column,
        found: Located,
        out: NDArray[np.float32],
        places: Sequence[int],
        steps: Sequence[int],
        scaling: Scaling,
    ) -> None:
        """Scaled frames of each batch, [B, T, C] or [N, C]; zeros behind the end of a row.

        Args:
            out: flat. places: where in it each batch begins.
        """
        ...

    def ids(
        self, column: Column, found: Located, out: Ints, steps: int, lookup: Ints | None = None, fill: int = 0
    ) -> None:
        """Ids, [B, T] or [N], each replaced by `lookup[id]`, -1 (none) by -1; `fill` behind the end of a row.

        Raises:
            IndexError: an id that `lookup` does not have.
        """
        ...

    def copy(self, column: Column, found: Located, out: NDArray[Any], steps: int, fill: float = 0.0) -> None:
        """float32 or int32 as they are, [B, T, width] or [N, width]; `fill` behind the end of a row."""
        ...


def edges_of(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin, and the end."""
    return [0, *itertools.accumulate(sizes)]


class NumpyGather:
    """Rows of one length that lie in one block are one copy."""

    def locate(
        self,
        column: Column,
        rows_B: Ints,
        starts_B: Ints | None = None,
        stops_B: Ints | None = None,
        *,
        sizes: Sequence[int] = (),
    ) -> Located | None:
        counts_B = _checked_counts(column, rows_B, starts_B, stops_B)
        entries_B = column.entries_R[rows_B]
        if not entries_B["address"].all():
            return None
        edges = edges_of(sizes or (len(rows_B),))
        counts = [counts_B[a:b] for a, b in itertools.pairwise(edges)]
        return Located(
            rows_B=rows_B,
            counts_B=counts_B,
            starts_B=starts_B,
            edges=edges,
            largest=[int(part.max(initial=0)) for part in counts],
            totals=[int(part.sum()) for part in counts],
            labels_B=entries_B["label"].copy(),
            weights_B=entries_B["weight"].copy(),
        )

    def frames(
        self,
        column: Column,
        found: Located,
        out: NDArray[np.float32],
        places: Sequence[int],
        steps: Sequence[int],
        scaling: Scaling,
    ) -> None:
        for number, (place, width) in enumerate(zip(places, steps, strict=True)):
            part = found.part(number)
            shape = (len(part.rows_B), width) if width else (part.totals[0],)
            size = math.prod(shape) * scaling.width
            target = _Target(part, out[place : place + size].reshape(*shape, scaling.width), width, 0.0)
            for place_B, items in _runs(column, part):
                target.put(place_B, scaling.scaled(items, in_place=True))

    def ids(
        self, column: Column, found: Located, out: Ints, steps: int, lookup: Ints | None = None, fill: int = 0
    ) -> None:
        target = _Target(found, out[..., None], steps, fill)
        for place_B, items in _runs(column, found):
            ids = items.astype(np.int64)
            if lookup is not None:
                if len(lookup) <= ids.max(initial=-1) or ids.min(initial=0) < -1:
                    raise IndexError(f"id {ids.max()} of {len(lookup)}")
                ids = np.where(ids < 0, -1, lookup[ids])
            target.put(place_B, ids)

    def copy(self, column: Column, found: Located, out: NDArray[Any], steps: int, fill: float = 0.0) -> None:
        target = _Target(found, out, steps, fill)
        for place_B, items in _runs(column, found):
            target.put(place_B, items)


class _Target:
    """Where items go: padded rows, or places among packed ones.

    Args:
        out: [B, T, C] or [N, C].
        fill: what stands behind the end of a row.
    """

    def __init__(self, found: Located, out: NDArray[Any], steps: int, fill: float) -> None:
        self._out = out
        self._steps = steps
        self._fill = fill
        self._offsets_B = np.cumsum(found.counts_B) - found.counts_B

    def put(self, place_B: Ints, items: NDArray[Any]) -> None:
        """Rows of one length: items [rows, count, C], or fewer channels, where the others are written later."""
        num_rows, count, width = items.shape
        out = self._out if width == self._out.shape[-1] else self._out[..., :width]
        if not self._steps:
            out[self._offsets_B[place_B][:, None] + np.arange(count)] = items
            return
        self._out[place_B, count:] = self._fill
        if out is self._out and out.flags.c_contiguous:  # one copy a row, not one a frame
            out = out.reshape(len(out), -1)
            items = items.reshape(num_rows, -1)
        out[place_B, : items.shape[1]] = items


def _checked_counts(column: Column, rows_B: Ints, starts_B: Ints | None, stops_B: Ints | None) -> Ints:
    if len(rows_B) and not (rows_B.min() >= 0 and rows_B.max() < column.num_rows):
        raise IndexError(f"rows: got {rows_B.min()} to {rows_B.max()}, expected 0 to {column.num_rows - 1}")
    all_B = column.counts(rows_B)
    starts = np.zeros_like(all_B) if starts_B is None else starts_B
    stops = all_B if stops_B is None else stops_B
    if ((starts < 0) | (starts > stops) | (stops > all_B)).any():
        raise IndexError("starts_B, stops_B: got items that a row does not have")
    return stops - starts


def _runs(column: Column, found: Located) -> Iterator[tuple[Ints, NDArray[Any]]]:
    """(places in the batch, copies of their items [rows, count, width]) of rows alike that lie in one block."""
    order_B = np.argsort(found.rows_B, kind="stable")
    rows_B = found.rows_B[order_B]
    block_B = np.searchsorted(column.block_starts, rows_B, side="right") - 1
    alike = [block_B, column.counts(rows_B)]
    if found.starts_B is not None:
        alike.append(found.starts_B[order_B])
    alike.append(found.counts_B[order_B])
    edges = (np.flatnonzero(np.diff(alike, axis=1).any(axis=0)) + 1).tolist()
    for a, b in zip([0, *edges], [*edges, len(rows_B)], strict=True):
        block, whole, count = (int(alike[i][a]) for i in (0, 1, -1))
        begin = 0 if found.starts_B is None else int(alike[2][a]) * column.width
        items = _alike(column, block, whole * column.width, rows_B[a:b])
        if count != whole:
            items = items[:, begin : begin + count * column.width]
        yield order_B[a:b], items.reshape(b - a, count, column.width)


def _alike(column: Column, block: int, size: int, rows_A: Ints) -> NDArray[Any]:
    """Rows of one block, sorted, of one size in numbers: [rows, size], copied."""
    values, offsets = column.blocks[block]
    within_A = rows_A - column.block_starts[block]
    first, last = int(within_A[0]), int(within_A[-1])
    start, stop = int(offsets[first]), int(offsets[last + 1])
    if stop - start == (last + 1 - first) * size and column.is_sorted(block):
        return values[start:stop].reshape(-1, size).take(within_A - first, axis=0)
    return values.take(offsets[within_A][:, None] + np.arange(size))  # rows of other sizes lie in between


def put_gaps(out: NDArray[np.float32], gaps: NDArray[np.float32], counts_B: Ints, scale: tuple[float, ...]) -> None:
    """The last channel of `out`: log(1 + gap), scaled; 0 behind the end of a row.

    Args:
        out: [B, T, C] or [N, C]. gaps: [B, T] or [N].
        scale: mean and deviation of log(1 + gap).
    """
    scaled = np.log1p(gaps)
    scaled -= np.float32(scale[0])
    scaled /= np.float32(scale[1])
    if gaps.ndim == 2:
        scaled[np.arange(gaps.shape[1]) >= counts_B[:, None]] = 0.0
    out[..., -1] = scaled
