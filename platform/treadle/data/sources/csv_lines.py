"""The lines of CSV files as typed columns. A line that cannot be read, or does not fit, is a problem of that line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from treadle.data.chunk import CHUNK_BYTES, Part, Problem
from treadle.data.sources.arrays import compute
from treadle.data.sources.cells import array_of, json_or_none, misfit, utf8_problem
from treadle.data.sources.files import Place
from treadle.data.sources.tables import Piece
from treadle.errors import DataError
from treadle.units import format_bytes

__all__ = ["csv_columns", "csv_values", "read_csv"]

_MOST_BLOCK_BYTES = 128 << 20
"""A row that is longer than a block cannot be read: blocks are made larger for it, up to this."""

_FEW_ROWS = 256

_MISSING = ("NA", "N/A", "na", "n/a", "NaN", "nan", "NAN", "null", "NULL", "None", "none")
"""How a missing number is written beside an empty cell. Text may be any of these."""


def csv_columns(place: Place, path: str, name: str) -> list[str]:
    """The names in the first line."""
    block_bytes = CHUNK_BYTES
    while True:
        try:
            return list(_opened(place, path, name, [], None, block_bytes).schema.names)
        except pa.ArrowInvalid as error:
            block_bytes = _larger(block_bytes, error, name, 1)


def csv_values(place: Place, path: str, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The cells of each line, as the JSON values that they look like."""
    for piece in _rows(place, path, name, columns):
        for start in range(0, piece.batch.num_rows, _FEW_ROWS):  # most often, no more are looked at
            for line in piece.batch.slice(start, _FEW_ROWS).to_pylist():
                yield {key: _looks_like(cell) for key, cell in line.items()}


def _looks_like(cell: bytes | None) -> Any:
    if cell is None:
        return None
    text = cell.decode("utf-8", "replace").strip()
    if text in _MISSING:
        return None
    if text.startswith("["):
        return json_or_none(text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_csv(place: Place, part: Part, schema: pa.Schema) -> Iterator[Piece]:
    """The lines of a file in the types of the schema.

    Raises:
        DataError: a row is longer than the largest block.
    """
    for piece in _rows(place, part.path, part.file, schema.names):
        yield _typed(piece, part.file, schema)


# --- rows of cells


def _opened(
    place: Place, path: str, name: str, columns: Sequence[str], on_ragged: Any, block_bytes: int
) -> pa_csv.CSVStreamingReader:
    """A reader of columns as bytes; of all of them for []."""
    stem = name.lower().split(".")
    return pa_csv.open_csv(
        place.filesystem.open_input_stream(path),
        # Threads would hide the number of a line that does not fit.
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=block_bytes),
        parse_options=pa_csv.ParseOptions(
            delimiter="\t" if "tsv" in stem else ",",
            newlines_in_values=True,
            invalid_row_handler=on_ragged or (lambda row: "skip"),
        ),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.binary()),  # text would end at the first byte that is none
            include_columns=list(columns),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )


def _larger(block_bytes: int, error: pa.ArrowInvalid, name: str, done: int) -> int:
    """The next size of blocks, if a row that is longer than a block is what is wrong."""
    if "straddl" not in str(error):
        raise error
    if block_bytes >= _MOST_BLOCK_BYTES:
        raise DataError(
            f"{name}: after line {done}: got a row of more than {format_bytes(block_bytes)}, expected less",
            hint="is there a quote that is never closed?",
        ) from None
    return 2 * block_bytes


def _rows(place: Place, path: str, name: str, columns: Sequence[str]) -> Iterator[Piece]:
    """All rows, cells as bytes. If one is longer than a block, it is begun again, and what was given is left out."""
    block_bytes, done = CHUNK_BYTES, 1
    while True:
        try:
            for piece in _blocks(place, path, name, columns, block_bytes):
                if (last := _last(piece)) > done:
                    rest, done = _after(piece, done), last
                    yield rest
        except pa.ArrowInvalid as error:
            block_bytes = _larger(block_bytes, error, name, done)
        else:
            return


def _last(piece: Piece) -> int:
    """The last line that a piece tells of."""
    return max([*piece.number_R[-1:].tolist(), *(problem.number for problem in piece.problems)], default=0)


def _after(piece: Piece, done: int) -> Piece:
    first = int(np.searchsorted(piece.number_R, done, side="right"))
    problems = tuple(problem for problem in piece.problems if problem.number > done)
    return dataclasses.replace(
        piece, batch=piece.batch.slice(first), number_R=piece.number_R[first:], problems=problems
    )


def _blocks(place: Place, path: str, name: str, columns: Sequence[str], block_bytes: int) -> Iterator[Piece]:
    ragged: list[tuple[int, int, int]] = []

    def skip(row: Any) -> str:
        ragged.append((row.number, row.expected_columns, row.actual_columns))
        return "skip"

    reader = _opened(place, path, name, columns, skip, block_bytes)
    line = 2  # the first is the header; blank ones are not counted, nor are line ends in quotes
    told = 0
    while True:
        batch = next(reader, None)
        taken = 0 if batch is None else batch.num_rows
        skipped = np.array([number for number, _, _ in ragged[told:]], np.int64)
        number_R, last = _numbered(line, taken, skipped, batch is None)
        now = int(np.count_nonzero(skipped < last))
        problems = tuple(
            Problem(file=name, number=number, column="line", message=f"got {seen} cells, expected {expected}")
            for number, expected, seen in ragged[told : told + now]
        )
        told, line = told + now, last
        if batch is None:
            if problems:
                empty = pa.RecordBatch.from_pylist([], schema=reader.schema)
                yield Piece(batch=empty, number_R=number_R, problems=problems)
            return
        yield Piece(batch=batch, number_R=number_R, problems=problems)


def _numbered(line: int, taken: int, skipped: NDArray[np.int64], at_end: bool) -> tuple[NDArray[np.int64], int]:
    """The lines of `taken` rows from `line` on, `skipped` left out, and the line after them."""
    lines = np.arange(line, line + taken + len(skipped))
    number_R = lines[~np.isin(lines, skipped)][:taken]
    if at_end:
        return number_R, int(skipped.max()) + 1 if len(skipped) else line
    return number_R, int(number_R[-1]) + 1 if taken else line


# --- cells


def _typed(piece: Piece, file: str, schema: pa.Schema) -> Piece:
    """Cells as the types of the schema; lines with a cell that is none of its type become problems."""
    number_R, problems = piece.number_R, list(piece.problems)
    bad_R = np.zeros(len(number_R), bool)
    columns: list[pa.Array] = []
    for field in schema:
        cells, no_text_R = _texts(piece.batch.column(field.name))
        column, misfit_R = _cells(cells, field.type)
        for row in np.flatnonzero(no_text_R):
            seen = piece.batch.column(field.name)[int(row)].as_py()
            problems.append(utf8_problem(file, int(number_R[row]), field.name, seen))
        for row in np.flatnonzero(misfit_R):
            cell = str(cells[int(row)].as_py())[:40]
            problems.append(misfit(file, int(number_R[row]), field, repr(cell)))
        bad_R |= no_text_R | misfit_R
        columns.append(column)
    typed = pa.record_batch(columns, schema=schema)
    if bad_R.any():
        typed, number_R = typed.filter(pa.array(~bad_R)), number_R[~bad_R]
    return Piece(batch=typed, number_R=number_R, problems=tuple(sorted(problems, key=lambda p: p.number)))


def _texts(cells: pa.Array) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Cells as text, null where there is none, and which of them are no UTF-8."""
    try:
        return cells.cast(pa.string()), np.zeros(len(cells), bool)
    except pa.ArrowInvalid:
        bad = np.array([_cast_or_none(cell, pa.string()) is None for cell in cells], bool)
        bad &= cells.is_valid().to_numpy(zero_copy_only=False)
        return compute.if_else(pa.array(bad), pa.scalar(None, pa.binary()), cells).cast(pa.string()), bad


def _cells(cells: pa.Array, type_: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Cells of text as a type, null where there is none, and which of them are not of that type."""
    good = np.zeros(len(cells), bool)
    if pa.types.is_string(type_):
        return cells, good
    if pa.types.is_list(type_):
        values = [None if cell is None else json_or_none(cell) for cell in cells.to_pylist()]
        array, bad = array_of(values, type_)
        unreadable = np.array([v is None for v in values], bool) & cells.is_valid().to_numpy(zero_copy_only=False)
        return array, bad | unreadable
    cells = compute.utf8_trim_whitespace(cells)
    cells = compute.if_else(compute.is_in(cells, value_set=pa.array(_MISSING)), pa.scalar(None, pa.string()), cells)
    try:
        return cells.cast(type_), good
    except pa.ArrowInvalid:
        found = [_cast_or_none(cell, type_) for cell in cells]
        array = pa.array(found, type_)
        return array, (array.is_null().to_numpy(zero_copy_only=False)) & cells.is_valid().to_numpy(zero_copy_only=False)


def _cast_or_none(cell: Any, type_: pa.DataType) -> Any:
    try:
        return cell.cast(type_).as_py()
    except (pa.ArrowInvalid, UnicodeError):
        return None
