"""CSV files and JSON lines as batches of typed columns: the first lines say the types, later ones must keep to them.

A line that cannot be read, or does not fit, is a problem of that line; the others are read on. What is of one format
is in `csv_lines` and `json_lines`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from treadle.data.chunk import Part
from treadle.data.sources.csv_lines import csv_columns, csv_values, read_csv
from treadle.data.sources.files import Place, SourceFile
from treadle.data.sources.json_lines import json_values, read_json
from treadle.data.sources.tables import Piece, check_size, cut, damaged
from treadle.spec import Format

__all__ = ["read_text", "text_columns", "text_schema"]

_PEEKED_ROWS = 200
_MOST_PEEKED_ROWS = 20_000


def text_columns(place: Place, file: SourceFile) -> list[str]:
    """The columns of a CSV file, or the keys of the first objects of JSON lines."""
    with damaged(file.name):
        if place.format is Format.csv:
            return csv_columns(place, file.path, file.name)
        values = itertools.islice(json_values(place, file.path), _PEEKED_ROWS)
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
        lines = csv_values(place, file.path, file.name, columns) if csv else json_values(place, file.path)
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
    read = read_csv if place.format is Format.csv else read_json
    with damaged(part.file):
        for piece in read(place, part, schema):
            start = 0
            for batch in cut(piece.batch):
                stop = start + batch.num_rows
                problems = piece.problems if start == 0 else ()
                yield Piece(batch=batch, number_R=piece.number_R[start:stop], problems=problems)
                start = stop
        check_size(place, part)
