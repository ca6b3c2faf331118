"""Parquet and Arrow files as batches of bounded size, and the parts in which they can be read side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from treadle.data.chunk import CHUNK_BYTES, Part, Problem
from treadle.data.sources.files import Place, SourceFile
from treadle.errors import ConfigError, DataError, did_you_mean
from treadle.spec import Format

__all__ = ["Piece", "arrow_schema", "check_columns", "check_size", "cut", "damaged", "read_table", "table_parts"]

PART_BYTES = 64 << 20
_MOST_READ_BYTES = 128 << 20
"""An Arrow file with batches larger than this is mapped into memory, else its batches are read into memory whole."""

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_Columns = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Some lines of a file.

    Args:
        batch: the columns asked for. number_R: of each line in the file, from 1.
        problems: lines that are not in the batch, having no form.
    """

    batch: pa.RecordBatch
    number_R: NDArray[np.int64]
    problems: tuple[Problem, ...] = ()


@contextlib.contextmanager
def damaged(file: str) -> Iterator[None]:
    """What the vendor raises about a file, as a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeError) as error:
        text = str(error).partition(". Detail:")[0].strip().rstrip(".")
        raise DataError(f"{file}: cannot be read ({text})", hint="is the file whole, and of data.format?") from None


def check_columns(file: str, columns: Sequence[tuple[str, str]], there: Sequence[str], *, first: bool) -> None:
    """Nothing, if all columns (key of the spec, name) are there, once.

    Raises:
        ConfigError: the first file lacks some: all of them are named.
        DataError: a later file does, or a file has several columns of one of the names.
    """
    lacking = [
        f"columns.{key}: got {name!r}, expected a column of {file}{did_you_mean(name, there)}"
        for key, name in columns
        if name not in there
    ]
    if lacking:
        kind = ConfigError if first else DataError
        raise kind("\n".join(lacking), hint=f"the columns are {', '.join(there)}")
    twice = [
        f"columns.{key}: {name!r}: got {there.count(name)} columns of that name in {file}, expected one"
        for key, name in columns
        if there.count(name) > 1
    ]
    if twice:
        raise DataError("\n".join(twice), hint="rename one of them in the file")


def check_size(place: Place, part: Part) -> None:
    """Nothing, if a file that was read whole is as long as when it was found.

    A text, or an Arrow stream, that is cut off meanwhile reads as a shorter one.

    Raises:
        DataError: it is longer or shorter.
    """
    size = place.filesystem.get_file_info(part.path).size
    if size != part.size:
        raise DataError(
            f"{part.file}: got {size} bytes when it was read, expected {part.size} as when it was found",
            hint="is another program writing it?",
        )


def arrow_schema(place: Place, file: SourceFile) -> pa.Schema:
    """The columns of a Parquet or Arrow file.

    Raises:
        DataError: it is damaged, or none.
    """
    with damaged(file.name):
        if place.format is Format.parquet:
            with _parquet(place.filesystem, file.path) as opened:
                return opened.schema_arrow
        with _arrow(place.filesystem, file.path) as reader:
            return reader.schema


def table_parts(place: Place, columns: Sequence[tuple[str, str]]) -> list[Part]:
    """Parts of about PART_BYTES: row groups of Parquet files, batches of Arrow files, streams whole.

    Args:
        columns: that are read: key of the spec, name.

    Raises:
        DataError: a file is damaged, or lacks columns.

    Cost: reads the footer of every file, 16 at a time.
    """
    split = _parquet_parts if place.format is Format.parquet else _arrow_parts
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda file: split(place.filesystem, file, columns), place.files)
        return [part for parts in found for part in parts]


def _parquet(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    # Read ahead in a buffer of its own, not by whole row groups: these may be larger than memory.
    return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=False, buffer_size=4 << 20)


def _parquet_parts(filesystem: fs.FileSystem, file: SourceFile, columns: _Columns) -> list[Part]:
    names = [name for _, name in columns]
    with damaged(file.name), _parquet(filesystem, file.path) as opened:
        check_columns(file.name, columns, opened.schema_arrow.names, first=False)
        groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        return _parts_of(file, [(group.num_rows, _group_bytes(group, names)) for group in groups])


def _group_bytes(group: Any, columns: Collection[str]) -> int:
    """What columns take, unpacked. The path of one is its name and those of what is nested in it, after dots."""
    chunks = (group.column(i) for i in range(group.num_columns))
    starts = tuple(f"{name}." for name in columns)  # a name may hold dots
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(starts))


def _parts_of(file: SourceFile, groups: Sequence[tuple[int, int]]) -> list[Part]:
    """Runs of groups (rows, bytes) of about PART_BYTES."""
    parts: list[Part] = []
    start = first = rows = size = 0
    for stop, (more_rows, more_bytes) in enumerate(groups, start=1):
        rows, size = rows + more_rows, size + more_bytes
        if size >= PART_BYTES or stop == len(groups):
            parts.append(
                Part(
                    file=file.name,
                    path=file.path,
                    first=first,
                    start=start,
                    stop=stop,
                    size=size,
                    split=file.split,
                )
            )
            start, first, rows, size = stop, first + rows, 0, 0
    return parts


def _arrow_parts(filesystem: fs.FileSystem, file: SourceFile, columns: _Columns) -> list[Part]:
    with damaged(file.name), _arrow(filesystem, file.path) as reader:
        check_columns(file.name, columns, reader.schema.names, first=False)
        # To know the rows of each batch, each is opened, for one column of it: cheap where the file is near.
        near = isinstance(filesystem, fs.LocalFileSystem)
        if isinstance(reader, pa.RecordBatchStreamReader) or file.size <= PART_BYTES or not near:
            return [Part(file=file.name, path=file.path, size=file.size, split=file.split)]
        light = next((i for i, field in enumerate(reader.schema) if not pa.types.is_nested(field.type)), 0)
        with _arrow(filesystem, file.path, [reader.schema.names[light]]) as counter:
            rows = [counter.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    return _parts_of(file, [(n, file.size // len(rows)) for n in rows])


def _arrow(filesystem: fs.FileSystem, path: str, columns: Sequence[str] = ()) -> Any:
    """A reader of the file or of the stream at `path`; of a file, only these columns are read, all for ()."""
    opened = filesystem.open_input_file(path)
    if opened.read(6) == b"ARROW1":
        opened.seek(0)
        reader = pa.ipc.open_file(opened)
        if not columns:
            return reader
        included = [reader.schema.get_field_index(name) for name in columns]
        return pa.ipc.open_file(opened, options=pa.ipc.IpcReadOptions(included_fields=included))
    size = opened.size()
    opened.seek(max(0, size - len(_END_OF_STREAM)))
    if (
        opened.read(len(_END_OF_STREAM)) != _END_OF_STREAM
    ):  # else a stream that was cut between two batches reads as a shorter one
        raise pa.ArrowInvalid("the stream has no end: it was cut off, or is no Arrow stream")
    opened.seek(0)
    return pa.ipc.open_stream(opened)


def read_table(place: Place, part: Part, columns: Sequence[str]) -> Iterator[Piece]:
    """The lines of a part, about CHUNK_BYTES at a time.

    Raises:
        DataError: the file is damaged.
    """
    number = part.first + 1
    is_parquet = place.format is Format.parquet
    batches = _parquet_batches if is_parquet else _arrow_batches
    with damaged(part.file):
        for batch in batches(place.filesystem, part, list(columns)):
            if not is_parquet:  # whose reader makes its offsets itself; those of a file may lead anywhere
                batch.validate(full=True)
            for piece in cut(batch):
                lines = piece if is_parquet else _detached(piece)
                yield Piece(batch=lines, number_R=np.arange(number, number + piece.num_rows))
                number += piece.num_rows
        if part.stop < 0:
            check_size(place, part)


def _parquet_batches(filesystem: fs.FileSystem, part: Part, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _parquet(filesystem, part.path) as opened:
        groups = range(part.start, part.stop if part.stop >= 0 else opened.num_row_groups)
        for group in groups:
            meta = opened.metadata.row_group(group)
            size = max(1, _group_bytes(meta, frozenset(columns)))
            rows = max(1, min(meta.num_rows, CHUNK_BYTES * meta.num_rows // size))
            found = 0
            for batch in opened.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                found += batch.num_rows
                yield batch
            if found != meta.num_rows:  # what the vendor makes of a file that is cut off between two pages
                raise pa.ArrowInvalid(f"row group {group} has {found} rows, expected {meta.num_rows}")


def _arrow_batches(filesystem: fs.FileSystem, part: Part, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The batches of a part, one at a time in memory; those of a stream with the columns that are not asked for too."""
    with _arrow(filesystem, part.path, columns) as reader:
        if isinstance(reader, pa.RecordBatchStreamReader):
            yield from (batch.select(columns) for batch in reader)
            return
        stop = part.stop if part.stop >= 0 else reader.num_record_batches
        if part.size <= _MOST_READ_BYTES * (stop - part.start) or not isinstance(filesystem, fs.LocalFileSystem):
            for i in range(part.start, stop):
                yield reader.get_batch(i).select(columns)
            return
    with _arrow(fs.LocalFileSystem(use_mmap=True), part.path) as reader:
        for i in range(part.start, stop):
            yield reader.get_batch(i).select(columns)


def _detached(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A piece of a larger batch, what is no list copied.

    A view keeps the whole batch in memory, and texts are kept for long; lists of numbers are not. The copy of text also
    begins at 0, so that its offsets fit in 32 bits, however large the batch.
    """
    columns = [c if pa.types.is_nested(c.type) else pa.concat_arrays([c]) for c in batch.columns]
    return pa.record_batch(columns, schema=batch.schema)


def cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in views of about CHUNK_BYTES, by how much each row holds."""
    pieces = -(-batch.nbytes // CHUNK_BYTES)
    if pieces <= 1 or batch.num_rows <= 1:
        yield batch
        return
    ends = np.arange(1, batch.num_rows + 1)
    for column in batch.columns:  # the longest lists decide
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            offsets = column.offsets.to_numpy()
            ends = max(ends, offsets[1:] - offsets[0], key=lambda e: int(e[-1]))
    marks = np.searchsorted(ends, np.arange(1, pieces) * (int(ends[-1]) / pieces)) + 1
    bounds = np.unique(np.concatenate([[0], np.minimum(marks, batch.num_rows), [batch.num_rows]]))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield batch.slice(start, stop - start)
