"""The lines of a source's files, whatever their format: the columns asked for, in parts, of known types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from treadle.data.chunk import Part
from treadle.data.sources.files import Place, find_files
from treadle.data.sources.infer import columns_of
from treadle.data.sources.tables import Piece, arrow_schema, check_columns, read_table, table_parts
from treadle.data.sources.texts import read_text, text_columns, text_schema
from treadle.errors import ConfigError, DataError
from treadle.spec import ColumnsSpec, DataSpec, Format

__all__ = ["Lines", "open_lines"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Files that are known to have the columns; picklable.

    Args:
        schema: the columns that are read, with the types of the first file.
        parts: in the order of files and of lines.
    """

    place: Place
    schema: pa.Schema
    parts: tuple[Part, ...]

    def read(self, part: Part) -> Iterator[Piece]:
        """The lines of a part.

        Raises:
            DataError: the file is damaged.
        """
        if self.place.format in (Format.csv, Format.jsonl):
            return read_text(self.place, part, self.schema)
        return read_table(self.place, part, self.schema.names)

    def sample(self) -> tuple[str, pa.RecordBatch]:
        """The first file with lines in it, and some of them.

        Raises:
            DataError: there is no line at all.
        """
        for part in self.parts:
            for piece in self.read(part):
                if piece.batch.num_rows:
                    return part.file, piece.batch
        raise DataError(f"{self.place.files[0].name}: got no row that can be read, expected at least one")


def open_lines(data: DataSpec, spec: ColumnsSpec, scratch: Path) -> Lines:
    """The lines of `data.source`, every file looked at.

    Raises:
        ConfigError: no such format, or columns that the first file has not; all are named.
        DataError: no files, a damaged one, or one without the columns of the first.
    """
    if not spec.inputs:
        raise ConfigError("columns.inputs: got none, expected at least one", hint="columns.inputs=[<column>]")
    place = find_files(data, scratch)
    columns = columns_of(spec)
    names = list(dict.fromkeys(name for _, name in columns))
    first = place.files[0]
    if place.format not in (Format.csv, Format.jsonl):
        schema = arrow_schema(place, first)
        check_columns(first.name, columns, schema.names, first=True)
        wanted = pa.schema([schema.field(name) for name in names])
        return Lines(place=place, schema=wanted, parts=tuple(table_parts(place, columns)))
    check_columns(first.name, columns, text_columns(place, first), first=True)
    parts = [Part(file=f.name, path=f.path, size=f.size, split=f.split) for f in place.files]
    if place.format is Format.csv:
        for file in place.files[1:]:
            check_columns(file.name, columns, text_columns(place, file), first=False)
    return Lines(place=place, schema=_text_schema(place, spec, names), parts=tuple(parts))


def _text_schema(place: Place, spec: ColumnsSpec, names: list[str]) -> pa.Schema:
    numbers = {*spec.lower, *spec.upper, spec.times, spec.time, spec.weight}
    things: set[str] = set()
    for columns in (spec.inputs, spec.target):
        (numbers if len(columns) > 1 else things).update(columns)
    return text_schema(
        place,
        place.files[0],
        names,
        numbers=frozenset(name for name in numbers if name),
        names=frozenset(things),
        texts=frozenset(name for name in (spec.entity, spec.group, spec.id, spec.split) if name),
    )
