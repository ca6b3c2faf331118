"""One sequence an entity, out of lines that are one frame each.

Shape letters: N lines, R sequences, D channels, K values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.chunk import CHUNK_BYTES, Chunk, Problem, Schema, keep_rows
from treadle.data.draft import SPLITS, Labels
from treadle.data.sources.arrays import compute, encode
from treadle.data.sources.clock import Clock
from treadle.data.sources.tables import damaged
from treadle.spec import TargetPer

__all__ = ["FAULTS", "LINE_BITS", "chunks_of_events"]

LINE_BITS = 40
"""A line is kept as (place of its file << 40) + its number."""
_FAULTS = {
    "time": ("text that is no time", "as 2026-01-31T12:00:00"),
    "inputs": ("a list of another length", "{width} numbers"),
    "target": ("a list of another length", "{width} numbers"),
}
FAULTS = tuple(_FAULTS)
"""What a line may have wrong, the first as bit 0 of its `faults`."""
_EXACT = 2.0**53


def chunks_of_events(path: Path, files: Sequence[str], schema: Schema, clock: Clock) -> Iterator[Chunk]:
    """The sequences of a file of lines, by where the first line of each stood, about CHUNK_BYTES at a time.

    Args:
        path: an Arrow stream with the columns entity, line, times, inputs, faults, and those there are of target,
            time, weight, group, id, split.
        files: names of the files that lines came from.
        clock: that times are counted by.
    """
    with damaged(path.name), pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all().combine_chunks()
    codes = table.column("entity").combine_chunks().dictionary_encode().indices.to_numpy()
    # Ties keep the order of reading; entities are numbered as they come.
    order = np.lexsort((_sortable(table.column("times")), codes))
    lengths_R = np.bincount(codes)
    first_R = table.column("line").to_numpy()[np.unique(codes, return_index=True)[1]]
    width = table.nbytes / table.num_rows
    del codes
    ends = np.cumsum(lengths_R)
    for start, stop in _runs(lengths_R, first_R >> LINE_BITS, max(1, int(CHUNK_BYTES / width))):
        lines = order[ends[start] - lengths_R[start] : ends[stop - 1]]
        batch = table.take(pa.array(lines)).combine_chunks().to_batches()[0]
        yield _Sequences(batch, lengths_R[start:stop], first_R[start:stop], files, schema).chunk(clock)


def _sortable(counts: Any) -> NDArray[Any]:
    """Times that sort as they are, those that are none last."""
    none = np.nan if pa.types.is_floating(counts.type) else np.iinfo(np.int64).max
    return counts.fill_null(none).to_numpy()


def _runs(lengths_R: NDArray[np.int64], file_R: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring sequences of about `most` lines that begin in one file."""
    ends = np.cumsum(lengths_R)
    start = 0
    while start < len(lengths_R):
        begin = ends[start] - lengths_R[start]
        stop = max(start + 1, int(np.searchsorted(ends, begin + most, side="right")))
        others = np.flatnonzero(file_R[start:stop] != file_R[start])
        stop = start + int(others[0]) if len(others) else stop
        yield start, stop
        start = stop


class _Sequences:
    """Lines sorted by entity and time, as the rows of a chunk."""

    def __init__(
        self,
        batch: pa.RecordBatch,
        lengths_R: NDArray[np.int64],
        first_R: NDArray[np.int64],
        files: Sequence[str],
        schema: Schema,
    ) -> None:
        self.batch, self.lengths_R, self.files, self.schema = batch, lengths_R, files, schema
        self.starts_R = np.cumsum(lengths_R) - lengths_R
        self.line_N = batch.column("line").to_numpy()
        self.file = files[int(first_R[0] >> LINE_BITS)]
        self.number_R = first_R & ((1 << LINE_BITS) - 1)
        self.entity_R = batch.column("entity").take(pa.array(self.starts_R))
        self.bad_R = np.zeros(len(lengths_R), bool)
        self.problems: list[Problem] = []

    def chunk(self, clock: Clock) -> Chunk:
        counts = self.batch.column("times")
        times_N = clock.times(counts)
        self._check_times(counts, times_N)
        self._check_faults()
        inputs, symbols = self._per_frame("inputs")
        target_lengths_R, targets, labels = self._targets()
        num_rows, columns = len(self.lengths_R), self.batch.schema.names
        group_R = compute.coalesce(self._one_text("group"), self.entity_R) if "group" in columns else None
        chunk = Chunk(
            file=self.file,
            number_R=self.number_R,
            lengths_R=self.lengths_R,
            inputs=inputs,
            symbols=symbols,
            target_lengths_R=target_lengths_R,
            targets=targets,
            labels=labels,
            times_N=times_N,
            entity_R=self.entity_R,
            group_R=group_R,
            id_R=self._one_text("id") if "id" in columns else None,
            time_R=self._one_number("time") if "time" in columns else np.full(num_rows, np.nan),
            # -0.0 is 0.0, as in all times: rows in two orders are one data set.
            weight_R=self._one_number("weight") + np.float32(0) if "weight" in columns else np.ones(num_rows, "f4"),
            split_R=self._split() if "split" in columns else np.full(num_rows, -1, np.int8),
            gaps_N=clock.gaps(counts, self.starts_R),
        )
        return dataclasses.replace(keep_rows(chunk, ~self.bad_R), problems=tuple(self.problems))

    def _check_times(self, counts: Any, times_N: NDArray[np.float64]) -> None:
        self._complain_of(np.isnan(times_N), "times", "no time", "one in each")
        if pa.types.is_floating(counts.type):
            same_N = np.zeros(len(times_N), bool)
            same_N[1:] = (times_N[1:] == times_N[:-1]) & (np.abs(times_N[1:]) >= _EXACT) & np.isfinite(times_N[1:])
            same_N[self.starts_R] = False
            self._complain_of(
                same_N, "times", "the time of another line", "times below 2**53, as float64 merges larger ones"
            )

    def _check_faults(self) -> None:
        fault_N, names = self.batch.column("faults").to_numpy(), self.batch.schema.names
        if not fault_N.any():
            return
        for place, (column, (seen, expected)) in enumerate(_FAULTS.items()):
            width = getattr(self.batch.schema.field(column).type, "list_size", 1) if column in names else 1
            bad_N = (fault_N >> place & 1).astype(bool)
            self._complain_of(bad_N, column, seen, expected.format(width=width))

    def _complain_of(self, bad_N: NDArray[np.bool_], column: str, seen: str, expected: str) -> None:
        """Sequences with such lines, of which the one that comes first is named."""
        if not bad_N.any():
            return
        counts_R = np.add.reduceat(bad_N, self.starts_R, dtype=np.int64)
        first_R = np.minimum.reduceat(np.where(bad_N, np.arange(len(bad_N)), len(bad_N)), self.starts_R)
        self._complain(
            counts_R > 0,
            column,
            lambda row: f"got {seen} in {counts_R[row]} lines, first {self._line(first_R[row])}, expected {expected}",
        )

    def _line(self, place: int) -> str:
        line = int(self.line_N[place])
        return f"{self.files[line >> LINE_BITS]}:{line & ((1 << LINE_BITS) - 1)}"

    def _complain(self, bad_R: NDArray[np.bool_], column: str, message: Callable[[int], str]) -> None:
        self.bad_R |= bad_R
        self.problems += [
            Problem(
                file=self.file,
                number=int(self.number_R[row]),
                column=column,
                message=message(int(row)),
                entity=self.entity_R[int(row)].as_py(),
            )
            for row in np.flatnonzero(bad_R)
        ]

    def _per_frame(self, column: str) -> tuple[NDArray[Any], tuple[str, ...]]:
        array = self.batch.column(column)
        if pa.types.is_fixed_size_list(array.type):
            return array.flatten().to_numpy().reshape(-1, array.type.list_size), ()
        return encode(array)

    def _targets(self) -> tuple[NDArray[np.int64], NDArray[Any], tuple[str, ...]]:
        target, num_rows = self.schema.target, len(self.lengths_R)
        if target is None:
            return np.zeros(num_rows, np.int64), np.zeros(0, np.int32), ()
        if target.per is TargetPer.frame:
            return self.lengths_R, *self._per_frame("target")
        ones = np.ones(num_rows, np.int64)
        if isinstance(target, Labels):
            return ones, *encode(self._one_text("target"))
        values_RK = self._one_of(self._per_frame("target")[0], "target")
        return ones, values_RK, ()

    def _one_number(self, column: str) -> NDArray[Any]:
        return self._one_of(self.batch.column(column).to_numpy(), column)

    def _one_of(self, values_N: NDArray[Any], column: str) -> NDArray[Any]:
        """The one number of each sequence, NaN where there is none; two of them are a problem."""
        if not len(values_N):
            return values_N
        least, most = (
            np.fmin.reduceat(values_N, self.starts_R, axis=0),
            np.fmax.reduceat(values_N, self.starts_R, axis=0),
        )
        differ_RK = np.asarray(least < most).reshape(len(least), -1)

        def said(row: int) -> str:
            value = int(np.argmax(differ_RK[row]))
            two = [np.atleast_1d(array[row])[value] for array in (least, most)]
            return f"got {two[0]:g} and {two[1]:g}, expected one value for the entity"

        self._complain(np.asarray(differ_RK.any(axis=1)), column, said)
        return least

    def _one_text(self, column: str) -> pa.StringArray:
        """The one text of each sequence, null where there is none; two of them are a problem."""
        ids_N, names = encode(self.batch.column(column))
        if not len(ids_N) or not names:
            return pa.nulls(len(self.lengths_R), pa.string())
        most_R = np.maximum.reduceat(ids_N, self.starts_R)
        least_R = np.minimum.reduceat(np.where(ids_N < 0, len(names), ids_N), self.starts_R)
        self._complain(
            (most_R >= 0) & (least_R < most_R),
            column,
            lambda row: "got {!r} and {!r}, expected one for the entity".format(
                *sorted((names[least_R[row]], names[most_R[row]]))
            ),
        )
        return pa.array(names, pa.string()).take(pa.array(most_R, mask=most_R < 0))

    def _split(self) -> NDArray[np.int8]:
        ids_R, names = encode(self._one_text("split"))
        places = np.array([SPLITS.index(name) if name in SPLITS else -2 for name in names] + [-1], np.int8)
        split_R = places[ids_R]
        self._complain(
            split_R == -2,
            "split",
            lambda row: f"got {names[ids_R[row]]!r}, expected {', '.join(SPLITS)} or nothing",
        )
        return split_R
