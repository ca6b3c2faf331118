"""CSV files and JSON lines as batches of typed columns: the first lines say the types, later ones must keep to them.

A line that cannot be read, or does not fit, is a problem of that line; the others are read on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
from numpy.typing import NDArray

from treadle.data.chunk import CHUNK_BYTES, Part, Problem
from treadle.data.sources.arrays import compute
from treadle.data.sources.files import Place, SourceFile
from treadle.data.sources.tables import Piece, cut, damaged
from treadle.spec import Format

__all__ = ["read_text", "text_columns", "text_schema"]

_PEEKED_ROWS = 200
_MOST_PEEKED_ROWS = 20_000
_MISSING = ("NA", "N/A", "na", "n/a", "NaN", "nan", "NAN", "null", "NULL", "None", "none")
"""How a missing number is written beside an empty cell. Text may be any of these."""


def text_columns(place: Place, file: SourceFile) -> list[str]:
    """The columns of a CSV file, or the keys of the first objects of JSON lines."""
    with damaged(file.name):
        if place.format is Format.csv:
            reader = _csv(place, file.path, file.name, [], None)
            return list(reader.schema.names)
        values = (value for _, value in itertools.islice(_json_values(place, file.path), _PEEKED_ROWS))
        return list(dict.fromkeys(key for value in values if isinstance(value, dict) for key in value))


def text_schema(
    place: Place,
    file: SourceFile,
    columns: Sequence[str],
    *,
    numbers: frozenset[str],
    names: frozenset[str],
    texts: frozenset[str],
) -> pa.Schema:
    """The type of each column, as the first 200 lines say (more while a column holds nothing).

    Args:
        numbers: columns whose whole numbers are as good as others.
        names: columns of CSV files that are text if all their cells look like whole numbers, so that 007 is not 7.
        texts: columns of CSV files that are text whatever their cells look like.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns, pa.null())
    csv = place.format is Format.csv
    with damaged(file.name):
        lines = _csv_values(place, file, columns) if csv else (value for _, value in _json_values(place, file.path))
        for number, line in enumerate(itertools.islice(lines, _MOST_PEEKED_ROWS)):
            if number >= _PEEKED_ROWS and not any(_is_open(t) for t in types.values()):
                break
            if isinstance(line, dict):
                types = {name: _merged(t, _type_of(line.get(name))) for name, t in types.items()}
    for name in columns:
        if name in numbers:
            types[name] = _with_floats(types[name])
        if csv and (name in texts or (name in names and pa.types.is_int64(types[name]))):
            types[name] = pa.string()
        types[name] = _closed(types[name])
    return pa.schema(list(types.items()))


_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


def _type_of(value: Any) -> pa.DataType:
    if not isinstance(value, list):
        return _TYPES.get(type(value), pa.null())  # null, or an object: a line that holds one does not fit
    kinds = dict.fromkeys(map(type, value[:1000]))
    inner: pa.DataType = pa.null()
    for item in (item for item in value[:10] if isinstance(item, list)):
        inner = _merged(inner, _type_of(item))
    for kind in kinds:
        inner = _merged(inner, _TYPES.get(kind, pa.null()))
    return pa.list_(inner)


def _merged(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The type that holds both; the first where there is none."""
    if pa.types.is_null(a):
        return b
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(_merged(a.value_type, b.value_type))
    return b if pa.types.is_int64(a) and pa.types.is_float64(b) else a


def _with_floats(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_list(type_):
        return pa.list_(_with_floats(type_.value_type))
    return pa.float64() if pa.types.is_int64(type_) or pa.types.is_null(type_) else type_


def _closed(type_: pa.DataType) -> pa.DataType:
    """Nothing seen: text."""
    if pa.types.is_list(type_):
        return pa.list_(_closed(type_.value_type))
    return pa.string() if pa.types.is_null(type_) else type_


def _is_open(type_: pa.DataType) -> bool:
    return _is_open(type_.value_type) if pa.types.is_list(type_) else pa.types.is_null(type_)


def read_text(place: Place, part: Part, schema: pa.Schema) -> Iterator[Piece]:
    """The lines of a file, about CHUNK_BYTES at a time; columns that a JSON line lacks are null.

    Raises:
        DataError: the file is damaged, or no text.
    """
    read = _read_csv if place.format is Format.csv else _read_json
    with damaged(part.file):
        for piece in read(place, part, schema):
            start = 0
            for batch in cut(piece.batch):
                stop = start + batch.num_rows
                problems = piece.problems if start == 0 else ()
                yield Piece(batch=batch, number_R=piece.number_R[start:stop], problems=problems)
                start = stop


# --- CSV


def _csv(
    place: Place, path: str, name: str, columns: Sequence[str], on_ragged: Any, block_bytes: int = CHUNK_BYTES
) -> pa_csv.CSVStreamingReader:
    """A reader of columns as text; of all of them for []."""
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
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )


def _csv_values(place: Place, file: SourceFile, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Cells of the first lines, as the JSON values that they look like."""
    for batch in _csv(place, file.path, file.name, columns, None):
        for line in batch.to_pylist():
            yield {name: _looks_like(cell) for name, cell in line.items()}


def _looks_like(cell: str | None) -> Any:
    if cell is None or cell.strip() in _MISSING:
        return None
    if cell.lstrip().startswith("["):
        return _json_or_none(cell)
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_csv(place: Place, part: Part, schema: pa.Schema) -> Iterator[Piece]:
    ragged: list[tuple[int, int, int]] = []

    def skip(row: Any) -> str:
        ragged.append((row.number, row.expected_columns, row.actual_columns))
        return "skip"

    reader = _csv(place, part.path, part.file, schema.names, skip)
    line = 2  # the first is the header; blank ones are not counted, nor are line ends in quotes
    told = 0
    while True:
        batch = next(reader, None)
        taken = 0 if batch is None else batch.num_rows
        skipped = np.array([number for number, _, _ in ragged[told:]], np.int64)
        number_R, last = _numbered(line, taken, skipped, batch is None)
        now = int(np.count_nonzero(skipped < last))
        problems = [
            Problem(file=part.file, number=number, column="line", message=f"got {seen} cells, expected {expected}")
            for number, expected, seen in ragged[told : told + now]
        ]
        told, line = told + now, last
        if batch is None:
            if problems:
                empty = pa.RecordBatch.from_pylist([], schema=schema)
                yield Piece(batch=empty, number_R=np.zeros(0, np.int64), problems=tuple(problems))
            return
        yield _typed(batch, number_R, part, schema, problems)


def _numbered(line: int, taken: int, skipped: NDArray[np.int64], at_end: bool) -> tuple[NDArray[np.int64], int]:
    """The lines of `taken` rows from `line` on, `skipped` left out, and the line after them."""
    lines = np.arange(line, line + taken + len(skipped))
    number_R = lines[~np.isin(lines, skipped)][:taken]
    if at_end:
        return number_R, int(skipped.max()) + 1 if len(skipped) else line
    return number_R, int(number_R[-1]) + 1 if taken else line


def _typed(
    batch: pa.RecordBatch, number_R: NDArray[np.int64], part: Part, schema: pa.Schema, problems: list[Problem]
) -> Piece:
    """Text cells as the types of the schema; lines with a cell that is none of its type become problems."""
    bad_R = np.zeros(batch.num_rows, bool)
    columns: list[pa.Array] = []
    for field in schema:
        column, bad = _cells(batch.column(field.name), field.type)
        for row in np.flatnonzero(bad):
            cell = str(batch.column(field.name)[int(row)].as_py())[:40]
            problems.append(_misfit(part.file, int(number_R[row]), field, repr(cell)))
        bad_R |= bad
        columns.append(column)
    typed = pa.record_batch(columns, schema=schema)
    if bad_R.any():
        typed, number_R = typed.filter(pa.array(~bad_R)), number_R[~bad_R]
    return Piece(batch=typed, number_R=number_R, problems=tuple(sorted(problems, key=lambda p: p.number)))


def _misfit(file: str, number: int, field: pa.Field, seen: str) -> Problem:
    message = f"got {seen}, expected {_words(field.type)}, as in the first lines"
    return Problem(file=file, number=number, column=field.name, message=message)


def _words(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"a list of {_words(type_.value_type).removeprefix('a ')}s"
    names = {pa.int64(): "a whole number", pa.float64(): "a number", pa.bool_(): "a boolean"}
    return names.get(type_, "a text")


def _cells(cells: pa.Array, type_: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Cells of text as a type, null where there is none, and which of them are not of that type."""
    good = np.zeros(len(cells), bool)
    if pa.types.is_string(type_):
        return cells, good
    if pa.types.is_list(type_):
        values = [None if cell is None else _json_or_none(cell) for cell in cells.to_pylist()]
        array, bad = _array_of(values, type_)
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
    except pa.ArrowInvalid:
        return None


# --- JSON lines


def _lines(place: Place, path: str) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines, each with the number of its first line."""
    number, rest = 1, b""
    with place.filesystem.open_input_stream(path) as file:
        while data := file.read(CHUNK_BYTES):
            head, newline, tail = (rest + data).rpartition(b"\n")
            if newline:
                yield number, head + newline
                number += head.count(b"\n") + 1
            rest = tail
    if rest.strip():
        yield number, rest


def _json_values(place: Place, path: str) -> Iterator[tuple[int, Any]]:
    """The value of each line that is not blank, and its number; None for what is no JSON."""
    for first, block in _lines(place, path):
        for number, line in enumerate(block.split(b"\n"), start=first):
            if line.strip():
                yield number, _json_or_none(line.decode("utf-8", "replace"))


def _read_json(place: Place, part: Part, schema: pa.Schema) -> Iterator[Piece]:
    for first, block in _lines(place, part.path):
        lines = block.split(b"\n")
        filled = [number for number, line in enumerate(lines, start=first) if line and not line.isspace()]
        batch = _parsed(block, schema)
        if batch is not None and batch.num_rows == len(filled):
            yield Piece(batch=batch, number_R=np.asarray(filled, np.int64))
        elif filled:
            yield _line_by_line(lines, filled, first, part, schema)


def _parsed(block: bytes, schema: pa.Schema) -> pa.RecordBatch | None:
    """The objects of a block; None if one of its lines is no object with such columns."""
    try:
        table = pa_json.read_json(
            pa.BufferReader(block),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    return table.select(schema.names).combine_chunks().to_batches()[0] if table.num_rows else None


def _line_by_line(lines: list[bytes], filled: list[int], first: int, part: Part, schema: pa.Schema) -> Piece:
    problems: list[Problem] = []
    numbers: list[int] = []
    values: list[dict[str, Any]] = []
    for number in filled:
        try:
            value = json.loads(lines[number - first])
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__}")  # noqa: TRY004 - said below
        except (ValueError, RecursionError) as error:
            message = f"got no JSON object ({error}), expected one a line"
            problems.append(Problem(file=part.file, number=number, column="line", message=message))
        else:
            numbers.append(number)
            values.append(value)
    bad_R = np.zeros(len(values), bool)
    columns: list[pa.Array] = []
    for field in schema:
        column, bad = _array_of([value.get(field.name) for value in values], field.type)
        for row in np.flatnonzero(bad):
            seen = json.dumps(values[row].get(field.name))[:40]
            problems.append(_misfit(part.file, numbers[row], field, seen))
        bad_R |= bad
        columns.append(column)
    batch = pa.record_batch(columns, schema=schema).filter(pa.array(~bad_R))
    problems.sort(key=lambda problem: problem.number)
    return Piece(batch=batch, number_R=np.asarray(numbers, np.int64)[~bad_R], problems=tuple(problems))


def _array_of(values: list[Any], type_: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]]:
    """JSON values as a type, null where there is none, and which of them are not of that type."""
    try:
        return pa.array(values, type_), np.zeros(len(values), bool)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        fits = np.array([_fits(value, type_) for value in values], bool)
        return pa.array([v if ok else None for v, ok in zip(values, fits, strict=True)], type_), ~fits


def _fits(value: Any, type_: pa.DataType) -> bool:
    try:
        pa.array([value], type_)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True
