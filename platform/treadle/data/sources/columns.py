"""Batches of a table as chunks: which column is what is said by the job, of which form by the first file (infer.py).

Shape letters: R rows, N frames of all rows laid end to end, D channels, U targets of all rows so, K values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from treadle.data.chunk import Chunk, Schema
from treadle.data.draft import SPLITS, Frames, Labels, Tokens, Values
from treadle.data.sources.arrays import (
    compute,
    element_type,
    encode,
    flat_lists,
    is_list,
    is_number,
    is_text,
    is_time,
    names_things,
    numbers,
    plain,
    side_by_side,
    texts,
    vectors,
)
from treadle.data.sources.clock import Clock, clock_of
from treadle.data.sources.tables import Piece
from treadle.errors import DataError
from treadle.spec import ColumnsSpec, TargetPer

__all__ = ["Reading", "to_chunk"]

_TIME = "expected as 2026-01-31T12:00:00"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the columns of a batch become a chunk.

    Args:
        columns: which is what. schema: what is expected of them.
        first: the file that the schema was inferred from, for messages.
        several: whether there are several files, so that a row's number alone does not name it.
        clocks: of `times` and `time` in the first file; others have times of the same kind, be it another unit.
    """

    columns: ColumnsSpec
    schema: Schema
    first: str
    several: bool
    clocks: Mapping[str, Clock] = field(default_factory=dict)


class _Faults:
    """Rows of a batch that have not the form of a row."""

    def __init__(self, num_rows: int) -> None:
        self.bad_R = np.zeros(num_rows, bool)
        self.found: list[tuple[int, str, str]] = []

    def add(self, bad_R: NDArray[np.bool_], column: str, message: Callable[[int], str]) -> None:
        if bad_R.any():
            self.bad_R |= bad_R
            self.found += [(int(row), column, message(int(row))) for row in np.flatnonzero(bad_R)]


def to_chunk(piece: Piece, file: str, reading: Reading, *, split: int = -1) -> Chunk:
    """The rows of a piece; those without the form of a row become problems.

    Args:
        split: of all rows, where the source says it by its folders.

    Raises:
        DataError: a column is of another type than in the first file.
    """
    faults = _Faults(piece.batch.num_rows)
    chunk = _converted(piece, file, reading, split, faults)
    if faults.found:
        problems = [chunk.problem(*fault) for fault in faults.found]
        good_R = ~faults.bad_R
        rest = Piece(
            batch=piece.batch.filter(pa.array(good_R)),
            number_R=piece.number_R[good_R],
            problems=(*piece.problems, *problems),
        )
        return _converted(rest, file, reading, split, _Faults(rest.batch.num_rows))
    return chunk


def _converted(piece: Piece, file: str, reading: Reading, split: int, faults: _Faults) -> Chunk:
    spec, schema, batch = reading.columns, reading.schema, piece.batch
    columns = _Columns(batch, file, reading, faults)
    lengths_R, inputs, symbols = columns.inputs(schema.inputs)
    target_lengths_R, targets, labels = columns.target(schema.target)
    entity_R = columns.text("entity") if spec.entity else _numbered(piece.number_R, file if reading.several else "")
    group_R = compute.coalesce(columns.text("group"), entity_R) if spec.group else None
    times_N, gaps_N = columns.times(lengths_R) if schema.timed else (None, None)
    return Chunk(
        file=file,
        number_R=piece.number_R,
        lengths_R=lengths_R,
        inputs=inputs,
        symbols=symbols,
        target_lengths_R=target_lengths_R,
        targets=targets,
        labels=labels,
        times_N=times_N,
        entity_R=entity_R,
        group_R=group_R,
        id_R=columns.text("id") if spec.id else None,
        time_R=columns.time() if spec.time else np.full(batch.num_rows, np.nan),
        weight_R=columns.number("weight") if spec.weight else np.ones(batch.num_rows, np.float32),
        split_R=columns.split() if spec.split else np.full(batch.num_rows, split, np.int8),
        gaps_N=gaps_N,
        problems=piece.problems,
    )


def _numbered(number_R: NDArray[np.int64], file: str) -> pa.StringArray:
    texts_R = pa.array(number_R).cast(pa.string())
    return compute.binary_join_element_wise(file, texts_R, ":") if file else texts_R


class _Columns:
    """The columns of one batch, read as the schema says."""

    def __init__(self, batch: pa.RecordBatch, file: str, reading: Reading, faults: _Faults) -> None:
        self.batch, self.file, self.first, self.spec, self.faults = batch, file, reading.first, reading.columns, faults
        self.clocks = reading.clocks

    def inputs(self, inputs: Tokens | Frames) -> tuple[NDArray[np.int64], NDArray[Any], tuple[str, ...]]:
        if isinstance(inputs, Tokens):
            return self.named(self.spec.inputs[0], "inputs")
        lengths_R, values = self.frames(self.spec.inputs, "inputs", len(inputs.channels))
        return lengths_R, values, ()

    def target(self, target: Labels | Values | None) -> tuple[NDArray[np.int64], NDArray[Any], tuple[str, ...]]:
        names, num_rows = self.spec.target, self.batch.num_rows
        if target is None:
            return np.zeros(num_rows, np.int64), np.zeros(0, np.int32), ()
        if isinstance(target, Labels):
            if target.per is not TargetPer.row:
                return self.named(names[0], "target")
            self.expect(names[0], "target", names_things, "text or whole numbers")
            ids, labels = encode(self.batch.column(names[0]))
            return np.ones(num_rows, np.int64), ids, labels
        if target.per is TargetPer.frame:
            return *self.frames(names, "target", len(target.names)), ()
        return np.ones(num_rows, np.int64), self.row_values(names, len(target.names)), ()

    def row_values(self, names: Sequence[str], width: int) -> NDArray[np.float32]:
        column = self.batch.column(names[0])
        if len(names) == 1 and is_list(column.type):
            self.expect(names[0], "target", lambda t: is_number(element_type(t)), "lists of numbers")
            values_RK, wrong_R = vectors(column, width)
            if wrong_R is not None:
                self.faults.add(wrong_R, names[0], lambda row: f"got a list of another length, expected {width} values")
            return values_RK
        for name in names:
            self.expect(name, "target", is_number, "numbers")
        return side_by_side([self.batch.column(name) for name in names])

    def named(self, name: str, key: str) -> tuple[NDArray[np.int64], NDArray[np.int32], tuple[str, ...]]:
        """Lists of text, of whole numbers, or text parted at white space, as places among distinct names."""
        column = plain(self.batch.column(name))
        self.no_nulls(column, name)
        if is_text(column.type):
            column = _words(column)
        else:
            self.expect(
                name, key, lambda t: is_list(t) and names_things(element_type(t)), "lists of text or whole numbers"
            )
        lengths_R, flat = flat_lists(column)
        return lengths_R, *encode(flat)

    def frames(self, names: Sequence[str], key: str, width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Lists of numbers, a column each, or one column of lists of lists, as lengths and [N, D]."""
        columns = [plain(self.batch.column(name)) for name in names]
        for name, column in zip(names, columns, strict=True):
            self.no_nulls(column, name)
        if len(columns) == 1 and is_list(columns[0].type) and is_list(element_type(columns[0].type)):
            return self.frame_vectors(columns[0], names[0], width)
        lists = []
        for name, column in zip(names, columns, strict=True):
            self.expect(name, key, lambda t: is_list(t) and is_number(element_type(t)), "lists of numbers")
            lists.append(flat_lists(column))
        lengths_R = lists[0][0]
        for name, (others_R, _) in zip(names[1:], lists[1:], strict=True):
            self.faults.add(
                lengths_R != others_R,
                name,
                lambda row, o=others_R: f"got {o[row]} frames, expected {lengths_R[row]} as in {names[0]!r}",
            )
        if self.faults.bad_R.any():  # these rows go, and the rest is converted again
            return lengths_R, np.zeros((int(lengths_R.sum()), width), np.float32)
        return lengths_R, side_by_side([flat for _, flat in lists])

    def frame_vectors(self, column: Any, name: str, width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if not is_number(element_type(element_type(column.type))):
            self.expect(name, "inputs", lambda t: False, "lists of lists of numbers")
        lengths_R, flat = flat_lists(column)
        values_ND, wrong_N = vectors(flat, width)
        if wrong_N is not None:
            self.faults.add(
                _rows_with(wrong_N, lengths_R),
                name,
                lambda row: f"got a frame of another width, expected {width} numbers in each",
            )
        return lengths_R, values_ND

    def times(self, lengths_R: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        """Times, and gaps where the column has them more exactly."""
        name = self.spec.times or ""
        column = plain(self.batch.column(name))
        self.expect(name, "times", lambda t: is_list(t) and is_time(element_type(t)), "lists of numbers or times")
        lengths, flat = flat_lists(column)
        clock, counts, wrong_N = self.counted("times", name, flat)
        self.faults.add(
            lengths != lengths_R, name, lambda row: f"got {lengths[row]} times, expected {lengths_R[row]}, one a frame"
        )
        times_N, gaps_N = clock.times(counts), clock.gaps(counts, np.cumsum(lengths) - lengths)
        if wrong_N is not None:
            self.faults.add(_rows_with(wrong_N, lengths), name, lambda row: f"got text that is no time, {_TIME}")
        if gaps_N is not None:
            fall_N = _hidden_falls(counts.fill_null(0).to_numpy(zero_copy_only=False), times_N)
            fall_N[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
            self.faults.add(
                _rows_with(fall_N, lengths),
                name,
                lambda row: "got times that fall by less than float64 shows, expected times that never fall",
            )
        return times_N, gaps_N

    def time(self) -> NDArray[np.float64]:
        name = self.spec.time or ""
        self.expect(name, "time", is_time, "numbers, dates or timestamps")
        column = self.batch.column(name)
        clock, counts, wrong_R = self.counted("time", name, column)
        if wrong_R is not None:
            self.faults.add(wrong_R, name, lambda row: f"got {column[row].as_py()!r}, {_TIME}")
        return clock.times(counts)

    def counted(self, key: str, name: str, array: Any) -> tuple[Clock, Any, NDArray[np.bool_] | None]:
        """Times by a clock of their own unit."""
        clock, place = clock_of(array.type), f"{self.file}: columns.{key}: {name!r}"
        self.clocks.get(key, clock).check(array.type, place, self.first)
        return clock, *clock.count(array, place, self.first)

    def number(self, key: str) -> NDArray[np.float32]:
        name = getattr(self.spec, key)
        self.expect(name, key, is_number, "numbers")
        return numbers(self.batch.column(name)) + np.float32(0)  # -0.0 is 0.0: rows in two orders are one data set

    def text(self, key: str) -> pa.StringArray:
        name = getattr(self.spec, key)
        self.expect(name, key, names_things, "text or whole numbers")
        return texts(self.batch.column(name))

    def split(self) -> NDArray[np.int8]:
        name = self.spec.split or ""
        self.expect(name, "split", is_text, "text")
        column = texts(self.batch.column(name))
        places = compute.index_in(column, value_set=pa.array(SPLITS))
        wrong_R = (places.is_null() if len(places) else pa.array([], pa.bool_())).to_numpy(zero_copy_only=False)
        wrong_R = wrong_R & column.is_valid().to_numpy(zero_copy_only=False)
        self.faults.add(
            wrong_R, name, lambda row: f"got {column[row].as_py()!r}, expected {', '.join(SPLITS)} or nothing"
        )
        return places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int8)

    def no_nulls(self, column: Any, name: str) -> None:
        if column.null_count:
            nulls_R = column.is_null().to_numpy(zero_copy_only=False)
            self.faults.add(nulls_R, name, lambda row: "got null, expected a list")

    def expect(self, name: str, key: str, fits: Callable[[pa.DataType], bool], rule: str) -> None:
        """Nothing, if a column is of such a type.

        Raises:
            DataError: it is in the first file, but not in this one.
        """
        type_ = self.batch.schema.field(name).type
        if not fits(type_):
            raise DataError(
                f"{self.file}: columns.{key}: {name!r}: got {type_}, expected {rule}, as in {self.first}",
                hint="write all files with one schema",
            )


def _rows_with(flags_N: NDArray[np.bool_], lengths_R: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows have such a frame."""
    found_R = np.zeros(len(lengths_R), bool)
    if flags_N.any():
        found_R[np.repeat(np.arange(len(lengths_R)), lengths_R)[flags_N]] = True
    return found_R


def _hidden_falls(counts_N: NDArray[np.int64], times_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where counts fall and float64 does not show it; the others are found with all that is checked of times."""
    falls_N = np.zeros(len(counts_N), bool)
    falls_N[1:] = (counts_N[1:] < counts_N[:-1]) & (times_N[1:] == times_N[:-1])
    return falls_N


def _words(column: Any) -> Any:
    """Text parted at white space; none in empty text."""
    trimmed = compute.utf8_trim_whitespace(texts(column))
    parted = compute.utf8_split_whitespace(trimmed)
    # Parted, "" is one empty word.
    return compute.if_else(compute.equal(compute.binary_length(trimmed), 0), pa.scalar(None, parted.type), parted)
