"""JSON lines as typed columns. A line that is no object, or does not fit, is a problem of that line.

Whole blocks are read by pyarrow. A block with a line that it refuses is read again line by line, by the same rules:
what becomes of a line must not depend on those beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from treadle.data.chunk import CHUNK_BYTES, Part, Problem
from treadle.data.sources.cells import array_of, json_or_none, misfit, utf8_problem
from treadle.data.sources.files import Place
from treadle.data.sources.tables import Piece

__all__ = ["json_values", "read_json"]


def json_values(place: Place, path: str) -> Iterator[Any]:
    """The value of each line that is not blank; None for what is no JSON."""
    for _, block in _blocks(place, path):
        for line in block.split(b"\n"):
            if line.strip():
                yield json_or_none(line.decode("utf-8", "replace"))


def read_json(place: Place, part: Part, schema: pa.Schema) -> Iterator[Piece]:
    """The objects of a file in the types of the schema; columns that a line lacks are null."""
    for first, block in _blocks(place, part.path):
        lines = block.split(b"\n")
        filled = [number for number, line in enumerate(lines, start=first) if line and not line.isspace()]
        batch = _parsed(block, schema)
        if batch is not None and batch.num_rows == len(filled):
            yield Piece(batch=batch, number_R=np.asarray(filled, np.int64))
        elif filled:
            yield _line_by_line({number: lines[number - first] for number in filled}, part.file, schema)


def _blocks(place: Place, path: str) -> Iterator[tuple[int, bytes]]:
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


def _parsed(block: bytes, schema: pa.Schema) -> pa.RecordBatch | None:
    """The objects of a block; None if one of its lines is no object with such columns."""
    buffer = pa.py_buffer(block)
    ends = pa.py_buffer(np.array([0, len(block)], np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, ends, buffer).validate(full=True)  # that it is UTF-8: the parser does not
        table = pa_json.read_json(
            pa.BufferReader(buffer),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    return table.select(schema.names).combine_chunks().to_batches()[0] if table.num_rows else None


def _line_by_line(lines: dict[int, bytes], file: str, schema: pa.Schema) -> Piece:
    problems: list[Problem] = []
    objects: dict[int, _Object] = {}
    for number, line in lines.items():
        found = _object_of(line, number, file, schema.names)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            objects[number] = found
    number_R = np.array(list(objects), np.int64)
    bad_R = np.zeros(len(objects), bool)
    columns: list[pa.Array] = []
    for field in schema:
        values = [value.get(field.name) for value in objects.values()]
        column, misfit_R = array_of(values, field.type)
        wrong = np.flatnonzero(misfit_R).tolist()
        problems += (misfit(file, int(number_R[row]), field, json.dumps(values[row])[:40]) for row in wrong)
        bad_R |= misfit_R
        columns.append(column)
    batch = pa.record_batch(columns, schema=schema).filter(pa.array(~bad_R))
    problems.sort(key=lambda problem: problem.number)
    return Piece(batch=batch, number_R=number_R[~bad_R], problems=tuple(problems))


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys came more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated = [key for key in self if keys.count(key) > 1] if len(self) < len(keys) else []


def _object_of(line: bytes, number: int, file: str, columns: list[str]) -> _Object | Problem:
    """The object of a line, or what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return utf8_problem(file, number, "line", line[error.start :])
    try:
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_Object)
        if not isinstance(value, _Object):
            raise ValueError(f"a {type(value).__name__}")  # noqa: TRY004 - said below
    except (ValueError, RecursionError) as error:
        message = f"got no JSON object ({error}), expected one a line"
        return Problem(file=file, number=number, column="line", message=message)
    for key in value.repeated:
        if key in columns:
            return Problem(file=file, number=number, column=key, message="got the key more than once, expected it once")
    return value
